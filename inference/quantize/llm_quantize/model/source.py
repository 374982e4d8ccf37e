"""The model to quantize: its config, tokenizer and weights, read a block at a time and never whole.

A *block* is one decoder layer. Its weights go straight from the safetensors files to the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm_quantize.errors import InputError, is_failure, one_line
from llm_quantize.io.untrusted import check_counts, read_json
from llm_quantize.model.config_file import check_tokenizer_config, examine_config, other_repositories
from llm_quantize.model.module_loader import load_module, release_module
from llm_quantize.model.side_files import SideFiles
from llm_quantize.model.skeleton import LinearLayer, build_skeleton, find_blocks, read_config
from llm_quantize.model.tensor_store import SafetensorsStore, TensorStore
from llm_quantize.model.weight_check import check_weights
from llm_quantize.model.weight_files import check_no_adapter, tensor_files
from llm_quantize.model.weight_map import WeightMap


class Model:
    """A model whose weights are read when they are needed.

    directory: of its files. config: transformers' config. skeleton: the transformers model on the meta device, but for
    its buffers. tokenizer: its tokenizer. store: of its tensors. weights: which of them give which parameter. modules:
    the blocks. blocks: their names, such as `model.layers.0`. dtype: of the blocks' weights.
    Raises InputError where the files are of another model.
    """

    def __init__(
        self,
        directory: Path,
        config: Any,
        skeleton: nn.Module,
        tokenizer: Any,
        store: TensorStore,
        weights: WeightMap | None = None,
    ) -> None:
        self.directory = directory
        self.config = config
        self.skeleton: Any = skeleton  # a transformers model, which mypy knows too little of
        self.tokenizer = tokenizer
        self.store = store
        self.list_name, self.modules = find_blocks(skeleton, config)
        self.blocks = [f"{self.list_name}.{i}" for i in range(len(self.modules))]
        self.weights = weights or WeightMap(skeleton, store.files)
        if self.weights.missing:
            raise InputError(f"the {store.what} has no {self.weights.missing[0]}: is it of another model?")
        self._float_linears: set[str] = set()
        self.dtype = store.dtype(f"{self.stored_linear(self.linears(0)[0].name)}.weight")

    @property
    def text_config(self) -> Any:
        """The part of the config that describes the language model."""
        return self.config.get_text_config()

    @property
    def hidden_size(self) -> int:
        """Channels of the hidden states."""
        return int(self.skeleton.get_input_embeddings().weight.shape[1])

    def linears(self, index: int) -> list[LinearLayer]:
        """The linear layers of block `index` that are quantized, in the order in which the module lists them."""
        return [
            LinearLayer(path, name, module.out_features, module.in_features)
            for path, module in self.modules[index].named_modules()
            if isinstance(module, nn.Linear)
            and (name := f"{self.blocks[index]}.{path}") not in self._float_linears
        ]

    def all_linears(self) -> Iterator[LinearLayer]:
        """The linear layers of all blocks that are quantized, block by block."""
        for index in range(len(self.blocks)):
            yield from self.linears(index)

    def leave_float(self, names: set[str]) -> None:
        """Take the linears called `names` out of those that are quantized."""
        self._float_linears |= names

    def stored_linear(self, name: str) -> str:
        """The name under which the checkpoint has the linear called `name`.

        Raises InputError where its weight is not one stored tensor.
        """
        stored = self.weights.stored_name(f"{name}.weight")
        if stored is None or not stored.endswith(".weight"):
            found = ", ".join(self.weights.sources(f"{name}.weight")[:3])
            raise InputError(f"{name} is stored as {found or 'nothing'}: this architecture is not supported")
        return stored.removesuffix(".weight")

    @property
    def tied_head(self) -> tuple[str, str] | None:
        """The output head's weight, and the stored tensor to which it is tied; None where it has its own."""
        head, embedding = self.skeleton.get_output_embeddings(), self.skeleton.get_input_embeddings()
        if head is None:
            return None
        weight = f"{self._name_of(head)}.weight"
        stored = self.weights.stored_name(weight)
        if stored is None or stored != self.weights.stored_name(f"{self._name_of(embedding)}.weight"):
            return None
        return weight, stored

    def _name_of(self, module: nn.Module) -> str:
        """The name of a module of the skeleton."""
        names: dict[nn.Module, str] = {each: name for name, each in self.skeleton.named_modules()}
        return names[module]

    def widest(self) -> int:
        """The most channels that enter or leave a linear of the first block."""
        return max(max(linear.in_features, linear.out_features) for linear in self.linears(0))

    def load(self, module: nn.Module, name: str, device: torch.device, dtype: torch.dtype) -> None:
        """Load the weights of the module called `name`. See `load_module`."""
        load_module(module, name, self.store, self.weights, device, dtype)

    def load_block(self, index: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Load the weights of block `index`, and return it."""
        self.load(self.modules[index], self.blocks[index], device, dtype)
        return self.modules[index]

    @staticmethod
    def release(module: nn.Module) -> None:
        """Drop the weights of `module`."""
        release_module(module)

    def prefetch(self, index: int, device: torch.device) -> None:
        """Begin to read block `index` in the background; nothing happens past the last one. See `TensorStore`."""
        if index < len(self.blocks):
            self.store.prefetch(self._stored_in(index), device)

    def _stored_in(self, index: int) -> list[str]:
        """The stored tensors of block `index`, each once."""
        module, prefix = self.modules[index], self.blocks[index]
        named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]
        return list(dict.fromkeys(s for name, _ in named for s in self.weights.sources(f"{prefix}.{name}")))


class SourceModel(Model):
    """The model to quantize, as its files hold it.

    raw_config: what config.json holds. side_files: what lies beside the weights. Both are as they were at the start.
    """

    store: SafetensorsStore
    raw_config: dict[str, Any]
    side_files: SideFiles

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        weights: Path | None = None,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
        on_config: Callable[[Any], None] = lambda _: None,
        warn: Callable[[str], None] = lambda _: None,
    ) -> SourceModel:
        """Read config and tokenizer, and build the skeleton; no weights. Raises InputError.

        weights: the directory of the weights, where that is another one.
        on_config: is given the config, once the files are found sound and before what takes seconds.
        warn: is given what the user should know before code of the model runs, one line each.
        """
        check_no_adapter(directory)
        side_files = SideFiles(directory)
        raw = examine_config(side_files.path, directory)
        tokenizer_config = _tokenizer_config(side_files)
        check_tokenizer_config(tokenizer_config)
        if trust_remote_code:
            for repository in other_repositories(raw, tokenizer_config):
                warn(
                    f"code of another repository, {one_line(repository, 100)}, is fetched and run: auto_map names it"
                )
        files = tensor_files(weights or directory, allow_pickle=allow_pickle)
        check_counts(raw, len(files))
        with side_files.named_as_given():
            config = read_config(side_files.path, raw, trust_remote_code=trust_remote_code)
        on_config(config)
        skeleton = build_skeleton(config, set(files.values()), trust_remote_code=trust_remote_code)
        find_blocks(skeleton, config)  # refuses an architecture before its weights
        store = SafetensorsStore(files, "source model")
        names = WeightMap(skeleton, files)
        check_weights(skeleton, names, store)
        with side_files.named_as_given():
            tokenizer = _open_tokenizer(side_files.path, trust_remote_code)
        model = cls(directory, config, skeleton, tokenizer, store, names)
        model.raw_config, model.side_files = raw, side_files
        config._name_or_path = str(directory)  # not the copy's, which may be gone
        return model

    @property
    def file_bytes(self) -> int:
        """Bytes of the files of weights."""
        return sum(path.stat().st_size for path in set(self.store.files.values()))

    @property
    def stored_blocks(self) -> str:
        """The stored name of the list of blocks."""
        linear = self.linears(0)[0]
        stored = self.stored_linear(linear.name)
        return (
            stored.removesuffix(f".0.{linear.path}")
            if stored.endswith(f".0.{linear.path}")
            else self.list_name
        )

    @property
    def head(self) -> str:
        """The output head's stored name; `lm_head` where the model has none."""
        module = self.skeleton.get_output_embeddings()
        return "lm_head" if module is None else self._stored_module(self._name_of(module))

    @cached_property
    def untied_head(self) -> str | None:
        """The output head's stored tensor where the config ties it to an embedding that differs; None elsewhere.

        transformers then ties nothing. Reads both.
        """
        configs = (self.config, self.text_config)
        if not any(getattr(config, "tie_word_embeddings", False) for config in configs):
            return None
        head, embedding = self.skeleton.get_output_embeddings(), self.skeleton.get_input_embeddings()
        if head is None:
            return None
        found = [self.weights.stored_name(f"{self._name_of(module)}.weight") for module in (head, embedding)]
        if None in found or found[0] == found[1]:
            return None
        first, second = (self.store.read(stored) for stored in found if stored is not None)
        return None if torch.equal(first, second) else found[0]

    def float_modules(self) -> list[str]:
        """The modules of the whole model that readers could take for quantized linears, under their stored names."""
        quantized = {linear.name for linear in self.all_linears()}
        names = [
            name
            for name, module in self.skeleton.named_modules()
            if isinstance(module, nn.Linear) and name not in quantized
        ]
        # What the model does not use another reader may build (layers that predict further tokens).
        unused = [
            stored.removesuffix(".weight")
            for stored in self.weights.unused
            if stored.endswith(".weight") and len(self.store.describe(stored)[1]) == 2
        ]
        return list(dict.fromkeys([*map(self._stored_module, names), *unused]))

    def _stored_module(self, name: str) -> str:
        """The stored name of a linear, or its own where its weight is tied to another's or made of several."""
        stored = self.weights.stored_name(f"{name}.weight") or ""
        leaf = name.rpartition(".")[2]
        found = stored.removesuffix(".weight")
        return found if found != stored and found.rpartition(".")[2] == leaf else name

    @cached_property
    def _floats(self) -> dict[int | None, list[str]]:
        """Stored names of what is not quantized, by block."""
        found: dict[int | None, list[str]] = {}
        inside: set[str] = set()
        for index in range(len(self.blocks)):
            stored = self._stored_in(index)
            inside |= set(stored)
            quantized = {f"{self.stored_linear(linear.name)}.weight" for linear in self.linears(index)}
            found[index] = sorted(set(stored) - quantized)
        found[None] = sorted(set(self.store.files) - inside)
        return found

    def float_tensors(self, index: int | None) -> list[str]:
        """Stored names of what is not quantized: in block `index`, or (None) in no block."""
        return list(self._floats[index])


def _tokenizer_config(files: SideFiles) -> dict[str, Any]:
    """What tokenizer_config.json holds; nothing where there is none."""
    if "tokenizer_config.json" not in files.digests:
        return {}
    try:
        return read_json(files.path / "tokenizer_config.json")
    except InputError as error:
        raise InputError(f"no usable tokenizer in {files.directory}: {error}") from None


def _open_tokenizer(directory: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

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
    return tokenizer
