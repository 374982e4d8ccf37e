"""A few words by a saved checkpoint, to show that it speaks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llm_quantize.checkpoint.reader import QuantizedStore
from llm_quantize.errors import WorkError
from llm_quantize.model.weight_map import WeightMap


def sample(
    quantized: Path, tokenizer: Any, device: torch.device, prompt: str, max_new_tokens: int = 40
) -> str:
    """Continue `prompt` greedily by the saved checkpoint, which is held in memory as a whole.

    For small models. Raises WorkError where tensors are missing or left over.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    store = QuantizedStore(quantized)
    config = AutoConfig.from_pretrained(quantized, trust_remote_code=False)
    del config.quantization_config
    dtype = torch.float32 if device.type == "cpu" else config.dtype or torch.float16
    build: Any = AutoModelForCausalLM.from_config
    model = build(config, dtype=dtype)
    weights = WeightMap(model, store.files)
    # AutoGPTQ's files hold biases of zeros for linears that have none.
    biases = {f"{linear}.bias" for linear in store.linears}
    unexpected = [n for n in weights.unused if not (n in biases and not bool(store.read(n).any()))]
    if weights.missing or unexpected:
        raise WorkError(f"{quantized}: tensor {min([*weights.missing, *unexpected])} is missing or left over")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.read(name, store.read))
    model.to(device).eval()
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=device)
    end = tokenizer.eos_token_id
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end,
        )
    text: str = tokenizer.decode(out[0], skip_special_tokens=True)
    return text
