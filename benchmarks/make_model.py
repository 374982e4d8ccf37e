"""Makes a random model of a real shape, with a real tokenizer, to measure time and memory on.

python benchmarks/make_model.py OUT [--shape qwen2.5-7b] [--blocks N] [--dtype bfloat16] [--device auto]

The weights are normal with the usual scale, the tokenizer is the embedded model's with its vocabulary kept: only
widths, depths and the number of tokens matter for time and memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

EMBEDDED = Path(__file__).resolve().parent.parent / "inference" / "quantize" / "embedded" / "model"
SHAPES = {
    "qwen2.5-7b": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584,
        "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "vocab_size": 152064, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "tie_word_embeddings": False, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
    },
    "qwen2.5-0.5b": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 896,
        "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "vocab_size": 151936, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "tie_word_embeddings": True, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip


def make(out: Path, shape: str, blocks: int | None, dtype: torch.dtype, device: str) -> None:
    """Writes the model in shards of four blocks."""
    config = dict(SHAPES[shape])
    config["num_hidden_layers"] = blocks or config["num_hidden_layers"]
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(config, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        if (EMBEDDED / name).exists():
            shutil.copyfile(EMBEDDED / name, out / name)
    generator = torch.Generator(device).manual_seed(0)
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    kv = hidden // int(config["num_attention_heads"]) * int(config["num_key_value_heads"])
    weight_map: dict[str, str] = {}

    def normal(*size: int) -> torch.Tensor:
        scale = size[-1] ** -0.5
        return (torch.randn(*size, generator=generator, device=device) * scale).to(dtype).cpu()

    def save(number: int, tensors: dict[str, torch.Tensor]) -> None:
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, out / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    around = {"model.embed_tokens.weight": normal(int(config["vocab_size"]), hidden)}
    around["model.norm.weight"] = torch.ones(hidden, dtype=dtype)
    if not config["tie_word_embeddings"]:
        around["lm_head.weight"] = normal(int(config["vocab_size"]), hidden)
    save(0, around)
    count = int(config["num_hidden_layers"])
    for first in range(0, count, 4):
        tensors: dict[str, torch.Tensor] = {}
        for index in range(first, min(first + 4, count)):
            p = f"model.layers.{index}"
            for name, rows in (("q", hidden), ("k", kv), ("v", kv)):
                tensors[f"{p}.self_attn.{name}_proj.weight"] = normal(rows, hidden)
                tensors[f"{p}.self_attn.{name}_proj.bias"] = torch.zeros(rows, dtype=dtype)
            tensors[f"{p}.self_attn.o_proj.weight"] = normal(hidden, hidden)
            tensors[f"{p}.mlp.gate_proj.weight"] = normal(inner, hidden)
            tensors[f"{p}.mlp.up_proj.weight"] = normal(inner, hidden)
            tensors[f"{p}.mlp.down_proj.weight"] = normal(hidden, inner)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{p}.{norm}.weight"] = torch.ones(hidden, dtype=dtype)
        save(first // 4 + 1, tensors)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-7b")
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    make(args.out, args.shape, args.blocks, getattr(torch, args.dtype), args.device)
    print(f"{args.out}: {sum(f.stat().st_size for f in args.out.iterdir()) / 2**30:.2f} GiB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
