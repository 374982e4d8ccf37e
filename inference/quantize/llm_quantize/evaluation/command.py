"""The command `evaluate.py`: how far quantized checkpoints are from their source, read from the saved files.

evaluate.py SOURCE QUANTIZED             perplexity of both, KL divergence, same likeliest token
evaluate.py SOURCE --compare A B ...     several checkpoints of one source side by side
"""

from __future__ import annotations

import argparse
import json
import os
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from llm_quantize.calibration.text_use import EVALUATION
from llm_quantize.calibration.tokenizer_packages import naming_packages
from llm_quantize.calibration.windows import (
    CalibrationConfig,
    check_data,
    check_window_length,
    load_windows,
    longest_window,
)
from llm_quantize.checkpoint.reader import QuantizedStore
from llm_quantize.command_line import OneLineParser, debugging, failure, show_any_character
from llm_quantize.console import Console
from llm_quantize.device import Device
from llm_quantize.errors import InputError, one_line
from llm_quantize.evaluation.heldout import EVAL_SEQ_LEN
from llm_quantize.evaluation.perplexity import Measured, measure
from llm_quantize.io.embedded_files import EMBEDDED_HELDOUT
from llm_quantize.io.hub import resolve_model
from llm_quantize.model.source import SourceModel


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = OneLineParser(
        prog="evaluate.py",
        description="Measure quantized checkpoints against their source.",
        epilog="Exit codes: 0 done, 2 bad usage or input, 1 failure in the work, 130 interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="the model before: a local directory or a hub id")
    parser.add_argument("quantized", metavar="QUANTIZED", nargs="?", type=Path, help="quantized directory")
    parser.add_argument(
        "--compare", metavar="DIR", nargs="+", type=Path, default=[], help="several of them, side by side"
    )
    parser.add_argument(
        "--data",
        default="auto",
        help="held-out text: auto for the one that ships with this program, wikitext, c4, a hub id, a local "
        "file (default: auto)",
    )
    parser.add_argument("--column", metavar="NAME", help="column that holds the text, where it is not found")
    parser.add_argument("--samples", type=int, default=16, metavar="N", help="windows of text (default: 16)")
    parser.add_argument(
        "--seq_len",
        type=int,
        metavar="N",
        help=f"tokens a window (default: {EVAL_SEQ_LEN}, or what the model takes)",
    )
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="draws the windows (default: 1)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code of SOURCE")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code; --help and wrong arguments leave by SystemExit."""
    for key, quiet in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("TOKENIZERS_PARALLELISM", "true"),
        ("HF_HUB_DISABLE_TELEMETRY", "1"),
    ):
        os.environ.setdefault(key, quiet)
    show_any_character()
    args = build_parser().parse_args(argv)
    console = Console(quiet=args.json)
    with warnings.catch_warnings():
        if not debugging():
            warnings.simplefilter("ignore")
        try:
            _evaluate(args, console)
        except (Exception, KeyboardInterrupt) as error:
            if debugging():
                traceback.print_exc()
            memory = "out of memory: lower --seq_len, or take --device cpu"
            code, line = failure(error, memory, memory, "uv run python inference/quantize/evaluate.py")
            console.error(line, "evaluate.py")
            return code
    return 0


def _evaluate(args: argparse.Namespace, console: Console) -> None:
    checkpoints: list[Path] = ([args.quantized] if args.quantized else []) + args.compare
    if not checkpoints:
        raise InputError("no quantized checkpoint: give its directory, or several after --compare")
    for path in checkpoints:
        if not path.is_dir():
            raise InputError(f"no such directory: {path}")
        QuantizedStore(path)  # before anything long
    for flag, value, least in (("samples", args.samples, 1), ("seq_len", args.seq_len or 2, 2)):
        if value < least or args.seq_len == 0:
            raise InputError(f"--{flag} {getattr(args, flag)}: at least {least}")
    if args.data != "auto":
        check_data(args.data, EVALUATION)
    device = Device.pick(args.device)
    directory = resolve_model(args.source, trust_remote_code=args.trust_remote_code, log=console.note)
    with naming_packages(directory):
        source = SourceModel.open(directory, trust_remote_code=args.trust_remote_code)
    positions = getattr(source.text_config, "max_position_embeddings", None)
    longest = longest_window(source.tokenizer, positions)
    if args.seq_len:
        check_window_length("--seq_len", args.seq_len, source.tokenizer, positions)
    asked = CalibrationConfig(
        data=str(EMBEDDED_HELDOUT) if args.data == "auto" else args.data,
        samples=args.samples,
        seq_len=args.seq_len or min(EVAL_SEQ_LEN, longest or EVAL_SEQ_LEN),
        column=args.column,
        seed=args.seed,
    )
    tokens = load_windows(asked, source.tokenizer, log=console.warn, use=EVALUATION).tokens
    results = []
    with console.blocks(len(source.blocks) * len(checkpoints)) as progress:
        for path in checkpoints:
            results.append(measure(source, path, tokens, device, on_block=lambda _: progress.advance()))
    sizes = [sum(f.stat().st_size for f in set(QuantizedStore(path).files.values())) for path in checkpoints]
    if args.json:
        rows = [
            {"checkpoint": str(path), "bytes": size, **asdict(result)}
            for path, size, result in zip(checkpoints, sizes, results, strict=True)
        ]
        print(json.dumps({"source": args.source, "data": args.data, "seed": args.seed, "results": rows}))
        return
    print(_table(checkpoints, sizes, results))


def _table(checkpoints: list[Path], sizes: list[int], results: list[Measured]) -> str:
    rows = [("checkpoint", "MiB", "perplexity", "KL divergence", "same token")]
    rows.append(("(source)", "", f"{results[0].perplexity_source:.3f}", "", ""))
    for path, size, result in zip(checkpoints, sizes, results, strict=True):
        ppl, same = f"{result.perplexity_quantized:.3f}", f"{100 * result.agreement:.2f} %"
        rows.append((one_line(path), f"{size / 2**20:,.1f}", ppl, f"{result.kl:.5f}", same))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{row[0]:{widths[0]}}  " + "  ".join(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    return "\n".join([*(line.rstrip() for line in lines), f"over {results[0].tokens:,} tokens"])
