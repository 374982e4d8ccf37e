"""The two ways a run can end badly, each with its exit code, and how a cause is told in one line."""

from __future__ import annotations

LONGEST = 300  # characters of a cause; libraries put whole files into theirs


class _Told(Exception):
    """An error whose text is one line, whatever names of files and tensors it holds."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class InputError(_Told):
    """What the user gave cannot be worked with: one line, what is wrong and what to do. Exit code 2."""

    exit_code = 2


class WorkError(_Told):
    """The work itself failed (disk full, damaged shard, no memory): one line. Exit code 1."""

    exit_code = 1


class FinalError(WorkError):
    """A failure that the same command would meet again: nothing is kept for it to go on from."""


def is_failure(error: BaseException) -> bool:
    """Whether an exception is a failure rather than somebody's wish to stop: panics of Rust are no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def one_line(what: object, limit: int | None = None) -> str:
    """`what` on one line: white space runs become a blank, other control characters a question mark.

    An exception without a message gives its class's name. Exceptions are cut at `LONGEST` characters, other
    things at `limit`; None: not at all.
    """
    text = " ".join(str(what).split())
    if isinstance(what, BaseException):
        text = text or type(what).__name__
        limit = limit or LONGEST
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if limit is None or len(text) <= limit else text[: limit - 1] + "…"
