"""Reads a checkpoint before vLLM does: whether vLLM serves it, and with which arguments.

`run_vllm.sh` calls this before any environment exists, so these modules need the standard library alone and any Python
from 3.8, and import nothing else of the package. They read configs, safetensors headers and small integer tensors,
never the weights. Imports go upwards in this list: `refusal`, `time_limit`, `vllm_arguments`, `checkpoint_files`,
`quantized_checkpoint`, `model_rules`, `float_modules`, `settings_rules`, `shape_rules`, `module_rules`,
`architectures`, `plan`, `cli`. `float_modules` and `float_in_transformers`, which stand on the standard library alone,
are also for the quantizer, which checks its results by them.
"""
