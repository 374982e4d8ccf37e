"""Quantize a tiny random model of every architecture in transformers' causal mapping, by both methods.

    python tests/architecture_sweep.py [MODEL_TYPE ...] [--json OUT] [--table OUT]

Prints for each what came of it: `works`, `refused` (exit code 2 and one line, before any work), `failed`, or `not
built` where no tiny model could be made. What works was read back from its files and measured against its source.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "inference" / "quantize"), str(ROOT / "tests")]
TEXT = "--calib_samples 4 --calib_seq_len 32 --eval_samples 2 --quality fast --device cpu --overwrite"


def outcome(method: str, directory: Path, target: Path) -> tuple[str, str]:
    """Run one command. Returns what came of it, and the last line that it printed to stderr."""
    import awq_quantize
    import gptq_quantize
    from llm_quantize.io.embedded_files import EMBEDDED_CALIBRATION, EMBEDDED_HELDOUT

    main = {"awq": awq_quantize.main, "gptq": gptq_quantize.main}[method]
    words = f"--model_path {directory} --output_path {target} --group_size 32 {TEXT}".split()
    words += ["--calib_data", str(EMBEDDED_CALIBRATION), "--eval_data", str(EMBEDDED_HELDOUT)]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(words)
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        except BaseException as error:
            return "failed", f"a traceback: {type(error).__name__}: {error}"
    lines = [line for line in said.getvalue().splitlines() if line.strip()]
    errors = [line for line in lines if ": error: " in line or "note: " in line]
    last = (errors or lines or [""])[0]
    return {0: "works", 2: "refused"}.get(code, "failed"), last.partition(": error: ")[2] or last


def sweep(model_types: list[str]) -> list[dict[str, Any]]:
    """The outcome of each, in order."""
    import torch
    from transformers import AutoTokenizer

    from llm_quantize.io.embedded_files import EMBEDDED_MODEL
    from tiny_architectures import tiny_model

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    rows: list[dict[str, Any]] = []
    for model_type in model_types:
        row: dict[str, Any] = {"model_type": model_type}
        rows.append(row)
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as place:
            directory = Path(place) / "model"
            try:
                model = tiny_model(model_type)
                row["class"] = type(model).__name__
                model.to(torch.bfloat16).save_pretrained(directory)
                tokenizer.save_pretrained(directory)
                del model
            except Exception as error:
                row["built"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                print(f"{model_type}: not built ({row['built']})", file=sys.stderr, flush=True)
                continue
            for method in ("awq", "gptq"):
                target = Path(place) / method
                row[method], row[f"{method} said"] = outcome(method, directory, target)
                row[f"{method} said"] = row[f"{method} said"].replace(str(directory), "DIR")
                shutil.rmtree(target, ignore_errors=True)
                print(
                    f"{model_type} {method}: {row[method]} {row[f'{method} said'][:200]}",
                    file=sys.stderr,
                    flush=True,
                )
        row["seconds"] = round(time.perf_counter() - started, 1)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The outcomes as a Markdown table, with one line of counts before it."""
    built = [row for row in rows if "built" not in row]
    counts = ", ".join(
        f"{method.upper()} {sum(row[method] == 'works' for row in built)} of {len(rows)}"
        for method in ("awq", "gptq")
    )
    lines = [f"Work: {counts}.", "", "| model type | class | AWQ | GPTQ | why not |", "|---|---|---|---|---|"]
    for row in rows:
        if "built" in row:
            lines.append(f"| `{row['model_type']}` | | – | – | not built: {_cell(row['built'])} |")
            continue
        why = dict.fromkeys(_cell(row[f"{m} said"]) for m in ("awq", "gptq") if row[m] != "works")
        words = [f"| `{row['model_type']}` | {row['class']} | {row['awq']} | {row['gptq']} |", "; ".join(why)]
        lines.append(" ".join([*filter(None, words), "|"]))
    return "\n".join(lines) + "\n"


def _cell(words: str) -> str:
    return words.replace("|", "\\|").replace("\n", " ")[:200]


def main() -> int:
    """Parse the command line and sweep."""
    import transformers
    from transformers.models.auto import modeling_auto

    known: Any = modeling_auto
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model_types", nargs="*", help="all by default")
    parser.add_argument("--json", type=Path, help="write the outcomes to this file, too")
    parser.add_argument("--table", type=Path, help="write them as a Markdown table to this file, too")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    rows = sweep(given.model_types or sorted(known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))
    if given.table:
        given.table.write_text(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
