"""The model to quantize: its config, tokenizer and weights, read a block at a time and never whole.

A *block* is one decoder layer. Its weights go straight from the safetensors files to the device.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm_quantize.errors import InputError, is_failure, one_line
from llm_quantize.io.untrusted import check_counts, read_json
from llm_quantize.model.config_file import check_tokenizer_config, examine_config, other_repositories
from llm_quantize.model.module_loader import load_module, release_module
from llm_quantize.model.names import TensorNames
from llm_quantize.model.side_files import SideFiles
from llm_quantize.model.skeleton import LinearLayer, build_skeleton, find_blocks, read_config
from llm_quantize.model.tensor_store import SafetensorsStore, TensorStore
from llm_quantize.model.weight_files import tensor_files


class Model:
    """A model whose weights are read when they are needed.

    directory: of its files. config: transformers' config. skeleton: the transformers model on the meta device, but for
    its buffers. tokenizer: its tokenizer. store: of its tensors. names: of its tensors on disk. modules: the blocks.
    blocks: their names, such as `model.layers.0`. dtype: of the blocks' weights.
    Raises InputError where the files are of another model.
    """

    def __init__(
        self, directory: Path, config: Any, skeleton: nn.Module, tokenizer: Any, store: TensorStore
    ) -> None:
        self.directory = directory
        self.config = config
        self.skeleton: Any = skeleton  # a transformers model, which mypy knows too little of
        self.tokenizer = tokenizer
        self.store = store
        self.list_name, self.modules = find_blocks(skeleton, config)
        self.blocks = [f"{self.list_name}.{i}" for i in range(len(self.modules))]
        first = f"{self.linears(0)[0].name}.weight"
        self.names = TensorNames(self.skeleton, config, store.files, first)
        self.dtype = store.dtype(self.names.of(first))
        if self.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise InputError(f"weights are {self.dtype}: give a model in FP16, BF16 or FP32")

    @property
    def text_config(self) -> Any:
        """The part of the config that describes the language model."""
        return self.config.get_text_config()

    @property
    def hidden_size(self) -> int:
        """Channels of the hidden states."""
        return int(self.skeleton.get_input_embeddings().weight.shape[1])

    def linears(self, index: int) -> list[LinearLayer]:
        """The linear layers of block `index`, in the order in which the module lists them."""
        return [
            LinearLayer(path, f"{self.blocks[index]}.{path}", module.out_features, module.in_features)
            for path, module in self.modules[index].named_modules()
            if isinstance(module, nn.Linear)
        ]

    def widest(self) -> int:
        """The most channels that enter or leave a linear of the first block."""
        return max(max(linear.in_features, linear.out_features) for linear in self.linears(0))

    def load(self, module: nn.Module, name: str, device: torch.device, dtype: torch.dtype) -> None:
        """Load the weights of the module called `name`. See `load_module`."""
        load_module(module, name, self.store, self.names, device, dtype)

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
            self.store.prefetch(self.names.of(f"{self.blocks[index]}."), device)


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
        with side_files.named_as_given():
            tokenizer = _open_tokenizer(side_files.path, trust_remote_code)
        model = cls(directory, config, skeleton, tokenizer, SafetensorsStore(files, "source model"))
        model.raw_config, model.side_files = raw, side_files
        config._name_or_path = str(directory)  # not the copy's, which may be gone
        return model

    @property
    def file_bytes(self) -> int:
        """Bytes of the files of weights."""
        return sum(path.stat().st_size for path in set(self.store.files.values()))

    def float_tensors(self, index: int | None) -> list[str]:
        """Stored names of what is not quantized: in block `index`, or (None) in no block."""
        prefixes = tuple(self.names.of(f"{block}.") for block in self.blocks)
        if index is None:
            return sorted(name for name in self.store.files if not name.startswith(prefixes))
        quantized = {self.names.of(f"{linear.name}.weight") for linear in self.linears(index)}
        return sorted(n for n in self.store.files if n.startswith(prefixes[index]) and n not in quantized)


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
