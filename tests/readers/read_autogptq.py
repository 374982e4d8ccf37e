# /// script
# requires-python = "==3.11.*"
# dependencies = ["auto-gptq==0.7.1", "transformers==4.51.3", "torch==2.6.0", "peft==0.13.2"]
# [tool.uv]
# no-binary-package = ["auto-gptq"]
# extra-build-dependencies = { auto-gptq = ["setuptools<81", "wheel", "numpy"] }
# extra-build-variables = { auto-gptq = { BUILD_CUDA_EXT = "0" } }
# ///
"""Logits of checkpoints as AutoGPTQ reads them: read_autogptq.py IDS.safetensors OUT DIRECTORY ..."""

import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")
import torch  # noqa: E402
from auto_gptq import AutoGPTQForCausalLM  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

device = "cuda:0" if torch.cuda.is_available() else "cpu"
ids = load_file(sys.argv[1])["ids"].to(device)
for directory in sys.argv[3:]:
    model = AutoGPTQForCausalLM.from_quantized(directory, device=device)
    assert any(type(m).__name__ == "QuantLinear" for m in model.model.modules())
    with torch.inference_mode():
        logits = model.model(ids).logits.float().cpu()
    save_file({"logits": logits}, Path(sys.argv[2]) / f"{Path(directory).name}.safetensors")
