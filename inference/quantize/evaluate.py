#!/usr/bin/env python3
"""Measures quantized checkpoints against their source: the command's front door.

`python inference/quantize/evaluate.py --help` lists the arguments.
"""

from __future__ import annotations

from llm_quantize.evaluation.command import main

if __name__ == "__main__":
    raise SystemExit(main())
