"""Files of weights: which one holds each tensor, and pickled ones converted."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llm_quantize.errors import InputError, WorkError, one_line
from llm_quantize.io.untrusted import check_files, read_json, stays_inside

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt"}
WEIGHT_SUFFIXES |= {".pkl", ".pickle", ".npy", ".npz"}


def tensor_files(directory: Path, *, allow_pickle: bool = False) -> dict[str, Path]:
    """Map each tensor of a checkpoint directory to its file, from the index or the files themselves.

    Raises InputError for a missing shard, a name that leaves the directory, and weights that are pickles alone.
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return _indexed(directory, index)
    single = directory / "model.safetensors"
    if single.is_file():
        return dict.fromkeys(tensor_shapes(single), single)
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        remedy = (
            "convert it to safetensors first (load it with transformers and save_pretrained)"
            if allow_pickle
            else "a pickle can hold code; if you trust its author pass --allow_pickle, or convert it to safetensors"
        )
        raise InputError(f"{directory} has only pickle weights ({pickles[0]}): {remedy}")
    raise InputError(f"{directory} has no *.safetensors weights")


def _indexed(directory: Path, index: Path) -> dict[str, Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index.name} has no weight_map: download the model again")
    files: dict[str, Path] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise InputError(f"{index.name} names a shard that is not a file beside it: {shard!r}")
        files[name] = directory / shard
    held: dict[Path, dict[str, tuple[int, ...]]] = {}
    for path in sorted(set(files.values())):
        if not path.is_file():
            raise InputError(f"shard {path.name} is missing in {directory}: download the model again")
        held[path] = tensor_shapes(path)
    for name, path in files.items():
        if name not in held[path]:
            raise InputError(f"{path.name} has no tensor {name}: download the model again")
    return files


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file's tensors, its header checked against its size.

    The library refuses a header that is cut, overlaps, leaves holes, or promises other sizes than there are.
    Raises InputError.
    """
    if not stays_inside(path):
        raise InputError(f"{path.name} is a link that leads out of {path.parent}: put a copy in its place")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise InputError(f"{path.name} is damaged ({one_line(error)}): download the model again") from None


class Scratch:
    """A temporary directory, `path`, removed with this object or at the end of the process."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="llm-quantize-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def convert_pickles(directory: Path, into: Path) -> Path:
    """Write a safetensors copy of a pickle checkpoint into the directory `into`, and return that.

    Pickles are read with `weights_only`, one shard at a time, so that memory holds one. Small side files are copied.
    Raises InputError for what holds no weights, WorkError where the copy cannot be stored.
    """
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    check_files(directory)
    shards = sorted(
        p for p in directory.iterdir() if p.suffix == ".bin" and p.name.startswith("pytorch_model")
    )
    if not shards:
        raise InputError(f"{directory} has no pytorch_model*.bin to convert")
    into.mkdir(parents=True, exist_ok=True)
    for number, shard in enumerate(shards):
        tensors = _unpickled(shard)
        name = f"model-{number:05d}.safetensors"
        try:
            save_file(tensors, into / name, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise WorkError(
                f"cannot store a copy of {shard.name} in {into.parent}: {one_line(error)}: set TMPDIR elsewhere"
            ) from None
        # As old as what it was made from, by which an interrupted run knows the model again.
        os.utime(into / name, ns=(shard.stat().st_atime_ns, shard.stat().st_mtime_ns))
        weight_map.update(dict.fromkeys(tensors, name))
    (into / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for path in directory.iterdir():
        if path.is_file() and not path.is_symlink() and path.suffix not in WEIGHT_SUFFIXES:
            (into / path.name).write_bytes(path.read_bytes())
    return into


def _unpickled(shard: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(shard, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise InputError(
            f"cannot read {shard.name} without running its code: {type(error).__name__}"
        ) from None
    if not isinstance(state, dict):
        raise InputError(f"{shard.name} holds no weights by name: convert it with the program that wrote it")
    return {str(k): v.contiguous().clone() for k, v in state.items() if isinstance(v, Tensor)}
