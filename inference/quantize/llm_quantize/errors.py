"""Define the errors that end a run, with their exit codes, and format causes in one line."""

from __future__ import annotations

LONGEST = 300  # characters of an exception's text; libraries put whole files into theirs


class _OneLineError(Exception):
    """An error whose text is one line, whatever names of files and tensors it holds."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class InputError(_OneLineError):
    """The user's input cannot be used. The text says in one line what is wrong and what to do. Exit code 2."""

    exit_code = 2


class WorkError(_OneLineError):
    """The work failed (disk full, damaged shard, no memory). The text is one line. Exit code 1."""

    exit_code = 1


class FinalError(WorkError):
    """A failure that would happen again, so that nothing is kept for the same command to continue from."""


def is_failure(error: BaseException) -> bool:
    """Return whether `error` is a failure, not a request to stop such as KeyboardInterrupt or SystemExit.

    A panic of a library in Rust is a failure, though its class does not derive from `Exception`.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def one_line(what: object, limit: int | None = None) -> str:
    """Format `what` on one line: replace white space by one blank, other control characters by a question mark.

    An exception without a message gives the name of its class. limit: characters after which the text is cut; None
    means `LONGEST` for an exception, and no limit for everything else.
    """
    text = " ".join(str(what).split())
    if isinstance(what, BaseException):
        text = text or type(what).__name__
        limit = limit or LONGEST
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if limit is None or len(text) <= limit else text[: limit - 1] + "…"
