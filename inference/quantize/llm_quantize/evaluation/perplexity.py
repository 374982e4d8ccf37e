"""How far a quantized checkpoint is from its source: perplexity and KL divergence, from the saved files.

Both models are streamed block by block, so that it runs wherever the quantizer ran.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llm_quantize.checkpoint.reader import open_quantized
from llm_quantize.device import Device
from llm_quantize.errors import InputError, WorkError
from llm_quantize.model.block_forward import MicroBatch, replay
from llm_quantize.model.model_forward import embed, output_head
from llm_quantize.model.source import Model
from llm_quantize.model.states import States

LOGIT_BYTES = {
    False: 256 << 20,
    True: 2 << 30,
}  # for logits and what is computed of them: on the CPU, on a GPU
LEAST_LOGIT_BYTES = 8 << 20  # less would not help
COPIES = 8  # float32 values of vocabulary width that a token needs at the worst moment


@dataclass(frozen=True, slots=True)
class Measured:
    """Measured on held-out text.

    tokens: predicted. perplexity_source, perplexity_quantized: of each model. kl: mean KL(source || quantized), nats a
    token. agreement: share of tokens where both models find the same one likeliest.
    """

    tokens: int
    perplexity_source: float
    perplexity_quantized: float
    kl: float
    agreement: float


@torch.no_grad()
def measure(
    source: Model,
    quantized: Path,
    tokens: Tensor,
    device: Device,
    *,
    on_block: Callable[[int], None] | None = None,
    logit_bytes: int | None = None,
) -> Measured:
    """Compare the checkpoint `quantized` with `source` on `tokens`, int64 (windows, length of 2 or more).

    Computes in float32 on the CPU, in the source's dtype elsewhere; log-probabilities in float32 always.
    on_block(index) is called after each block. logit_bytes: what logits may take. Raises InputError for a directory
    that is no checkpoint of this model, WorkError for damaged files and values that are not finite.
    """
    if tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise InputError("held-out text needs one window of at least 2 tokens")
    dtype = source.dtype if device.is_gpu else torch.float32
    models = [source, open_quantized(source, quantized)]
    if len(models[1].blocks) != len(source.blocks):
        raise InputError(f"{quantized} has another number of blocks than its source: is it of another model?")
    for model in models:
        model.prefetch(0, device.torch)
    storage = _choose_storage(source, tokens, device, dtype)
    entered = [embed(model, tokens, storage, device.torch, dtype) for model in models]
    batch = MicroBatch(device, tokens.shape[1], source.widest())
    for index, name in enumerate(source.blocks):
        for model, (states, kwargs) in zip(models, entered, strict=True):
            block = model.load_block(index, device.torch, dtype)
            model.prefetch(index + 1, device.torch)
            replay(block, name, states, kwargs[index], batch)
            model.release(block)
        if on_block is not None:
            on_block(index)
    limit = logit_bytes or LOGIT_BYTES[device.is_gpu]
    while True:
        try:
            return _compare(models, [states for states, _ in entered], tokens, device.torch, dtype, limit)
        except torch.cuda.OutOfMemoryError:
            if limit < LEAST_LOGIT_BYTES:
                raise
        limit //= 4
        torch.cuda.empty_cache()


def _choose_storage(source: Model, tokens: Tensor, device: Device, dtype: torch.dtype) -> torch.device:
    """Where the states of both models are kept: on the device where they take little of it, or in host memory."""
    if not device.is_gpu:
        return device.torch
    needed = 2 * tokens.numel() * source.hidden_size * dtype.itemsize
    free = torch.cuda.mem_get_info(device.torch)[0]
    return device.torch if needed < free / 4 else torch.device("cpu")


def _compare(
    models: list[Model],
    states: list[States],
    tokens: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    limit: int,
) -> Measured:
    """The numbers, from the last states of source and quantized model, a few tokens at a time."""
    windows, predicted = tokens.shape[0], tokens.shape[1] - 1
    embeddings = models[0].skeleton.get_output_embeddings() or models[0].skeleton.get_input_embeddings()
    chunk = max(1, limit // (embeddings.weight.shape[0] * 4 * COPIES))
    # Whole windows where they fit, else pieces of one: never longer than a window, which models may not take.
    step, piece = max(1, chunk // predicted), min(chunk, predicted)
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    with output_head(models[0], device, dtype) as first, output_head(models[1], device, dtype) as second:
        for start in range(0, windows, step):
            stop = min(start + step, windows)
            hidden = [each.get(start, stop) for each in states]
            targets = tokens[start:stop, 1:].to(device)
            for a in range(0, predicted, piece):
                b = min(a + piece, predicted)
                p = torch.log_softmax(first(hidden[0][:, a:b]).float(), dim=-1)
                q = torch.log_softmax(second(hidden[1][:, a:b]).float(), dim=-1)
                target = targets[:, a:b, None]
                totals[0] -= p.gather(2, target).sum(dtype=torch.float64)
                totals[1] -= q.gather(2, target).sum(dtype=torch.float64)
                totals[3] += (p.argmax(-1) == q.argmax(-1)).sum()
                # In place: (log p - log q) * p. What the source holds for impossible counts for nothing.
                q = p.sub(q).mul_(p.exp_()).masked_fill_(p == 0, 0)
                totals[2] += q.sum(-1).sum(dtype=torch.float64)
    count = windows * predicted
    loss_source, loss_quantized, kl, agreement = (totals / count).tolist()
    if not all(map(math.isfinite, (loss_source, loss_quantized, kl))):
        raise WorkError("the logits are not finite: measure with --device cpu, which computes in float32")
    # Rounding may leave a hair below zero.
    return Measured(count, _exp(loss_source), _exp(loss_quantized), max(kl, 0.0), agreement)


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
