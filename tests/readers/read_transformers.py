# /// script
# requires-python = "==3.11.*"
# dependencies = [
#     "transformers==5.24.0", "torch==2.15.0", "gptqmodel==7.7.0", "optimum==2.3.0", "compressed-tensors==0.20.0",
# ]
# ///
"""Logits of checkpoints as transformers reads them: read_transformers.py IDS.safetensors OUT DIRECTORY ..."""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it fails with one
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling takes longer than these few tokens
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AwqConfig, CompressedTensorsConfig, GPTQConfig

ids = load_file(sys.argv[1])["ids"]
for directory in sys.argv[3:]:
    stored = json.loads((Path(directory) / "config.json").read_text())["quantization_config"]
    extra = {}
    if stored["quant_method"] == "compressed-tensors":
        # Left compressed, asymmetric files are refused: compressed-tensors 0.20 expects their zero points unpacked.
        extra["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    if not torch.cuda.is_available():
        # GPTQModel picks Triton kernels wherever Triton imports, GPU or not: its PyTorch ones have to be named.
        if stored["quant_method"] == "gptq":
            extra["quantization_config"] = GPTQConfig(bits=stored["bits"], backend="torch")
        elif stored["quant_method"] == "awq":
            extra["quantization_config"] = AwqConfig(
                bits=4, group_size=stored["group_size"], backend="torch_awq"
            )
    model = AutoModelForCausalLM.from_pretrained(directory, device_map="auto", **extra)
    with torch.inference_mode():
        logits = model(ids.to(model.device)).logits.float().cpu()
    save_file({"logits": logits}, Path(sys.argv[2]) / f"{Path(directory).name}.safetensors")
