"""The model to quantize: its config, tokenizer and weights, read a block at a time and never whole.

The skeleton is the transformers model on the meta device. A *block* is one decoder layer; its weights go straight
from the safetensors files to the device. Blocks and linears are found from the model itself, not from its name.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from llm_quantize.errors import FinalError, InputError, WorkError, is_failure, one_line
from llm_quantize.io import safetensors_files
from llm_quantize.io.pinned_copies import Prefetcher
from llm_quantize.io.untrusted import (
    check_counts,
    check_files,
    places_of_this_machine,
    read_limited,
    stays_inside,
    without_places,
)
from llm_quantize.model.allocation_limit import AllocationLimit, TooLarge

_MOE_HINTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
# Heads of other tasks, whose weights transformers would put under a language model's head without a word.
_OTHER_HEADS = re.compile(
    r"For(MaskedLM|PreTraining|NextSentencePrediction|MultipleChoice|QuestionAnswering|\w*Classification)$"
)
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt"}
WEIGHT_SUFFIXES |= {".pkl", ".pickle", ".npy", ".npz"}
_MAX_JSON = 64 << 20
_LEAST_ELEMENTS = 1 << 26  # that a config may always ask for: 256 MB in float32
_OWN_CONFIG = "take the config.json that came with the weights"
HEAD_NAMES = ("lm_head", "embed_out")  # of one and the same output head, by version of transformers


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size. Errors: `InputError` naming the file."""
    try:
        found = json.loads(read_limited(path, _MAX_JSON).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, endless digits
        raise InputError(f"cannot read {path.name}: {type(error).__name__}: {one_line(error)}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path.name} holds no JSON object")
    return found


def tensor_files(directory: Path, *, allow_pickle: bool = False) -> dict[str, Path]:
    """Which file of a checkpoint directory holds each tensor, from the index or the files themselves.

    Errors: `InputError` for a missing shard, a name that leaves the directory, pickle-only weights.
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{index.name} has no weight_map: download the model again")
        files: dict[str, Path] = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise InputError(f"{index.name} names a shard that is not a file beside it: {shard!r}")
            files[name] = directory / shard
        held: dict[Path, dict[str, tuple[int, ...]]] = {}
        for shard_path in sorted(set(files.values())):
            if not shard_path.is_file():
                raise InputError(
                    f"shard {shard_path.name} is missing in {directory}: download the model again"
                )
            held[shard_path] = shard_shapes(shard_path)
        for name, shard_path in files.items():
            if name not in held[shard_path]:
                raise InputError(f"{shard_path.name} has no tensor {name}: download the model again")
        return files
    single = directory / "model.safetensors"
    if single.is_file():
        return dict.fromkeys(shard_shapes(single), single)
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        remedy = (
            "convert it to safetensors first (load it with transformers and save_pretrained)"
            if allow_pickle
            else "a pickle can hold code; if you trust its author pass --allow_pickle, or convert it to safetensors"
        )
        raise InputError(f"{directory} has only pickle weights ({pickles[0]}): {remedy}")
    raise InputError(f"{directory} has no *.safetensors weights")


def shard_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file's tensors, its header checked against its size.

    The library refuses a header that is cut, overlaps, leaves holes, or promises other sizes than there are.
    Errors: `InputError`.
    """
    if not stays_inside(path):
        raise InputError(f"{path.name} is a link that leads out of {path.parent}: put a copy in its place")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise InputError(f"{path.name} is damaged ({one_line(error)}): download the model again") from None


class Scratch:
    """A temporary directory, `path`, which is removed with this object or at the end of the process."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="llm-quantize-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def convert_pickles(directory: Path, into: Path) -> Path:
    """A safetensors copy of a pickle checkpoint (read with `weights_only`), in `into`; returns `into`.

    Shard by shard, so that memory holds one shard. Side files are linked by copying what is small.
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
        try:
            state = torch.load(shard, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            raise InputError(
                f"cannot read {shard.name} without running its code: {type(error).__name__}"
            ) from None
        if not isinstance(state, dict):
            raise InputError(
                f"{shard.name} holds no weights by name: convert it with the program that wrote it"
            )
        name = f"model-{number:05d}.safetensors"
        tensors = {str(k): v.contiguous().clone() for k, v in state.items() if isinstance(v, Tensor)}
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


def examine_config(directory: Path) -> dict[str, Any]:
    """config.json of a directory that may be quantized. Errors: `InputError` saying what it is instead."""
    if not (directory / "config.json").is_file():
        raise InputError(f"{directory} has no config.json: give a Hugging Face model directory")
    config = read_json(directory / "config.json")
    quantization = config.get("quantization_config")
    if quantization is None and isinstance(config.get("text_config"), dict):
        quantization = config["text_config"].get("quantization_config")
    if quantization is not None:
        method = (
            quantization.get("quant_method", "an unnamed method") if isinstance(quantization, dict) else "?"
        )
        raise InputError(
            f"{directory} is already quantized ({method}): give the FP16/BF16 model it was made from"
        )
    names = config.get("architectures")
    if isinstance(names, list) and names and all(_OTHER_HEADS.search(str(name)) for name in names):
        raise InputError(f"{names[0]} is not a causal LM: nothing to quantize here")
    for key in _MOE_HINTS:
        value = config.get(key)
        if isinstance(value, int) and value > 1:
            name = (config.get("architectures") or [config.get("model_type", "this model")])[0]
            raise InputError(
                f"{name} is a mixture of {value} experts: not supported yet, only dense models are"
            )
    return config


def with_old_rope_keys(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json that transformers 4 reads as transformers 5 does; a new object.

    transformers 5 puts what it knows of rotary embeddings into `rope_parameters`, which older readers ignore
    and take their default base instead. The old keys are added where they are missing and hold the same;
    parameters by layer type, which have no old form, stay as they are.
    """
    result = dict(config)
    if isinstance(config.get("text_config"), dict):
        result["text_config"] = with_old_rope_keys(config["text_config"])
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, dict) or not isinstance(parameters.get("rope_theta"), int | float):
        return result
    rest = {key: value for key, value in parameters.items() if key != "rope_theta"}
    share = rest.pop("partial_rotary_factor", None)
    scaled = rest.get("rope_type", "default") != "default"
    if any(isinstance(value, dict) for value in rest.values()) or (scaled and share is not None):
        return result
    neox = config.get("model_type") == "gpt_neox"
    old = {"rotary_emb_base" if neox else "rope_theta": parameters["rope_theta"]}
    if share is not None:
        old["rotary_pct" if neox else "partial_rotary_factor"] = share
    if scaled:
        old["rope_scaling"] = rest
    return {**old, **result}


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear layer: its path inside the block, its full tensor prefix, and its widths."""

    path: str
    name: str
    out_features: int
    in_features: int


class Source:
    """An opened model. `skeleton`: on the meta device except its buffers; `blocks`: names like `model.layers.0`."""

    what = "source model"  # in messages

    def __init__(
        self, directory: Path, config: Any, skeleton: nn.Module, tokenizer: Any, files: dict[str, Path]
    ) -> None:
        self.directory = directory
        self.config = config
        self.skeleton: Any = skeleton  # a transformers model, which mypy knows too little of
        self.tokenizer = tokenizer
        self.files = files
        self.list_name, self.modules = _find_blocks(skeleton, config)
        self.blocks = [f"{self.list_name}.{i}" for i in range(len(self.modules))]
        self._handles: dict[Path, Any] = {}
        self._prefetcher = Prefetcher(self._mapped)
        self._cleaned: Scratch | None = None
        self._prefix = self._name_shift()
        self.dtype = self._weights_dtype(self.stored_name(f"{self.linears(0)[0].name}.weight"))
        if self.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise InputError(f"weights are {self.dtype}: give a model in FP16, BF16 or FP32")

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
        checked: Callable[[Any], None] = lambda _: None,
    ) -> Source:
        """Reads config and tokenizer, builds the skeleton; no weights. Errors: `InputError`.

        checked: is given the config, once the files are found sound and before what takes seconds.
        """
        check_files(directory)
        raw = examine_config(directory)
        files = tensor_files(directory, allow_pickle=allow_pickle)
        check_counts(raw, len(files))
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoTokenizer

        if "auto_map" in raw and not trust_remote_code:
            model_type = raw.get("model_type")
            from transformers.models.auto import configuration_auto

            known: Any = configuration_auto
            if model_type not in known.CONFIG_MAPPING_NAMES:
                raise InputError(
                    "the model brings its own code (auto_map): read it, then pass --trust_remote_code to run it"
                )
        try:
            config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        except Exception as error:
            raise InputError(f"config.json is not usable ({one_line(error)}): {_OWN_CONFIG}") from None
        shapes = [s for path in set(files.values()) for s in shard_shapes(path).values()]
        limit = AllocationLimit(max(sum(map(math.prod, shapes)), _LEAST_ELEMENTS), 100 * len(shapes) + 10_000)
        checked(config)
        try:
            with init_empty_weights(include_buffers=False), limit:
                skeleton = _skeleton(config, trust_remote_code=trust_remote_code)
        except TooLarge as error:
            raise InputError(f"{error}: {_OWN_CONFIG}") from None
        except ValueError as error:
            if "Unrecognized configuration class" in str(error):
                raise InputError(
                    f"{type(config).__name__} is not a causal LM: nothing to quantize here"
                ) from None
            raise InputError(f"cannot build the model ({one_line(error)}): {_OWN_CONFIG}") from None
        except Exception as error:
            raise InputError(f"cannot build the model ({one_line(error)}): {_OWN_CONFIG}") from None
        skeleton.eval()
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
            # Without its files some classes come up empty instead of failing.
            words = set(tokenizer("some text")["input_ids"]) - set(tokenizer.all_special_ids)
        except BaseException as error:
            if not is_failure(error):
                raise
            raise InputError(f"no usable tokenizer in {directory}: {one_line(error)}") from None
        if not words:
            raise InputError(f"no usable tokenizer in {directory}: copy its files there (tokenizer.json)")
        return cls(directory, config, skeleton, tokenizer, files)

    # -- structure

    def linears(self, index: int) -> list[Linear]:
        """The linear layers of block `index`, in the order the module lists them."""
        return [
            Linear(path, f"{self.blocks[index]}.{path}", module.out_features, module.in_features)
            for path, module in self.modules[index].named_modules()
            if isinstance(module, nn.Linear)
        ]

    def stored_name(self, parameter: str) -> str:
        """The checkpoint's name for a parameter of the skeleton."""
        if not self._prefix:
            return parameter
        old, new = self._prefix
        return new + parameter[len(old) :] if parameter.startswith(old) else parameter

    def _name_shift(self) -> tuple[str, str] | None:
        """How the checkpoint's names differ from the skeleton's by the base model's prefix, if they do."""
        probe = f"{self.linears(0)[0].name}.weight"
        if probe in self.files:
            return None
        base = f"{getattr(self.skeleton, 'base_model_prefix', 'model')}."
        candidates = [name for name in self.files if name.endswith(probe.removeprefix(base))]
        if len(candidates) == 1:
            return (base, candidates[0][: -len(probe.removeprefix(base))])
        raise InputError(f"the weights do not match the config: no tensor {probe} in the checkpoint")

    # -- tensors

    def _handle(self, path: Path) -> Any:
        if path not in self._handles:
            try:
                self._handles[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise WorkError(
                    f"shard {path.name} is damaged ({one_line(error)}): download it again"
                ) from None
        return self._handles[path]

    def read(self, stored: str, device: torch.device | str = "cpu") -> Tensor:
        """One tensor as stored, read ahead or now. Errors: `WorkError` naming shard and tensor."""
        place = torch.device(device)
        try:
            tensor = self._prefetcher.take(stored, place)
            return self._mapped(stored).to(place) if tensor is None else tensor
        except RuntimeError as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            raise WorkError(
                f"cannot read {stored} from {self.files[stored].name}: {one_line(error)}"
            ) from None

    def _weights_dtype(self, stored: str) -> torch.dtype:
        return self._mapped(stored).dtype

    def _mapped(self, stored: str) -> Tensor:
        """One tensor in the mapped file's own memory. Errors as in `read`."""
        path = self.files.get(stored)
        if path is None:
            raise WorkError(f"the checkpoint has no tensor {stored}: download the model again")
        try:
            tensor: Tensor = self._handle(path).get_tensor(stored)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise WorkError(f"cannot read {stored} from {path.name}: {one_line(error)}") from None
        return tensor

    def prefetch(self, index: int, device: torch.device) -> None:
        """Begins to read block `index`, in the background, which `load` then finds in pinned host memory.

        For whoever is about to work on the block before: what is read ahead is dropped by the next call. Nothing
        happens past the last block, on the CPU, and where host memory is short. Errors are raised by `load`.
        """
        if index < len(self.blocks) and self._prefetcher.serves(device):
            self._prefetcher.begin(self._names_of(index))

    def _names_of(self, index: int) -> list[str]:
        """What is in the files of block `index`."""
        prefix = self.stored_name(f"{self.blocks[index]}.")
        return [name for name in self.files if name.startswith(prefix)]

    def describe(self, stored: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """dtype and shape of one tensor, from its file's header. Errors: `WorkError` naming shard and tensor."""
        path = self.files[stored]
        try:
            found = self._handle(path).get_slice(stored)
            return safetensors_files.NAMES[found.get_dtype()], tuple(found.get_shape())
        except KeyError as error:
            raise WorkError(
                f"{stored} in {path.name} is {error.args[0]}: such tensors cannot be copied"
            ) from None
        except SafetensorError as error:
            raise WorkError(f"cannot read {stored} from {path.name}: {one_line(error)}") from None

    @property
    def tied_head(self) -> tuple[str, str] | None:
        """Names of the output head's weight and of the stored tensor that it is tied to; None where it is not."""
        head = self.skeleton.get_output_embeddings()
        if head is None:
            return None
        names = {id(module): name for name, module in self.skeleton.named_modules()}
        weight = f"{names[id(head)]}.weight"
        tensor = self._tied(weight)
        embedding = self.stored_name(f"{names[id(self.skeleton.get_input_embeddings())]}.weight")
        return (weight, tensor) if tensor == embedding else None

    def load(self, module: nn.Module, prefix: str, device: torch.device, dtype: torch.dtype) -> None:
        """Gives every parameter of `module` (named `prefix`) its weights on `device`; buffers move along.

        Errors: `WorkError` for a shape that is not the config's, `FinalError` for a weight that is NaN or infinite.
        """
        finite: dict[str, Tensor] = {}
        for name, parameter in list(module.named_parameters(remove_duplicate=False)):
            full = f"{prefix}.{name}" if prefix else name
            tensor = self.read(self._tied(full), device)
            if tensor.shape != parameter.shape:
                raise WorkError(
                    f"{full} is {tuple(tensor.shape)} in the weights and {tuple(parameter.shape)} in the config"
                )
            # Never the mapped file's own memory: what is written into it would be read again.
            tensor = tensor.to(dtype, copy=tensor.device.type == "cpu")
            finite[full] = torch.isfinite(tensor).all()
            _set(module, name, nn.Parameter(tensor, requires_grad=False))
        for name, buffer in list(module.named_buffers()):
            stored = self.stored_name(f"{prefix}.{name}" if prefix else name)
            owner, _, leaf = name.rpartition(".")
            persistent = leaf not in module.get_submodule(owner)._non_persistent_buffers_set
            if persistent and stored in self.files:
                buffer = self.read(stored)
            module.get_submodule(owner)._buffers[leaf] = buffer.to(device)
        # Asked at the end: each answer waits for the device.
        if finite and not bool(torch.stack(list(finite.values())).all()):
            broken = next(name for name, each in finite.items() if not bool(each))
            raise FinalError(f"{broken} has NaN or infinite weights: the {self.what} is broken")

    def _tied(self, parameter: str) -> str:
        """The stored name of a parameter. Errors: `InputError` for an output head that is nowhere.

        A tied output head is the input embedding; transformers renames others while loading (GPT-NeoX).
        """
        stored = self.stored_name(parameter)
        if stored in self.files:
            return stored
        head, embedding = self.skeleton.get_output_embeddings(), self.skeleton.get_input_embeddings()
        names = {id(module): name for name, module in self.skeleton.named_modules()}
        if head is None or not parameter.startswith(f"{names[id(head)]}."):
            return stored
        leaf = parameter.removeprefix(f"{names[id(head)]}.")
        for other in HEAD_NAMES:
            if f"{other}.{leaf}" in self.files:
                return f"{other}.{leaf}"
        if leaf == "weight" and getattr(self.config.get_text_config(), "tie_word_embeddings", False):
            return self.stored_name(f"{names[id(embedding)]}.weight")
        raise InputError(
            f"the checkpoint has no {parameter}, and its config does not tie it to the embedding"
        )

    @staticmethod
    def release(module: nn.Module) -> None:
        """Drops the weights of `module`; its parameters are on the meta device again."""
        for name, parameter in list(module.named_parameters(remove_duplicate=False)):
            empty = torch.empty_like(parameter, device="meta")
            _set(module, name, nn.Parameter(empty, requires_grad=False))

    def outside(self) -> list[str]:
        """Stored names of every tensor that belongs to no linear inside a block: written as they are."""
        quantized = {
            self.stored_name(f"{linear.name}.weight")
            for i in range(len(self.blocks))
            for linear in self.linears(i)
        }
        return [name for name in self.files if name not in quantized]

    def side_files(self) -> list[Path]:
        """Everything in the directory that is not weights: tokenizer, generation config, templates, code, licence.

        Pickles that are no weights stay behind too (they can hold code), and paths of this machine.
        """
        found = []
        for path in sorted(self.directory.iterdir()):
            if (
                path.suffix in WEIGHT_SUFFIXES
                or path.name.endswith(".index.json")
                or path.name.startswith(".")
            ):
                continue
            if path.name == "config.json" or not path.is_file():
                continue
            found.append(self._without_places(path) if path.suffix == ".json" else path)
        return found

    def _without_places(self, path: Path) -> Path:
        """A JSON file, or a copy of it without paths of this machine (trainers and tokenizers write theirs)."""
        places = places_of_this_machine(self.directory)
        try:
            data = read_limited(path, _MAX_JSON)
            if not any(place.encode() in data for place in places):
                return path
            cleaned = without_places(json.loads(data), places)
        except (OSError, ValueError, RecursionError, InputError):
            return path  # no JSON after all, or none that anybody reads
        if self._cleaned is None:
            self._cleaned = Scratch()
        copy = self._cleaned.path / path.name
        copy.write_text(json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return copy

    def published_config(self) -> dict[str, Any]:
        """config.json for the quantized model, but for its quantization: readable by old readers, without paths."""
        config = with_old_rope_keys(read_json(self.directory / "config.json"))
        config.pop("_name_or_path", None)
        cleaned: dict[str, Any] = without_places(config, places_of_this_machine(self.directory))
        return cleaned


def _skeleton(config: Any, *, trust_remote_code: bool) -> Any:
    """The model of `config` without weights; with PyTorch's fused attention wherever it computes the same."""
    from transformers import AutoModelForCausalLM

    build: Any = partial(
        AutoModelForCausalLM.from_config, config, dtype=torch.float32, trust_remote_code=trust_remote_code
    )
    # It has no soft cap on the scores (Gemma 2): the plain implementation does.
    if not getattr(config.get_text_config(), "attn_logit_softcapping", None):
        try:
            return build(attn_implementation="sdpa")
        except ValueError as error:
            # Transformers has it for most models, not for all.
            if "attention implementation" not in str(error):
                raise
    return build(attn_implementation="eager")


def _find_blocks(skeleton: nn.Module, config: Any) -> tuple[str, nn.ModuleList]:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    count = getattr(text, "num_hidden_layers", None)
    lists = [
        (name, module)
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    lists = [(n, m) for n, m in lists if any(isinstance(x, nn.Linear) for x in m.modules())]
    if not lists:
        raise InputError(f"{type(skeleton).__name__} has no decoder blocks with linear layers: not supported")
    name, found = min(lists, key=lambda pair: pair[0].count("."))
    for path, module in found[0].named_modules():
        if re.search(r"experts?$", path.rpartition(".")[2]) or "moe" in type(module).__name__.lower():
            raise InputError(f"{type(skeleton).__name__} is a mixture of experts: not supported yet")
    return name, found


def _set(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner)._parameters[leaf] = parameter


__all__ = [
    "HEAD_NAMES",
    "WEIGHT_SUFFIXES",
    "Linear",
    "Scratch",
    "Source",
    "convert_pickles",
    "examine_config",
    "read_json",
    "tensor_files",
    "with_old_rope_keys",
]
