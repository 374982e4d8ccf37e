# /// script
# requires-python = "==3.11.*"
# dependencies = [
#     "llmcompressor==0.14.0.1", "torch==2.14.0", "transformers==5.17.0", "compressed-tensors==0.19.0",
#     "datasets==5.2.0", "accelerate==1.15.0", "numpy==2.4.6",
# ]
# ///
# mypy: ignore-errors
"""llm-compressor 0.14.0.1, for comparison alone: it is no backend of the scripts."""

import sys
from pathlib import Path

sys.path.pop(0)  # this directory: nothing in it is what a library means by its name
sys.path.insert(
    0,
    str(
        Path(__file__).resolve().parent.parent
        / "inference"
        / "quantize"
        / "llm_quantize"
        / "backends"
        / "scripts"
    ),
)

import child


def load() -> None:
    import llmcompressor  # noqa: F401


def quantize(job: child.Job, channel: child.Channel) -> None:
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not torch.cuda.is_available():
        # Its AWQ pins memory for copies to a GPU, which fails where there is no driver and serves nothing.
        torch.Tensor.pin_memory = lambda self, *args: self
    tokens = job.tokens()
    data = Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * len(ids) for ids in tokens]})
    with channel.stage("load"):
        model = AutoModelForCausalLM.from_pretrained(
            job.model, dtype=job.torch_dtype(), trust_remote_code=job.trust_remote_code
        )
        tokenizer = AutoTokenizer.from_pretrained(job.model, trust_remote_code=job.trust_remote_code)
    order = {"none": None, "static": "static", "dynamic": "group"}[job.act_order]
    weights = QuantizationArgs(
        num_bits=job.bits,
        type="int",
        symmetric=job.symmetric,
        strategy="channel" if job.group_size == -1 else "group",
        group_size=None if job.group_size == -1 else job.group_size,
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    if job.method == "gptq":
        recipe = [
            GPTQModifier(config_groups=groups, ignore=["lm_head"], dampening_frac=job.damping, actorder=order)
        ]
    else:
        recipe = [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=["lm_head"])]
    with channel.stage("quantize"):
        oneshot(
            model=model,
            tokenizer=tokenizer,
            dataset=data,
            recipe=recipe,
            num_calibration_samples=len(tokens),
            max_seq_length=len(tokens[0]),
            shuffle_calibration_samples=False,
        )
    channel.block(job.blocks, job.blocks)
    with channel.stage("save"):
        model.save_pretrained(job.output, save_compressed=True)


if __name__ == "__main__":
    raise SystemExit(
        child.run(("llmcompressor", "torch", "transformers", "compressed-tensors"), load, quantize)
    )
