"""Put names that may hold anything into texts of a language: Python, a shell, YAML, Markdown. One function for each."""

from __future__ import annotations

import re
import shlex
from typing import Any

from llm_quantize.errors import one_line

# What begins markup inside a line. Underscores inside words, as in names of layers, are none.
_MARKUP = re.compile(r"[\\`*<>\[\]|&~]")


def python_literal(text: str) -> str:
    """Return a Python expression, of one line, whose value is `text`."""
    plain = text.isprintable() and not {'"', "\\"} & set(text)
    return f'"{text}"' if plain else repr(text)


def shell_word(text: str) -> str:
    """Return a word of one line that a shell reads as `text`: of any shell where it is printable, else of bash."""
    if text.isprintable():
        return shlex.quote(text)
    quoted = "".join(f"\\{c}" if c in "\\'" else c if c.isprintable() else _shell_escape(c) for c in text)
    return f"$'{quoted}'"


def yaml_value(value: Any) -> str:
    """Return a text, or a list of texts, as YAML of one line: quoted, so that no text is taken for another type."""
    import yaml  # only cards need it

    text: str = yaml.safe_dump(
        value, default_style='"', default_flow_style=True, allow_unicode=True, width=float("inf")
    )
    # YAML takes more for printable than a terminal does: marks that turn the direction of writing, for one.
    return "".join(c if c.isprintable() else f"\\U{ord(c):08X}" for c in text.rstrip("\n"))


def markdown_text(text: str) -> str:
    """Return `text` on one line, as Markdown that shows it and does nothing else."""
    return _MARKUP.sub(r"\\\g<0>", one_line(text))


def markdown_code(text: str) -> str:
    """Return `text` on one line as a span of code."""
    text = one_line(text)
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def _shell_escape(character: str) -> str:
    """Bytes of a file's name that are no UTF-8 come from the system as halves of surrogate pairs."""
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))
