"""Reads the options and their defaults out of the text of `--help`."""

from __future__ import annotations

import re

from llm_quantize import cli
from llm_quantize.config import Method


def help_defaults(method: Method) -> dict[str, str]:
    """Option without dashes -> default as written, up to a semicolon. Every option must have one, once."""
    text = cli.build_parser(method).format_help()
    entries = re.split(r"^  --(?=\w)", text, flags=re.MULTILINE)[1:]
    told: dict[str, str] = {}
    for entry in entries:
        name, _, rest = entry.partition(" ")
        found = re.findall(r"\(default: ([^;)]*)", " ".join(rest.split()))
        assert len(found) == 1, f"--{name} tells {len(found)} defaults"
        assert name not in told
        told[name] = found[0]
    return told
