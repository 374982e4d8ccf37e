#!/usr/bin/env python3
"""Tells whether vLLM serves a checkpoint, and with which arguments: the front door that `run_vllm.sh` calls.

Needs the standard library alone and any Python from 3.8.
"""

from __future__ import annotations

import sys
from pathlib import Path

# `python -I`, with which `run_vllm.sh` calls this file, leaves its directory out of the import path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from llm_quantize.serving.cli import main

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
