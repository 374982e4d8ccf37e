# /// script
# requires-python = "==3.11.*"
# dependencies = [
#     "optimum==2.3.0", "gptqmodel==7.7.0", "torch==2.15.0", "transformers==5.24.0",
# ]
# ///
# mypy: ignore-errors
"""Optimum's GPTQQuantizer as a backend, over GPTQModel, whose solver and packing it drives.

What packs is named. Left to itself on a GPU, GPTQModel compiles its inference kernels one after the other until it
finds one that packs.
"""

import child


def load() -> None:
    import optimum.gptq  # noqa: F401


def quantize(job: child.Job, channel: child.Channel) -> None:
    from optimum.gptq import GPTQQuantizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    channel.follow_log("optimum.gptq.quantizer", r"Start quantizing block \S+ (\d+)/(\d+)")
    examples = [{"input_ids": [ids], "attention_mask": [[1] * len(ids)]} for ids in job.tokens()]
    with channel.stage("load"):
        model = AutoModelForCausalLM.from_pretrained(
            job.model,
            dtype=job.torch_dtype(),
            device_map=job.device,
            trust_remote_code=job.trust_remote_code,
        )
        tokenizer = AutoTokenizer.from_pretrained(job.model, trust_remote_code=job.trust_remote_code)
    quantizer = GPTQQuantizer(
        bits=job.bits,
        dataset=examples,
        group_size=job.group_size,
        damp_percent=job.damping,
        desc_act=job.act_order == "dynamic",
        act_group_aware=job.act_order == "static",
        sym=job.symmetric,
        model_seqlen=len(examples[0]["input_ids"][0]),
        backend="gptq_torch",
    )
    with channel.stage("quantize"):
        quantizer.quantize_model(model, tokenizer)
    channel.block(job.blocks, job.blocks)
    with channel.stage("save"):
        # Saving turns symmetric layers into v1 and writes a config from before that, with all tokens in it. What
        # is said here is what the library says of the same files in its quantize_config.json.
        quantizer.dataset = None
        form = "gptq" if job.symmetric else quantizer.format
        model.config.quantization_config = quantizer.to_dict() | {"format": form, "checkpoint_format": form}
        quantizer.save(model, job.output)


if __name__ == "__main__":
    raise SystemExit(child.run(("optimum", "gptqmodel", "torch", "transformers"), load, quantize))
