"""This program alone at a 7B shape: where its time and its memory go, all cases in one run.

python benchmarks/stages.py [--only CASE ...] [--model DIR] [--samples N --seq_len N] [--runs N] [--device auto]
    [--json OUT]

Without --model, models of Qwen2.5-7B's shape are made, of four blocks and of 28, with random weights; the text is the
embedded calibration text's, over and over. Every case has a process of its own, whose first run finds the kernels that
cases before it compiled. `alone` is what passes and solvers take: embedding, capture, solving, replay. `loop` is the
loop over blocks but for loading and packing, so it also has what looks at a block before it is worked on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
QUANTIZE = HERE.parent / "inference" / "quantize"
sys.path.insert(0, str(QUANTIZE))

ALONE = ("embed", "capture", "solve", "replay")


@dataclass(frozen=True, slots=True)
class Case:
    """blocks: of the model, None for all of them; samples, seq_len: None for the defaults; runs: in one process."""

    method: str
    blocks: int | None
    samples: int | None = None
    seq_len: int | None = None
    words: tuple[str, ...] = ("--eval_data", "off")
    runs: int = 1


CASES = {
    "awq": Case("awq", 4, 128, 512, runs=5),
    "gptq": Case("gptq", 4, 256, 2048, runs=3),
    "gptq-more": Case("gptq", 4),
    "gptq-more-6gib": Case("gptq", 4, words=("--eval_data", "off", "--max_memory", "6")),
    "awq-whole": Case("awq", None, words=("--eval_samples", "8")),
    "gptq-whole": Case("gptq", None, words=("--eval_samples", "8")),
}


@dataclass(slots=True)
class Measured:
    """One case. runs: for each its stages' seconds, and those of `loop` and `run`, and `device_bytes`; seconds: of the
    whole process; host_bytes: its own memory at most, without mapped files, by samples a tenth of a second apart."""

    case: str
    runs: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    host_bytes: int = 0


def run_here(method: str, words: list[str], runs: int) -> None:
    """Runs the command in this process, and tells of each run in a line of JSON."""
    from llm_quantize import cli, pipeline

    quantize_blocks, quantize = pipeline.quantize_blocks, pipeline.quantize
    told: dict[str, Any] = {}

    def blocks(*args: Any) -> None:
        started = time.perf_counter()
        quantize_blocks(*args)
        told["loop"] = time.perf_counter() - started

    def whole(*args: Any) -> pipeline.Result:
        started = time.perf_counter()
        result = quantize(*args)
        told["run"] = time.perf_counter() - started
        told["stages"], told["device_bytes"] = result.seconds, result.device_bytes
        return result

    vars(pipeline).update(quantize_blocks=blocks, quantize=whole)
    for _ in range(runs):
        code = cli.run("awq" if method == "awq" else "gptq", words)
        if code:
            raise SystemExit(code)
        told["loop"] -= sum(told["stages"].get(stage, 0.0) for stage in ("load", "pack"))
        print(json.dumps(told), file=sys.stderr, flush=True)


def measure(name: str, method: str, words: list[str], runs: int) -> Measured:
    """Runs a case in a process of its own. Errors: `SystemExit` with what it said."""
    command = [sys.executable, __file__, "--here", json.dumps([method, words, runs])]
    found = Measured(name)
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as told:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=told)
        while child.poll() is None:
            found.host_bytes = max(found.host_bytes, _own_memory(child.pid))
            time.sleep(0.1)
        found.seconds = time.perf_counter() - started
        told.seek(0)
        lines = told.read().splitlines()
    if child.returncode:
        raise SystemExit(f"{name}: {' '.join(lines[-3:])}")
    found.runs = [json.loads(line) for line in lines if line.startswith("{")]
    return found


def _own_memory(pid: int) -> int:
    """Bytes that a process holds in memory beside mapped files; 0 where that is not told."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    wanted = ("RssAnon:", "RssShmem:")
    return sum(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith(wanted))


def table(found: list[Measured]) -> str:
    """Markdown."""
    lines = [
        "| case | alone, s | loop, s | embedding, capture, solving, replay of the fastest | run, s | process, s "
        "| device | host |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in found:
        alone = [sum(run["stages"].get(stage, 0.0) for stage in ALONE) for run in each.runs]
        best = each.runs[alone.index(min(alone))]
        parts = ", ".join(f"{best['stages'].get(stage, 0.0):.2f}" for stage in ALONE)
        lines.append(
            f"| {each.case} | {_all(alone)} | {_all([run['loop'] for run in each.runs])} | {parts} "
            f"| {_all([run['run'] for run in each.runs])} | {each.seconds:.1f} "
            f"| {max(run['device_bytes'] for run in each.runs) / 2**30:.2f} GiB "
            f"| {each.host_bytes / 2**30:.2f} GiB |"
        )
    return "\n".join(lines)


def _all(seconds: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in seconds)


def text(path: Path, tokens: int) -> None:
    """Enough of the embedded text, from one end to the other and again, for so many tokens."""
    from llm_quantize.io.embedded_files import EMBEDDED_CALIBRATION

    words = Path(EMBEDDED_CALIBRATION).read_text(encoding="utf-8").split()
    step, at = 400, 0
    with path.open("w", encoding="utf-8") as file:
        for _ in range(2 * tokens // step + 1):
            file.write(json.dumps({"text": " ".join(words[at : at + step])}) + "\n")
            # Not in step with the text: no document twice for a long time.
            at = (at + 389) % (len(words) - step)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--model", type=Path, help="for all cases, whatever its blocks")
    parser.add_argument("--samples", type=int, help="for all cases")
    parser.add_argument("--seq_len", type=int, help="for all cases")
    parser.add_argument("--runs", type=int, help="for all cases")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--here", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        run_here(*json.loads(args.here))
        return 0
    found: list[Measured] = []
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        text(root / "text.jsonl", (args.samples or 1024) * (args.seq_len or 2048))
        for name in args.only:
            case = CASES[name]
            model = args.model or root / f"blocks-{case.blocks}"
            if args.model is None and not model.exists():
                few = [] if case.blocks is None else ["--blocks", str(case.blocks)]
                subprocess.run([sys.executable, str(HERE / "make_model.py"), str(model), *few], check=True)
            samples, length = args.samples or case.samples, args.seq_len or case.seq_len
            words = ["--model_path", str(model), "--output_path", str(root / "out"), "--overwrite", "--quiet"]
            words += ["--calib_data", str(root / "text.jsonl"), "--device", args.device, *case.words]
            words += [] if samples is None else ["--calib_samples", str(samples)]
            words += [] if length is None else ["--calib_seq_len", str(length)]
            found.append(measure(name, case.method, words, args.runs or case.runs))
            print(table(found[-1:]).splitlines()[-1], flush=True)
    print(f"\n{table(found)}")
    if args.json:
        rows = [{"case": f.case, "runs": f.runs, "seconds": f.seconds, "host": f.host_bytes} for f in found]
        args.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
