#!/usr/bin/env python3
"""A model with outlier channels, made from one without: the same function, harder to quantize.

    outliers.py MODEL OUT [--channels 4] [--factor 128] [--seed 0]

In every place where a scale cancels (a norm before linears, a value head before the output projection, the MLP's
linear branch before its last linear) a few channels are multiplied by a power of two, and the weights that read them
are divided by it. Large models grow such channels by themselves. A power of two costs no digit but where a weight
leaves float16's normal range.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llm_quantize.model.awq_mappings import AWQMapping, find_mappings, scale_count, smooth_block
from llm_quantize.model.source import SourceModel


def grow(block: nn.Module, mapping: AWQMapping, chosen: Tensor, factor: float, dtype: torch.dtype) -> None:
    """Multiply rows `chosen` of the smooth layer by `factor`, and divide the weights that read them by it."""
    scale = torch.ones(scale_count(block, mapping))
    scale[chosen] = 1 / factor
    smooth_block(block, mapping, scale, dtype)


def write_with_outliers(
    model: Path, out: Path, *, channels: int = 4, factor: float = 128.0, seed: int = 0
) -> None:
    """Write `model`, a small one, to the new directory `out` with `channels` outliers in each place."""
    source = SourceModel.open(model)
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: source.store.read(name) for name in source.store.files}
    for index, name in enumerate(source.blocks):
        block = source.load_block(index, torch.device("cpu"), torch.float32)
        for mapping in find_mappings(block, source.config):
            rows = torch.unique(mapping.rows)
            chosen = rows[torch.randperm(len(rows), generator=generator)[:channels]]
            grow(block, mapping, chosen, factor, source.dtype)
        for path, parameter in block.named_parameters():
            stored = source.weights.stored_name(f"{name}.{path}")
            assert stored is not None
            tensors[stored] = parameter.detach().to(tensors[stored].dtype).clone()
        source.release(block)
    out.mkdir(parents=True)
    save_file(
        {k: v.contiguous() for k, v in tensors.items()}, out / "model.safetensors", metadata={"format": "pt"}
    )
    for name, content in source.side_files.published():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(content)
    shutil.copyfile(model / "config.json", out / "config.json")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--factor", type=float, default=128.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_with_outliers(args.model, args.out, channels=args.channels, factor=args.factor, seed=args.seed)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
