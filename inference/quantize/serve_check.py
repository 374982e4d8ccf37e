#!/usr/bin/env python3
"""Tells whether vLLM serves a checkpoint, and with which arguments: what `run_vllm.sh` asks.

Standard library alone, any Python from 3.8.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `python -I` leaves it out

from llm_quantize.serving.serve_check import main

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
