"""Files of weights: which one holds each tensor."""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from pathlib import Path

from safetensors import SafetensorError, safe_open

from llm_quantize.errors import InputError, one_line
from llm_quantize.io.untrusted import check_is_text, entries_of, read_json, stays_inside

# Of one tensor. A size of 0 lets the library take any others for sound, which PyTorch cannot count.
_MOST_AXES, _MOST_ELEMENTS = 64, 1 << 63


def check_no_adapter(directory: Path) -> None:
    """Raise InputError for a LoRA adapter: alone, or beside a model that transformers would then load with it."""
    if not (directory / "adapter_config.json").exists():
        return
    if (directory / "config.json").exists():
        raise InputError(
            f"{directory} holds a LoRA adapter beside the model, and both are loaded together: merge it first (PEFT's "
            "merge_and_unload), or move adapter_config.json away"
        )
    raise InputError(
        f"{directory} is a LoRA adapter: merge it into its base model first (PEFT's merge_and_unload)"
    )


def tensor_files(directory: Path, *, allow_pickle: bool = False) -> dict[str, Path]:
    """Map each tensor of a checkpoint directory to its file, as transformers finds it.

    One file goes before shards; of the index, only the names of the shards count. Raises InputError for a missing
    shard, a name that leaves the directory, and weights of other kinds alone.
    """
    single = directory / "model.safetensors"
    if single.is_file():
        return dict.fromkeys(tensor_shapes(single), single)
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return _indexed(directory, index)
    pickles = sorted(p.name for p in entries_of(directory) if p.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        remedy = (
            "convert it to safetensors first (load it with transformers and save_pretrained)"
            if allow_pickle
            else "a pickle can hold code; if you trust its author pass --allow_pickle, or convert it to safetensors"
        )
        raise InputError(f"{directory} has only pickle weights ({pickles[0]}): {remedy}")
    others = sorted(p.name for p in entries_of(directory) if p.suffix == ".safetensors")
    if others:
        raise InputError(
            f"{directory} has no model.safetensors and no index of shards, which transformers looks for beside "
            f"{others[0]}: take the whole model, or save it with transformers"
        )
    raise InputError(f"{directory} has no *.safetensors weights")


def _indexed(directory: Path, index: Path) -> dict[str, Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index.name} has no weight_map: download the model again")
    shards: set[Path] = set()
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise InputError(f"{index.name} names a shard that is not a file beside it: {shard!r}")
        shards.add(directory / shard)
    files: dict[str, Path] = {}
    for path in sorted(shards):
        if not path.is_file():
            raise InputError(f"shard {path.name} is missing in {directory}: download the model again")
        files |= dict.fromkeys(tensor_shapes(path), path)
    return files


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file's tensors, its header checked against its size.

    The library refuses a header that is cut, overlaps, leaves holes, or promises other sizes than there are.
    Raises InputError.
    """
    if not stays_inside(path):
        raise InputError(f"{path.name} is a link that leads out of {path.parent}: put a copy in its place")
    check_is_text(path)
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise InputError(f"{path.name} is damaged ({one_line(error)}): download the model again") from None
    for name, shape in shapes.items():
        if len(shape) > _MOST_AXES or math.prod(max(size, 1) for size in shape) >= _MOST_ELEMENTS:
            raise InputError(
                f"{path.name} is damaged (no tensor has a shape such as that of {one_line(name, 100)}): download the "
                "model again"
            )
    return shapes


class Scratch:
    """A temporary directory, `path`, removed with this object or at the end of the process."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="llm-quantize-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
