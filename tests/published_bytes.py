"""List the SHA-256 of every file that the commands publish, for each combination of options that the tests know.

    python tests/published_bytes.py [--device cpu] [--only WORD] > sums.txt

Two trees, or two commits, give the same bytes where `diff` of their lists prints nothing. The bytes depend on the
machine, the device and the versions of PyTorch and transformers: compare lists of one machine alone.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]

# method, arguments, format, bits, symmetric, group size
COMBINATIONS: list[tuple[str, str, str, int, bool, int]] = [
    ("awq", "", "awq", 4, False, 128),
    ("awq", "--zero_point false", "awq", 4, True, 128),
    ("awq", "--group_size 32", "awq", 4, False, 32),
    ("awq", "--group_size -1", "awq", 4, False, -1),
    ("awq", "--format compressed-tensors", "compressed-tensors", 4, False, 128),
    ("awq", "--format compressed-tensors --zero_point false", "compressed-tensors", 4, True, 128),
    ("awq", "--bits 8", "compressed-tensors", 8, False, 128),
    ("awq", "--bits 8 --zero_point no --group_size -1", "compressed-tensors", 8, True, -1),
    ("awq", "--bits 8 --format gptq --group_size 32", "gptq", 8, False, 32),
    ("awq", "--quality best", "awq", 4, False, 128),
    ("gptq", "", "gptq", 4, True, 128),
    ("gptq", "--desc_act false", "gptq", 4, True, 128),
    ("gptq", "--group_size 32", "gptq", 4, True, 32),
    ("gptq", "--group_size -1", "gptq", 4, True, -1),
    ("gptq", "--group_size 256 --quality best", "gptq", 4, True, 256),
    ("gptq", "--sym false", "compressed-tensors", 4, False, 128),
    ("gptq", "--sym false --format gptq", "gptq", 4, False, 128),
    ("gptq", "--sym false --format awq", "awq", 4, False, 128),
    ("gptq", "--format compressed-tensors", "compressed-tensors", 4, True, 128),
    ("gptq", "--bits 8", "gptq", 8, True, 128),
    ("gptq", "--bits 8 --sym false", "compressed-tensors", 8, False, 128),
    ("gptq", "--bits 3", "compressed-tensors", 3, True, 128),
    ("gptq", "--bits 3 --format gptq --sym false --group_size 64", "gptq", 3, False, 64),
    ("gptq", "--bits 2 --group_size 32", "compressed-tensors", 2, True, 32),
    ("gptq", "--bits 2 --format gptq --group_size -1", "gptq", 2, True, -1),
    ("gptq", "--bits 3 --sym false --group_size 64 --quality best", "compressed-tensors", 3, False, 64),
    ("gptq", "--bits 2 --act_order_groups dynamic --quality best", "gptq", 2, True, 128),
    ("gptq", "--act_order_groups dynamic", "gptq", 4, True, 128),
    ("gptq", "--act_order_groups dynamic --bits 3 --sym false --group_size 32", "gptq", 3, False, 32),
    ("gptq", "--act_order_groups dynamic --group_size -1 --quality fast", "gptq", 4, True, -1),
]


def sums(directory: Path) -> dict[str, str]:
    """Return the SHA-256 in hex of each file below `directory`, by its path in it."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> int:
    """Run the command. Returns 1 where a run failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="runs whose title holds this word")
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT / "inference" / "quantize"), str(ROOT / "tests")]
    import awq_quantize
    import gptq_quantize

    commands = {"awq": awq_quantize.main, "gptq": gptq_quantize.main}
    text = ROOT / "inference" / "quantize" / "embedded" / "calibration.txt"
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        jobs = [(f"{method} {words}".strip(), method, words.split()) for method, words, *_ in COMBINATIONS]
        if args.only in "families":
            import torch

            from models import FAMILIES, write

            for family, config in FAMILIES.items():
                source = write(Path(scratch) / family, config(), dtype=torch.bfloat16)
                for method in commands:
                    more = f"--model_path {source} --group_size 32 --bits 8 --calib_data {text}".split()
                    jobs.append((f"families {family} {method}", method, more))
        for number, (title, method, words) in enumerate(job for job in jobs if args.only in job[0]):
            target = Path(scratch) / f"out-{number}"
            small = ["--calib_samples", "16", "--calib_seq_len", "128", "--eval_data", "off"]
            if commands[method](
                [*words, *small, "--device", args.device, "--quiet", "--output_path", str(target)]
            ):
                failed = 1
                print(f"{title}: FAILED", flush=True)
                continue
            for name, digest in sums(target).items():
                print(f"{title}: {name} {digest}", flush=True)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
