"""Reads a checkpoint before vLLM does: whether vLLM serves it, and with which arguments.

`run_vllm.sh` calls this before any environment exists, so these modules need the standard library alone and any Python
from 3.8, and import nothing else of the package. They read configs, safetensors headers and small integer tensors,
never the weights. Imports go upwards in this list: `refusal`, `vllm_arguments`, `checkpoint_files`,
`quantized_checkpoint`, `settings_rules`, `shape_rules`, `plan`, `cli`.
"""
