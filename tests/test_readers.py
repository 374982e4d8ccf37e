"""Read what the scripts write by the libraries that users have, each in an environment of its own.

The logits must be those of the de-quantized weights in plain PyTorch, by an unpacker that shares no code with ours.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import awq_quantize
import gptq_quantize
from reference import plain_model

pytestmark = [pytest.mark.readers, pytest.mark.timeout(1200)]
READERS = Path(__file__).parent / "readers"
TOLERANCE = 0.05  # float16 there against float32 here; logits are of order 10

CHECKPOINTS = {
    "awq-128": (awq_quantize, []),
    "awq-32-symmetric": (awq_quantize, ["--group_size", "32", "--zero_point", "false"]),
    "gptq-4": (gptq_quantize, ["--format", "gptq"]),
    "gptq-4-row": (gptq_quantize, ["--group_size", "-1", "--format", "gptq"]),
    "gptq-4-dynamic": (gptq_quantize, ["--act_order_groups", "dynamic", "--format", "gptq"]),
    "auto-gptq-4": (gptq_quantize, []),
    "gptq-4-asymmetric": (gptq_quantize, ["--sym", "false", "--format", "gptq"]),
    "gptq-2": (gptq_quantize, ["--bits", "2", "--format", "gptq"]),
    "gptq-3": (gptq_quantize, ["--bits", "3", "--format", "gptq"]),
    "gptq-8": (gptq_quantize, ["--bits", "8", "--format", "gptq"]),
    "packed-4": (gptq_quantize, ["--format", "compressed-tensors"]),
    "packed-3": (gptq_quantize, ["--bits", "3"]),
    "packed-2": (gptq_quantize, ["--bits", "2"]),
    "packed-8-awq": (awq_quantize, ["--bits", "8"]),
    "packed-4-asymmetric": (gptq_quantize, ["--sym", "false"]),
}
READS = {
    "read_autoawq.py": [name for name in CHECKPOINTS if name.startswith("awq")],
    "read_autogptq.py": [name for name in CHECKPOINTS if name.startswith("gptq")],
    "read_transformers.py": [
        "awq-128",
        "gptq-4",
        "auto-gptq-4",
        "gptq-4-dynamic",
        "gptq-3",
        "gptq-8",
        "packed-4",
        "packed-3",
        "packed-2",
        "packed-8-awq",
        "packed-4-asymmetric",
    ],
}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    quick = [
        "--calib_samples",
        "8",
        "--calib_seq_len",
        "128",
        "--eval_data",
        "off",
        "--quality",
        "fast",
        "--quiet",
    ]
    for name, (script, arguments) in CHECKPOINTS.items():
        assert script.main([*arguments, *quick, "--output_path", str(root / name)]) == 0
    save_file({"ids": torch.arange(3, 2003, 40).reshape(2, 25)}, root / "ids.safetensors")
    return root


@pytest.mark.parametrize("reader", READS)
def test_reader_sees_the_dequantized_weights(reader: str, checkpoints: Path, tmp_path: Path) -> None:
    names = READS[reader]
    command = [
        "uv",
        "run",
        "--quiet",
        "--script",
        str(READERS / reader),
        str(checkpoints / "ids.safetensors"),
        str(tmp_path),
    ]
    env = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    done = subprocess.run(
        [*command, *(str(checkpoints / name) for name in names)],
        env=env, capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ids = load_file(checkpoints / "ids.safetensors")["ids"]
    for name in names:
        with torch.no_grad():
            expected = plain_model(checkpoints / name)(ids).logits.float()
        found = load_file(tmp_path / f"{name}.safetensors")["logits"]
        assert float((found - expected).abs().max()) < TOLERANCE, name


def test_the_comparison_notices_one_wrong_zero_point(checkpoints: Path, tmp_path: Path) -> None:
    """Flipping the top bit of one stored zero point changes the logits by more than a reader may."""
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoints / "gptq-4", damaged)
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.0.mlp.gate_proj.qzeros"][0, 0] ^= 8
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    ids = load_file(checkpoints / "ids.safetensors")["ids"]
    with torch.no_grad():
        intact, wrong = (plain_model(d)(ids).logits.float() for d in (checkpoints / "gptq-4", damaged))
    assert float((intact - wrong).abs().max()) > TOLERANCE
