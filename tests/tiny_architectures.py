"""A tiny random model of every architecture in transformers' causal mapping.

The defaults of each config are cut down by name: widths, heads, layers, experts, vocabulary.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

LAYERS, WIDTH, HEADS, VOCABULARY = 2, 64, 4, 2048
MOST_PARAMETERS = 40_000_000

# What a config calls its sizes. A name that a config lacks is passed over.
_SIZES: dict[str, Any] = {
    # widths
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "emb_dim", "model_dim", "width",
         "word_embed_proj_dim", "attention_hidden_size", "hidden_dim", "encoder_hidden_size", "decoder_hidden_size",
         "encoder_dim", "decoder_dim", "d_embed", "lm_hidden_size", "lru_width", "hidden_size_per_layer_input"), WIDTH),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "inner_dim", "decoder_ffn_dim", "encoder_ffn_dim",
         "dim_ff", "feed_forward_size", "ffn_hidden_size", "mlp_dim", "intermediate_size_mlp", "d_inner",
         "shared_intermediate_size", "dense_intermediate_size", "block_ff_dim"), 2 * WIDTH),
    **dict.fromkeys(
        ("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size",
         "moe_shared_expert_intermediate_size", "expert_feed_forward_length", "expert_intermediate_size",
         "moe_ffn_hidden_size"), WIDTH),
    # heads
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
         "encoder_attention_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "n_head_kv", "num_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(
        ("head_dim", "d_kv", "kv_channels", "attention_head_dim", "global_head_dim", "swa_head_dim", "v_head_dim",
         "qk_nope_head_dim", "linear_key_head_dim", "linear_value_head_dim", "dim_head", "head_size"), WIDTH // HEADS),
    "qk_rope_head_dim": 8, "qk_head_dim": 24, "rotary_dim": 8, "index_head_dim": 16, "index_n_heads": 2,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "q_rank", "kv_rank"), 32),
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "num_ssm_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_d_ssm", "mamba_intermediate_size"), 128),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_num_groups"), 1),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 16),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 8),
    # depth
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "depth",
         "num_encoder_layers", "num_decoder_layers"), LAYERS),
    "num_kv_shared_layers": 0,
    # experts
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_layer"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_group_moe"), 1),
    "first_k_dense_replace": 1, "num_nextn_predict_layers": 0, "n_shared_experts": 1,
    # tokens and positions
    **dict.fromkeys(
        ("vocab_size", "n_vocab", "vocab_size_per_layer_input", "n_tokens", "encoder_vocab_size"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 512),
    **dict.fromkeys(("sliding_window", "attention_window", "window_size", "local_attention_window"), 64),
    **dict.fromkeys(("pad_token_id", "image_token_id", "image_token_index", "audio_token_id"), 0),
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id"), 1),
    **dict.fromkeys(("eos_token_id", "sep_token_id"), 2),
    # towers
    "image_size": 32, "patch_size": 16, "num_mel_bins": 16, "max_source_positions": 64,
}  # fmt: skip

# What has to be said of one architecture.
_OWN: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"layer_types": ["full_attention", "full_attention"]},
    "reformer": {"is_decoder": True},
}


def tiny_config(model_type: str) -> Any:
    """The config of `model_type`, cut down. Raises whatever transformers raises."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind: Any = CONFIG_MAPPING[model_type]
    values = _cut(kind().to_dict())
    for key in ("model_type", "transformers_version", "architectures", "auto_map", "_name_or_path"):
        values.pop(key, None)
    values |= _OWN.get(model_type, {})
    try:
        return kind(**values)
    except Exception:
        config = kind()
        for key, value in values.items():
            if not isinstance(value, dict):
                setattr(config, key, value)
        return config


def _cut(values: dict[str, Any]) -> dict[str, Any]:
    """Every size of a config as a dictionary, and of the configs inside it, made small."""
    cut = deepcopy(values)
    layers = {
        values[key]
        for key in ("num_hidden_layers", "n_layer", "num_layers")
        if isinstance(values.get(key), int)
    }
    for key, value in values.items():
        if isinstance(value, dict):
            cut[key] = _cut(value)
        elif isinstance(value, list) and (
            len(value) in layers or key in ("layer_types", "layers_block_type")
        ):
            cut[key] = value[:LAYERS]
        elif (key in ("head_dim", "num_key_value_heads") and value is None) or (
            key in _SIZES and isinstance(value, (int, list)) and not isinstance(value, bool) and value != 0
        ):
            cut[key] = _SIZES[key]
    return cut


def tiny_model(model_type: str, seed: int = 0) -> Any:
    """A causal LM of `model_type` with random weights. Raises ValueError where it is not tiny."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    make: Any = AutoModelForCausalLM.from_config
    config = tiny_config(model_type)
    with init_empty_weights(include_buffers=False):
        empty = make(config)
    count = sum(parameter.numel() for parameter in empty.parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count / 1e6:.0f} million parameters")
    torch.manual_seed(seed)
    return make(config)
