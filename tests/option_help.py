"""Read the options and their defaults from the text of `--help`."""

from __future__ import annotations

import re

from llm_quantize import cli
from llm_quantize.types import Method


def help_defaults(method: Method) -> dict[str, str]:
    """Map each option without dashes to its default as written, up to a semicolon. Every option must have one, once."""
    text = cli.build_parser(method).format_help()
    entries = re.split(r"^  --(?=\w)", text, flags=re.MULTILINE)[1:]
    found: dict[str, str] = {}
    for entry in entries:
        name, _, rest = entry.partition(" ")
        defaults = re.findall(r"\(default: ([^;)]*)", " ".join(rest.split()))
        assert len(defaults) == 1, f"--{name} has {len(defaults)} defaults"
        assert name not in found
        found[name] = defaults[0]
    return found
