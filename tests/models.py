"""Small random models of the families that users quantize, in memory and on disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from llm_quantize.io.embedded_files import EMBEDDED_MODEL

VOCABULARY = 2048  # the embedded tokenizer's
CPU = torch.device("cpu")


def _shape(**more: Any) -> dict[str, Any]:
    # Weights this large make a random block do something to its states.
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    } | more


# Head sizes beside hidden_size / heads, window sizes below the length of the tests' windows, tied and untied.
FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_shape(num_key_value_heads=4)),
    "llama_gqa": lambda: LlamaConfig(**_shape(attention_bias=True, mlp_bias=True)),
    "qwen2": lambda: Qwen2Config(**_shape(tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3Config(**_shape(head_dim=32)),
    "mistral": lambda: MistralConfig(**_shape(sliding_window=8)),
    "phi3": lambda: Phi3Config(**_shape()),
    "gemma2": lambda: Gemma2Config(
        **_shape(head_dim=32, sliding_window=8, query_pre_attn_scalar=32, tie_word_embeddings=True)
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **_shape(
            head_dim=32,
            sliding_window=8,
            query_pre_attn_scalar=32,
            tie_word_embeddings=True,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**_shape(use_parallel_residual=True)),
    "gpt_neox_serial": lambda: GPTNeoXConfig(**_shape(use_parallel_residual=False)),
}


def build(config: PretrainedConfig, *, seed: int = 0, attention: str = "eager") -> Any:
    """A random float32 model; norms and biases differ from one and zero, as after training."""
    torch.manual_seed(seed)
    make: Any = AutoModelForCausalLM.from_config
    model = make(config, dtype=torch.float32, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def write(
    directory: Path,
    config: PretrainedConfig,
    *,
    dtype: torch.dtype = torch.float32,
    shard: str = "5GB",
    tokenizer: bool = True,
) -> Path:
    """Saves a random model of `config`, with the embedded model's tokenizer, and returns the directory."""
    build(config).to(dtype).save_pretrained(directory, max_shard_size=shard)
    if tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(EMBEDDED_MODEL / name, directory)
    return directory


def tokens(windows: int = 3, length: int = 24, seed: int = 1) -> torch.Tensor:
    """int64 (windows, length)."""
    return torch.randint(3, VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(seed))


def random_hessian(width: int, samples: int, seed: int = 0) -> torch.Tensor:
    """`H` (width, width) of correlated inputs whose channels differ much in size, float32."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=g) / width**0.5 + torch.eye(width)
    size = torch.exp(torch.randn(width, generator=g))
    x: torch.Tensor = torch.randn(samples, width, generator=g) @ mix * size
    H: torch.Tensor = x.T @ x / samples
    return H


def weights(out: int, width: int, seed: int = 0) -> torch.Tensor:
    """Random weights (out, width), float32."""
    return torch.randn(out, width, generator=torch.Generator().manual_seed(100 + seed)) * 0.1
