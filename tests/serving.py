"""What the serving tests share: checkpoints to serve, what they should answer, and a server's life.

`make_checkpoint` writes a directory, `reference_model` turns any such directory into the plain float32 model
that it stands for. The bit layouts are read here by loops of their own, which know nothing of the packing
code under test.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config
from transformers.modeling_utils import PreTrainedModel

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "run_vllm.sh"

Kind = Literal["awq", "gptq", "compressed-tensors"]
Ints = NDArray[np.int64]

BITS = 4
GROUP_SIZE: dict[Kind, int] = {"awq": 128, "gptq": 32, "compressed-tensors": 64}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
VOCABULARY = 512


# ------------------------------------------------------------------------------------------------ bit layouts


def to_words(values: Ints, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """4-bit `values` (rows, columns) -> int32 (rows, columns/8); slot k of word c holds column 8c + order[k]."""
    words = np.zeros((values.shape[0], values.shape[1] // 8), dtype=np.uint32)
    for c in range(words.shape[1]):
        for k in range(8):
            words[:, c] |= values[:, 8 * c + order[k]].astype(np.uint32) << np.uint32(4 * k)
    return torch.from_numpy(words.view(np.int32))


def from_words(words: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> Ints:
    """The inverse of `to_words`."""
    raw = words.numpy().view(np.uint32)
    values = np.zeros((raw.shape[0], raw.shape[1] * 8), dtype=np.int64)
    for c in range(raw.shape[1]):
        for k in range(8):
            values[:, 8 * c + order[k]] = (raw[:, c] >> np.uint32(4 * k)) & np.uint32(15)
    return values


def round_to_nearest(weight: torch.Tensor, group: int, symmetric: bool) -> tuple[Ints, Ints, torch.Tensor]:
    """`weight` (out, in) -> integers 0…15 (out, in), zero points (out, G), float16 scales (out, G)."""
    out, width = weight.shape
    rows = weight.float().reshape(out, width // group, group)
    if symmetric:
        scales = (rows.abs().amax(-1) / 7.5).half()
        zeros = torch.full_like(scales, 8.0)
    else:
        low, high = rows.amin(-1).clamp(max=0), rows.amax(-1).clamp(min=0)
        scales = ((high - low) / 15).half()
        zeros = (-low / scales.float()).round().clamp(0, 15)
    levels = (rows / scales.float()[..., None] + zeros.float()[..., None]).round().clamp(0, 15)
    return (
        levels.reshape(out, width).numpy().astype(np.int64),
        zeros.float().numpy().astype(np.int64),
        scales,
    )


def encode(kind: Kind, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors that stand for the linear `weight` (out, in) in a checkpoint of this kind."""
    group = GROUP_SIZE[kind]
    q, z, s = round_to_nearest(weight, group, symmetric=kind == "gptq")
    if kind == "awq":
        return {
            "qweight": to_words(q.T, AWQ_ORDER),
            "qzeros": to_words(z.T, AWQ_ORDER),
            "scales": s.T.contiguous(),
        }
    if kind == "gptq":
        return {
            "qweight": to_words(q).T.contiguous(),
            "qzeros": to_words(z.T - 1),
            "scales": s.T.contiguous(),
            "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // group,
        }
    return {
        "weight_packed": to_words(q),
        "weight_zero_point": to_words(z.T).T.contiguous(),
        "weight_scale": s,
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }


def decode(kind: Kind, part: dict[str, torch.Tensor]) -> torch.Tensor:
    """The float32 weight (out, in) that a linear's 4-bit tensors stand for: (q - z) s, group by group."""
    if kind == "awq":
        q, z = from_words(part["qweight"], AWQ_ORDER).T, from_words(part["qzeros"], AWQ_ORDER).T
        s = part["scales"].T
    elif kind == "gptq":
        q, z = from_words(part["qweight"].T.contiguous()), (from_words(part["qzeros"]).T + 1) % 16
        s = part["scales"].T
    else:
        q, s = from_words(part["weight_packed"]), part["weight_scale"]
        z = np.full(s.shape, 8)
        if "weight_zero_point" in part:
            z = from_words(part["weight_zero_point"].T.contiguous()).T
    groups = np.arange(q.shape[1]) // (q.shape[1] // s.shape[1])
    if "g_idx" in part:
        groups = part["g_idx"].numpy()
    return torch.from_numpy((q - z[:, groups]).astype(np.float32)) * s.float()[:, groups]


