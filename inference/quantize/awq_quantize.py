#!/usr/bin/env python3
"""Quantizes a Hugging Face causal LM with AWQ (activation-aware channel scales): the command's front door.

`python inference/quantize/awq_quantize.py --help` lists the arguments. Knows nothing but its method's name.
"""

from __future__ import annotations

import sys

from llm_quantize import cli


def main(argv: list[str] | None = None) -> int:
    """Runs the command on `argv` (None: the process's arguments) and returns its exit code."""
    return cli.run("awq", sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    raise SystemExit(main())
