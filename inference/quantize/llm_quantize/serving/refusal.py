"""The error with which a checkpoint or an argument is refused, and how its text is made safe to print."""

from __future__ import annotations


class Refusal(Exception):
    """vLLM would not serve the checkpoint, or would answer wrongly.

    The text is one line that says what is wrong and what to do.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


def one_line(text: object) -> str:
    """Return `text` as one line of printable characters.

    Each run of white space becomes one blank, every other unprintable character a question mark: a checkpoint from
    anyone may hold names with control sequences, which must not reach a terminal.
    """
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))
