"""This program beside the libraries: the same model, the same tokens, one run; a table of time, memory and loss.

python benchmarks/compare.py [--model DIR] [--calib FILE] [--method awq gptq] [--only native autoawq ...]
    [--samples N --seq_len N --bits N --group_size N] [--device auto] [--json OUT]

Everyone runs as `--backend` runs it, in a process of its own: what is written is read back, checked and measured on
the same held-out text. llm-compressor has an adapter here alone. Libraries that take bfloat16 get the model's dtype.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "inference" / "quantize"))

from llm_quantize.backends import registry
from llm_quantize.calibration.windows import CalibrationConfig
from llm_quantize.config import QuantizeConfig
from llm_quantize.errors import InputError, WorkError
from llm_quantize.io.embedded_files import EMBEDDED_CALIBRATION, EMBEDDED_MODEL

HERE = Path(__file__).resolve().parent
PEER = "llm-compressor"
registry.LIBRARIES[PEER] = registry.Library(
    "llm-compressor",
    "0.14.0.1",
    "llmcompressor",
    str(HERE / "run_llmcompressor.py"),
    {"awq": (4, 8), "gptq": (2, 3, 4, 8)},
    format="compressed-tensors",
)
# What a library does between its first and its last look at the weights; the native stages of the same name are those
# of its loop over blocks. Packing belongs to it everywhere, writing files only where it cannot be told apart (native).
WORK = ("quantize", "embed", "capture", "solve", "pack", "replay")
TITLES = {"native": "this program"}


@dataclass(frozen=True, slots=True)
class Row:
    """One entry. `seconds`: quantization alone, without loading and saving; `error`: what it failed with."""

    method: str
    entry: str
    version: str = ""
    seconds: float = 0.0
    device_bytes: int = 0
    host_bytes: int = 0
    size: int = 0
    kl: float = 0.0
    perplexity: float = 0.0
    error: str = ""


def entries(method: str) -> tuple[str, ...]:
    """What there is to compare for a method."""
    return registry.choices(method)


def settings(args: argparse.Namespace, method: Any, entry: Any, output: Path) -> QuantizeConfig:
    """One entry's run. GPTQ in activation order over groups that stay where they are, as vLLM serves it."""
    return QuantizeConfig(
        method=method,
        backend=entry,
        model_path=str(args.model),
        output_path=str(output),
        bits=args.bits,
        group_size=args.group_size,
        calibration=CalibrationConfig(
            data=str(args.calib), samples=args.samples, seq_len=args.seq_len, seed=args.seed
        ),
        eval_samples=args.eval_samples,
        device=args.device,
        quiet=True,
    )


def measure(args: argparse.Namespace, method: str, entry: str) -> Row:
    """Runs one entry in this process. Errors: those of `pipeline.quantize`."""
    from llm_quantize import pipeline
    from llm_quantize.console import Console

    with tempfile.TemporaryDirectory(prefix="compare-") as scratch:
        result = pipeline.quantize(settings(args, method, entry, Path(scratch) / "out"), Console(quiet=True))
        size = sum(file.stat().st_size for file in result.output.glob("*.safetensors"))
    assert result.measured is not None
    name = "torch" if entry == registry.NATIVE else registry.LIBRARIES[entry].distribution
    title = "torch " if entry == registry.NATIVE else ""
    return Row(
        method,
        entry,
        title + result.versions[name],
        sum(seconds for stage, seconds in result.seconds.items() if stage in WORK),
        result.device_bytes,
        result.host_bytes,
        size,
        result.measured.kl,
        result.measured.perplexity_quantized,
    )


def in_own_process(argv: list[str], method: str, entry: str) -> Row:
    """One entry, measured by another run of this script, so that memory and caches are its own."""
    command = [sys.executable, str(Path(__file__).resolve()), *argv, "--entry", method, entry]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return Row(**json.loads(done.stdout.splitlines()[-1]))
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return Row(method, entry, error=said[-1][:300] if said else f"ended with {done.returncode}")


def table(rows: list[Row], where: str) -> str:
    """Markdown; times as they are and over this program's, where it took part."""
    lines = [
        where,
        "",
        "| method | by | version | quantization, s | times this program's | device, GiB | host, GiB | MiB "
        "| KL divergence | perplexity |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    own = {row.method: row.seconds for row in rows if row.entry == registry.NATIVE and not row.error}
    for row in rows:
        name = TITLES.get(row.entry, row.entry)
        if row.error:
            lines.append(f"| {row.method} | {name} | | failed: {row.error} | | | | | | |")
            continue
        ratio = f"{row.seconds / own[row.method]:.1f}" if own.get(row.method) else ""
        device = f"{row.device_bytes / 2**30:.2f}" if row.device_bytes else "–"
        lines.append(
            f"| {row.method} | {name} | {row.version} | {row.seconds:.1f} | {ratio} | {device} "
            f"| {row.host_bytes / 2**30:.2f} | {row.size / 2**20:,.1f} | {row.kl:.5f} | {row.perplexity:.3f} |"
        )
    return "\n".join(lines)


def machine(device: str) -> str:
    """What it ran on."""
    import torch

    from llm_quantize.device import Device

    found = Device.pick(device)
    return f"{found.name if found.is_gpu else 'CPU'}, torch {torch.__version__}"


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=EMBEDDED_MODEL, help="default: the embedded model")
    parser.add_argument("--calib", default=str(EMBEDDED_CALIBRATION), help="default: the embedded text")
    parser.add_argument("--method", nargs="+", choices=("awq", "gptq"), default=["awq", "gptq"])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="native and libraries; default: all")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--eval_samples", type=int, default=16)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group_size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    parser.add_argument("--entry", nargs=2, metavar=("METHOD", "NAME"), help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command. Returns 1 where an entry failed."""
    words = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    args = parser.parse_args(words)
    if args.entry:
        try:
            print(json.dumps(asdict(measure(args, *args.entry))))
        except (InputError, WorkError) as error:
            print(error, file=sys.stderr)
            return 1
        return 0
    asked = [(method, name) for method in args.method for name in entries(method)]
    unknown = set(args.only or ()) - {name for _, name in asked}
    if unknown:
        parser.error(f"--only {min(unknown)}: there are {', '.join(dict.fromkeys(n for _, n in asked))}")
    rows = []
    for method, name in asked:
        if args.only and name not in args.only:
            continue
        print(f"{method} by {name} ...", file=sys.stderr, flush=True)
        rows.append(in_own_process(words, method, name))
    tokens = args.samples * args.seq_len
    where = (
        f"{machine(args.device)}; {args.model.resolve().name}, {args.bits} bits, group {args.group_size}, "
        f"{args.samples} x {args.seq_len} = {tokens:,} tokens"
    )
    print(table(rows, where))
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return int(any(row.error for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
