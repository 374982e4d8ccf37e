# /// script
# requires-python = "==3.11.*"
# dependencies = [
#     "autoawq==0.2.9", "transformers==4.51.3", "torch==2.6.0",
#     "intel-extension-for-pytorch==2.6.0", "setuptools==80.9.0",
# ]
# ///
"""Logits of checkpoints as AutoAWQ reads them: read_autoawq.py IDS.safetensors OUT DIRECTORY ...

Without a GPU AutoAWQ loads through Intel's extension alone, whose kernels work in bfloat16 and fail on a layer of
one single group. So the linears are replaced by what AutoAWQ's own `dequantize_gemm` makes of the tensors that
`from_quantized` loaded; on a GPU its kernels run.
"""

import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")
import torch  # noqa: E402
from awq import AutoAWQForCausalLM  # noqa: E402
from awq.modules.linear.gemm import WQLinear_GEMM  # noqa: E402
from awq.utils.packing_utils import dequantize_gemm  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


def unpack(model: torch.nn.Module) -> int:
    """Replaces every quantized linear by a plain one in float32; how many (WQLinear_IPEX is a WQLinear_GEMM)."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, WQLinear_GEMM)}
    for name, m in found.items():
        weight = dequantize_gemm(m.qweight, m.qzeros, m.scales, 4, m.group_size).T.float().contiguous()
        plain = torch.nn.Linear(m.in_features, m.out_features, bias=m.bias is not None)
        plain.weight = torch.nn.Parameter(weight, requires_grad=False)
        if m.bias is not None:
            plain.bias = torch.nn.Parameter(m.bias.float(), requires_grad=False)
        model.set_submodule(name, plain)
    model.float()
    return len(found)


device = "cuda" if torch.cuda.is_available() else "cpu"
ids = load_file(sys.argv[1])["ids"].to(device)
for directory in sys.argv[3:]:
    model = AutoAWQForCausalLM.from_quantized(directory, fuse_layers=False, device_map={"": device}).model
    assert any(isinstance(m, WQLinear_GEMM) for m in model.modules())
    if device == "cpu":
        assert unpack(model)
    with torch.inference_mode():
        logits = model(ids).logits.float().cpu()
    save_file({"logits": logits}, Path(sys.argv[2]) / f"{Path(directory).name}.safetensors")
