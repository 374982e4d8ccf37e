# /// script
# requires-python = "==3.11.*"
# dependencies = [
#     "auto-gptq==0.7.1", "torch==2.6.0", "transformers==4.51.3", "tokenizers==0.21.4", "accelerate==1.6.0",
#     "peft==0.13.2", "huggingface-hub==0.36.0", "datasets==3.6.0", "dill==0.3.8", "multiprocess==0.70.16",
#     "fsspec==2025.3.0", "safetensors==0.5.3", "numpy==2.2.6", "pandas==2.2.3", "pyarrow==19.0.1",
# ]
# [tool.uv]
# no-binary-package = ["auto-gptq"]
# extra-build-dependencies = { auto-gptq = ["setuptools<81", "wheel", "numpy==2.2.6"] }
# extra-build-variables = { auto-gptq = { BUILD_CUDA_EXT = "0" } }
# ///
# mypy: ignore-errors
"""AutoGPTQ 0.7.1 as a backend. Built without its inference kernels, which quantizing does not use.

The library names the GPU outright and asks for one. Where there is none its constant is pointed at the CPU, and the
model is put together as its loader would have: the arithmetic is the same.
"""

import child


def load() -> None:
    import auto_gptq  # noqa: F401


def _without_gpu(job: child.Job, settings):
    import torch
    from auto_gptq.modeling import _base
    from auto_gptq.modeling.auto import GPTQ_CAUSAL_LM_MODEL_MAP
    from transformers import AutoModelForCausalLM

    _base.CUDA_0 = torch.device("cpu")
    torch.cuda.synchronize = lambda *args: None
    model = AutoModelForCausalLM.from_pretrained(
        job.model, torch_dtype=job.torch_dtype(), trust_remote_code=job.trust_remote_code
    ).eval()
    model.seqlen = getattr(model.config, "max_position_embeddings", 4096)
    return GPTQ_CAUSAL_LM_MODEL_MAP[model.config.model_type](model, False, settings)


def quantize(job: child.Job, channel: child.Channel) -> None:
    import torch
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig

    channel.follow_log("auto_gptq.modeling._base", r"Start quantizing layer (\d+)/(\d+)")
    settings = BaseQuantizeConfig(
        bits=job.bits,
        group_size=job.group_size,
        damp_percent=job.damping,
        desc_act=job.act_order != "none",
        static_groups=job.act_order == "static",
        sym=job.symmetric,
        model_file_base_name="model",  # the name that every reader looks for
    )
    examples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job.tokens()]
    with channel.stage("load"):
        if torch.cuda.is_available():
            model = AutoGPTQForCausalLM.from_pretrained(
                job.model,
                settings,
                torch_dtype=job.torch_dtype(),
                trust_remote_code=job.trust_remote_code,
            )
        else:
            model = _without_gpu(job, settings)
    with channel.stage("quantize"):
        model.quantize(examples)
    channel.block(job.blocks, job.blocks)
    with channel.stage("save"):
        model.save_quantized(job.output)


if __name__ == "__main__":
    raise SystemExit(child.run(("auto-gptq", "torch", "transformers"), load, quantize))
