"""Weights into the modules of a skeleton, and out of them again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llm_quantize.errors import FinalError, WorkError
from llm_quantize.model.tensor_store import TensorStore
from llm_quantize.model.weight_map import WeightMap


def load_module(
    module: nn.Module,
    prefix: str,
    store: TensorStore,
    weights: WeightMap,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Give every parameter of `module`, which the skeleton names `prefix`, its weights on `device`; buffers move along.

    Raises WorkError for a shape that is not the config's, FinalError for a weight that is NaN or infinite.
    """
    finite: dict[str, Tensor] = {}
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        full = f"{prefix}.{name}" if prefix else name
        if full not in weights:
            raise WorkError(f"{full} is nowhere in the {store.what}: download the model again")
        tensor = weights.read(full, lambda stored: store.read(stored, device))
        if tensor.shape != parameter.shape:
            raise WorkError(
                f"{full} is {tuple(tensor.shape)} in the weights and {tuple(parameter.shape)} in the config"
            )
        # Never the mapped file's own memory: what is written into it would be read again.
        kept = torch.float32 if weights.keeps_float32(full, dtype) else dtype
        tensor = tensor.to(kept, copy=tensor.device.type == "cpu")
        finite[full] = torch.isfinite(tensor).all()
        _set(module, name, nn.Parameter(tensor, requires_grad=False))
    for name, buffer in list(module.named_buffers()):
        full = f"{prefix}.{name}" if prefix else name
        owner, _, leaf = name.rpartition(".")
        persistent = leaf not in module.get_submodule(owner)._non_persistent_buffers_set
        if persistent and full in weights:
            buffer = weights.read(full, store.read)
        module.get_submodule(owner)._buffers[leaf] = buffer.to(device)
    # Asked at the end: each answer waits for the device.
    if finite and not bool(torch.stack(list(finite.values())).all()):
        broken = next(name for name, each in finite.items() if not bool(each))
        raise FinalError(f"{broken} has NaN or infinite weights: the {store.what} is broken")


def release_module(module: nn.Module) -> None:
    """Drop the weights of `module`: its parameters are on the meta device again."""
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        empty = torch.empty_like(parameter, device="meta")
        _set(module, name, nn.Parameter(empty, requires_grad=False))


def _set(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner)._parameters[leaf] = parameter