# ------------------------------------------------------------------------------------------------ checkpoints


def quantization_config(kind: Kind) -> dict[str, Any]:
    group = GROUP_SIZE[kind]
    if kind == "awq":
        return {
            "quant_method": "awq",
            "bits": BITS,
            "group_size": group,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ["lm_head"],
        }
    if kind == "gptq":
        return {
            "quant_method": "gptq",
            "bits": BITS,
            "group_size": group,
            "desc_act": False,
            "sym": True,
            "damp_percent": 0.1,
            "lm_head": False,
            "checkpoint_format": "gptq",
        }
    weights = {
        "num_bits": BITS,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": group,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


def make_checkpoint(kind: Kind, out_dir: Path) -> Path:
    """A small Qwen2 with random weights, rounded to the nearest 4-bit values, in the layout `kind`.

    Its weights are large enough that the next token is seldom a tie.
    """
    torch.manual_seed(7)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.08,
        bos_token_id=0,
        eos_token_id=0,
        dtype="float16",
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        layer, _, leaf = name.rpartition(".")
        if layer.endswith("_proj") and leaf == "weight":
            tensors.update({f"{layer}.{key}": value for key, value in encode(kind, tensor).items()})
        else:
            tensors[name] = tensor.half()
    out_dir.mkdir(parents=True)
    save_file(tensors, out_dir / "model.safetensors", metadata={"format": "pt"})
    written = {**config.to_dict(), "architectures": ["Qwen2ForCausalLM"]}
    written["quantization_config"] = quantization_config(kind)
    (out_dir / "config.json").write_text(json.dumps(written, indent=2))
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0").save_pretrained(out_dir)
    return out_dir


def reference_model(directory: Path) -> PreTrainedModel:
    """The float32 model that the 4-bit checkpoint in `directory` stands for, weights de-quantized here."""
    config = AutoConfig.from_pretrained(directory)
    kind: Kind = config.quantization_config["quant_method"]
    del config.quantization_config
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(directory.glob("*.safetensors")):
        tensors.update(load_file(shard))
    mark = "weight_packed" if kind == "compressed-tensors" else "qweight"
    for layer in [name.removesuffix(f".{mark}") for name in tensors if name.endswith(f".{mark}")]:
        keys = (mark, "qzeros", "scales", "g_idx", "weight_scale", "weight_zero_point", "weight_shape")
        part = {key: tensors.pop(f"{layer}.{key}") for key in keys if f"{layer}.{key}" in tensors}
        tensors[f"{layer}.weight"] = decode(kind, part)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict({k: v.float() for k, v in tensors.items()}, strict=False)
    assert not unexpected, unexpected
    assert not [name for name in missing if not (config.tie_word_embeddings and name == "lm_head.weight")]
    model.tie_weights()
    return model.eval()


# --------------------------------------------------------------------------------------------------- a server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A running `run_vllm.sh`, asked over HTTP on loopback."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log

    def get(self, path: str) -> int:
        """The HTTP status of `path`; 0 where nothing answers yet."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                result: dict[str, Any] = json.load(answer)
                return result
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.code} {error.read().decode()[:500]}") from error

    def wait_until_healthy(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self.get("/health") != 200:
            tail = self.log.read_text(errors="replace")[-3000:]
            assert self.process.poll() is None, f"the server ended with {self.process.returncode}:\n{tail}"
            assert time.monotonic() < end, f"the server is not healthy after {seconds:.0f} s:\n{tail}"
            time.sleep(0.25)

    def stop(self) -> int:
        """Ends the server as Ctrl-C or a service manager would, then by force; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                pass
        try:  # whatever of its process group is left, on every way out
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        return self.process.wait(10)


@contextmanager
def running(model: str, cwd: Path, log: Path, *arguments: str) -> Iterator[Server]:
    """`run_vllm.sh model` from the directory `cwd`, on a free port, as the leader of a process group."""
    port = free_port()
    # Nothing here may depend on a server that happens to be installed, nor talk to anyone.
    ours = {"LLM_QUANTIZE_DEVICE": "cpu", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    environment = {**{k: v for k, v in os.environ.items() if k != "VLLM"}, **ours}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(SCRIPT), model, "--port", str(port), *arguments],
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        server = Server(process, port, log)
        try:
            yield server
        finally:
            server.stop()
