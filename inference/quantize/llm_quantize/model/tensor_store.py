"""Tensors by their names on disk, read one at a time or prefetched a block at a time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llm_quantize.errors import WorkError, one_line
from llm_quantize.io.pinned_copies import Prefetcher
from llm_quantize.io.safetensors_files import NAMES


class TensorStore(Protocol):
    """Where a model's tensors come from.

    files: the file of each tensor that can be read. what: the store, as messages name it.
    """

    files: dict[str, Path]
    what: str

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """One tensor on `device`. Raises WorkError naming file and tensor."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which `read` gives a tensor."""
        ...

    def prefetch(self, names: Iterable[str], device: torch.device) -> None:
        """Begin to read tensors in the background, for `read` on `device`.

        The next call drops what has not been read. Nothing happens on the CPU, and where host memory is short. `read`
        raises the errors.
        """
        ...


class SafetensorsStore:
    """A `TensorStore` of tensors as safetensors files hold them."""

    def __init__(self, files: dict[str, Path], what: str) -> None:
        self.files = files
        self.what = what
        self._handles: dict[Path, Any] = {}
        self._prefetcher = Prefetcher(self._mapped)

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        place = torch.device(device)
        try:
            tensor = self._prefetcher.take(name, place)
            return self._mapped(name).to(place) if tensor is None else tensor
        except RuntimeError as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            raise WorkError(f"cannot read {name} from {self.files[name].name}: {one_line(error)}") from None

    def dtype(self, name: str) -> torch.dtype:
        return self._mapped(name).dtype

    def prefetch(self, names: Iterable[str], device: torch.device) -> None:
        if self._prefetcher.serves(device):
            self._prefetcher.start(names)

    def describe(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """The dtype and shape of a tensor, from its file's header. Raises WorkError naming file and tensor."""
        path = self.files[name]
        try:
            found = self._handle(path).get_slice(name)
            return NAMES[found.get_dtype()], tuple(found.get_shape())
        except KeyError as error:
            raise WorkError(
                f"{name} in {path.name} is {error.args[0]}: such tensors cannot be copied"
            ) from None
        except SafetensorError as error:
            raise WorkError(f"cannot read {name} from {path.name}: {one_line(error)}") from None

    def _handle(self, path: Path) -> Any:
        if path not in self._handles:
            try:
                self._handles[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise WorkError(
                    f"shard {path.name} is damaged ({one_line(error)}): download it again"
                ) from None
        return self._handles[path]

    def _mapped(self, name: str) -> Tensor:
        """A tensor in the mapped file's own memory. Raises WorkError."""
        path = self.files.get(name)
        if path is None:
            raise WorkError(f"the checkpoint has no tensor {name}: download the model again")
        try:
            tensor: Tensor = self._handle(path).get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise WorkError(f"cannot read {name} from {path.name}: {one_line(error)}") from None
        return tensor
