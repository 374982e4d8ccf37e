"""Checkpoints for the tests of serving: correct configs and headers, whose weights are zeros."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reference import quantization_config

Shapes = dict[str, tuple[int, int]]

SHAPES: Shapes = {  # (out, in)
    "self_attn.q_proj": (256, 256),
    "self_attn.k_proj": (128, 256),
    "self_attn.v_proj": (128, 256),
    "self_attn.o_proj": (256, 256),
    "mlp.gate_proj": (512, 256),
    "mlp.up_proj": (512, 256),
    "mlp.down_proj": (256, 512),
}
MODEL = {"model_type": "qwen2", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256}


@dataclass
class FakeCheckpoint:
    """A checkpoint with a correct config and correct headers, whose weights are zeros."""

    method: str = "awq"
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    act_order: bool = False
    shapes: Shapes = field(default_factory=lambda: dict(SHAPES))
    unquantized: tuple[str, ...] = ()  # linears whose weights stay in float16
    overrides: dict[str, Any] = field(default_factory=dict)  # of the quantization settings
    g_idx: Callable[[int, int], list[int]] | None = None  # from inputs and group size; None: trivial

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
        """Return the tensors of its one block by name: dtype, shape and bytes."""
        tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {}

        def zeros(name: str, dtype: str, *shape: int) -> None:
            size = {"F16": 2, "I32": 4, "I64": 8}[dtype]
            for n in shape:
                size *= n
            tensors[name] = (dtype, shape, bytes(size))

        for layer, (out, width) in self.shapes.items():
            name = f"model.layers.0.{layer}"
            group_size = width if self.group_size == -1 else self.group_size
            groups = -(-width // group_size)
            if layer in self.unquantized:
                zeros(f"{name}.weight", "F16", out, width)
            elif self.method == "awq":
                zeros(f"{name}.qweight", "I32", width, out * self.bits // 32)
                zeros(f"{name}.qzeros", "I32", groups, out * self.bits // 32)
                zeros(f"{name}.scales", "F16", groups, out)
            elif self.method == "gptq":
                zeros(f"{name}.qweight", "I32", width * self.bits // 32, out)
                zeros(f"{name}.qzeros", "I32", groups, out * self.bits // 32)
                zeros(f"{name}.scales", "F16", groups, out)
                indices = [i // group_size for i in range(width)]
                if self.g_idx is not None:
                    indices = self.g_idx(width, group_size)
                tensors[f"{name}.g_idx"] = ("I32", (width,), struct.pack(f"<{width}i", *indices))
            else:
                zeros(f"{name}.weight_packed", "I32", out, -(-width * self.bits // 32))
                zeros(f"{name}.weight_scale", "F16", out, groups)
                tensors[f"{name}.weight_shape"] = ("I64", (2,), struct.pack("<2q", out, width))
        return tensors

    def settings(self) -> dict[str, Any]:
        settings = quantization_config(
            self.method, self.bits, self.group_size, self.symmetric, self.act_order
        )
        return settings | self.overrides

    def write(self, directory: Path, *, nested: bool = False, in_config: bool = True) -> Path:
        """Write it into the new `directory`, which is returned.

        The quantization settings are in `config.json`; `nested`: in its `text_config`; not `in_config`: in a side
        file alone.
        """
        directory.mkdir(parents=True)
        config: dict[str, Any] = dict(MODEL)
        if nested:
            config = {
                "model_type": "gemma3",
                "text_config": config | {"quantization_config": self.settings()},
            }
        elif in_config:
            config["quantization_config"] = self.settings()
        else:
            name = {"awq": "quant_config.json", "gptq": "quantize_config.json"}[self.method]
            (directory / name).write_text(json.dumps(self.settings()))
        (directory / "config.json").write_text(json.dumps(config))
        write_safetensors(directory / "model.safetensors", self.tensors())
        return directory


def write_safetensors(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(d for _, _, d in tensors.values()))


def write_unquantized(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(MODEL))
    write_safetensors(
        directory / "model.safetensors", {"model.layers.0.mlp.up_proj.weight": ("F16", (32, 32), bytes(2048))}
    )
    return directory


Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]
DTYPE_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "I32": 4, "I64": 8}


def zeros(dtype: str, *shape: int) -> tuple[str, tuple[int, ...], bytes]:
    """Return a tensor of zeros: dtype, shape and bytes."""
    size = DTYPE_BYTES[dtype]
    for n in shape:
        size *= n
    return dtype, shape, bytes(size)


@dataclass
class WholeModel:
    """A Llama of two blocks with all its tensors; a test changes `config` and `tensors` before it writes them."""

    config: dict[str, Any]
    tensors: Tensors

    @property
    def settings(self) -> dict[str, Any]:
        """The quantization settings, to be changed in place."""
        settings: dict[str, Any] = self.config["quantization_config"]
        return settings

    def write(self, directory: Path) -> Path:
        """Write `config.json` and `model.safetensors` into `directory`, which is returned."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.config))
        write_safetensors(directory / "model.safetensors", self.tensors)
        return directory


def whole_model(method: str = "awq", blocks: int = 2, **fields: Any) -> WholeModel:
    """Return a model whose linears `method` stores; `fields` are those of `FakeCheckpoint`."""
    checkpoint = FakeCheckpoint(method=method, **fields)
    tensors: Tensors = {"model.embed_tokens.weight": zeros("F16", 64, 256)}
    for block in range(blocks):
        prefix = f"model.layers.{block}."
        one = checkpoint.tensors()
        tensors.update({name.replace("model.layers.0.", prefix): tensor for name, tensor in one.items()})
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = zeros("F16", 256)
    tensors["model.norm.weight"] = zeros("F16", 256)
    tensors["lm_head.weight"] = zeros("F16", 64, 256)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "vocab_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_hidden_layers": blocks,
        "tie_word_embeddings": False,
        "quantization_config": checkpoint.settings(),
    }
    return WholeModel(config, tensors)
