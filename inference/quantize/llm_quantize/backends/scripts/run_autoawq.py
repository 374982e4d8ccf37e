# /// script
# requires-python = "==3.11.*"
# dependencies = [
#     "autoawq==0.2.9", "torch==2.6.0", "transformers==4.51.3", "tokenizers==0.21.4", "accelerate==1.6.0",
#     "huggingface-hub==0.36.0", "datasets==3.6.0", "dill==0.3.8", "multiprocess==0.70.16", "fsspec==2025.3.0",
#     "safetensors==0.5.3", "numpy==2.2.6", "pandas==2.2.3", "pyarrow==19.0.1", "setuptools==80.9.0",
# ]
# ///
# mypy: ignore-errors
"""AutoAWQ 0.2.9 as a backend, with the torch and transformers that it was last tested with.

Channel scales and clipping are searched on layer outputs by the library; its GEMM version is what is written.

Before each search the library keeps a copy of the weights, which it makes by moving them to the CPU. For weights that
are there already this makes no copy, and the search would go on from weights that it has scaled itself. Where there
is no GPU the copy is made here; nothing else of the search changes.
"""

import child


def load() -> None:
    import awq  # noqa: F401


def _copying(quantizer: type) -> type:
    class Copying(quantizer):
        def _compute_best_scale(self, x, w_mean, x_mean, module2inspect, *args):
            stored = module2inspect.state_dict
            module2inspect.state_dict = lambda: {name: value.clone() for name, value in stored().items()}
            try:
                return super()._compute_best_scale(x, w_mean, x_mean, module2inspect, *args)
            finally:
                del module2inspect.state_dict

    return Copying


def quantize(job: child.Job, channel: child.Channel) -> None:
    import awq.quantize.quantizer
    import torch
    from awq import AutoAWQForCausalLM
    from awq.quantize.quantizer import AwqQuantizer
    from transformers import AutoTokenizer

    channel.follow_bar(awq.quantize.quantizer)
    tokens = job.tokens()
    with channel.stage("load"):
        model = AutoAWQForCausalLM.from_pretrained(
            job.model,
            trust_remote_code=job.trust_remote_code,
            torch_dtype=job.torch_dtype(),
            device_map="cpu",
        )
        tokenizer = AutoTokenizer.from_pretrained(job.model, trust_remote_code=job.trust_remote_code)
    settings = {"zero_point": True, "q_group_size": job.group_size, "w_bit": job.bits, "version": "GEMM"}
    with channel.stage("quantize"):
        model.quantize(
            tokenizer,
            quant_config=settings,
            calib_data=tokens,
            max_calib_samples=len(tokens),
            max_calib_seq_len=len(tokens[0]),
            quantizer_cls=AwqQuantizer if torch.cuda.is_available() else _copying(AwqQuantizer),
        )
    with channel.stage("save"):
        model.save_quantized(job.output)


if __name__ == "__main__":
    raise SystemExit(child.run(("autoawq", "torch", "transformers"), load, quantize))
