# /// script
# requires-python = "==3.11.*"
# dependencies = ["autoawq==0.2.9", "transformers==4.51.3", "torch==2.6.0", "setuptools==80.9.0"]
# ///
"""Logits of checkpoints as AutoAWQ reads them: read_autoawq.py IDS.safetensors OUT DIRECTORY ..."""

import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")
import awq.modules.linear.gemm as gemm  # noqa: E402
import torch  # noqa: E402
from awq import AutoAWQForCausalLM  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cpu":
    gemm.TRITON_AVAILABLE = False  # without it AutoAWQ takes its own PyTorch path
ids = load_file(sys.argv[1])["ids"].to(device)
for directory in sys.argv[3:]:
    model = AutoAWQForCausalLM.from_quantized(directory, fuse_layers=False, device_map={"": device})
    assert any(type(m).__name__ == "WQLinear_GEMM" for m in model.model.modules())
    with torch.inference_mode():
        logits = model.model(ids).logits.float().cpu()
    save_file({"logits": logits}, Path(sys.argv[2]) / f"{Path(directory).name}.safetensors")
