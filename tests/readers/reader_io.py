"""What the reader scripts share: their command line, and the file each answer goes into.

    uv run --script read_LIBRARY.py --tokens TOKENS [--device cpu|cuda] CHECKPOINT ANSWER [CHECKPOINT ANSWER …]

TOKENS is a safetensors file with `input_ids` (batch, length). ANSWER is one with logits (batch, length, vocabulary),
float32, under the name of the path through the library that made them; `path.<name>` in its metadata says which
class did the work, `failed.<name>` why a path gave nothing. One process reads all checkpoints, since importing these
libraries takes longer than reading.
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

# One way through a library: its name, the class that did the work, and logits for token ids.
Path_ = tuple[str, str, Callable[[torch.Tensor], torch.Tensor]]


def read_all(paths: Callable[[str, str], Iterator[Path_]]) -> None:
    """Answers for every checkpoint on the command line. `paths(checkpoint, device)` opens one, way by way."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("pairs", nargs="+", metavar="CHECKPOINT ANSWER")
    arguments = parser.parse_args()
    if len(arguments.pairs) % 2:
        parser.error("each CHECKPOINT needs its ANSWER")
    ids = load_file(arguments.tokens)["input_ids"].to(arguments.device)
    for checkpoint, answer in zip(arguments.pairs[::2], arguments.pairs[1::2], strict=True):
        logits: dict[str, torch.Tensor] = {}
        notes: dict[str, str] = {}
        try:
            for name, worker, forward in paths(checkpoint, arguments.device):
                notes[f"path.{name}"] = worker
                try:
                    with torch.inference_mode():
                        logits[name] = forward(ids).float().cpu().contiguous()
                except Exception as error:
                    traceback.print_exc()
                    notes[f"failed.{name}"] = f"{type(error).__name__}: {error}"
        except Exception as error:
            traceback.print_exc()
            notes["failed"] = f"{type(error).__name__}: {error}"
        save_file(logits, Path(answer), metadata=notes)


def linear_class(model: torch.nn.Module) -> str:
    """The class that the model's quantized linears are of, read off the last one before the head."""
    names = [name for name, _ in model.named_modules() if name.endswith(("down_proj", "fc2", "o_proj"))]
    return type(model.get_submodule(names[-1])).__name__
