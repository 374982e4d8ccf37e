# /// script
# requires-python = "==3.11.*"
# dependencies = [
#     "gptqmodel==7.7.0", "torch==2.15.0", "transformers==5.24.0",
# ]
# ///
# mypy: ignore-errors
"""GPTQModel 7.7.0 as a backend, for GPTQ and for AWQ.

Activation order over groups that stay where they are is its group-aware order; `desc_act` its classic one.

What packs is named. Left to itself on a GPU, the library packs AWQ by an inference kernel, which it compiles first:
time that has nothing to do with quantizing, and a failure where there is no CUDA compiler.
"""

import child


def load() -> None:
    import gptqmodel  # noqa: F401


def quantize(job: child.Job, channel: child.Channel) -> None:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    common = {
        "bits": job.bits,
        "group_size": job.group_size,
        "sym": job.symmetric,
        "offload_to_disk": False,
        "device": job.device,
    }
    if job.method == "awq":
        settings = QuantizeConfig(**common, quant_method="awq", format="gemm")
        backend = BACKEND.AWQ_TORCH
    else:
        settings = QuantizeConfig(
            **common,
            desc_act=job.act_order == "dynamic",
            act_group_aware=job.act_order == "static",
            damp_percent=job.damping,
        )
        backend = BACKEND.GPTQ_TORCH
    examples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job.tokens()]
    with channel.stage("load"):
        model = GPTQModel.load(
            job.model, settings, dtype=job.torch_dtype(), trust_remote_code=job.trust_remote_code
        )
    model.layer_callback = lambda layer_idx, submodule_finalized: (
        channel.block(layer_idx + 1, job.blocks) if submodule_finalized else None
    )
    with channel.stage("quantize"):
        model.quantize(examples, batch_size=1, backend=backend, calibration_data_min_length=1)
    with channel.stage("save"):
        model.save(job.output)


if __name__ == "__main__":
    raise SystemExit(child.run(("gptqmodel", "torch", "transformers"), load, quantize))
