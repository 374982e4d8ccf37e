"""Tell which packages a tokenizer needs that are not installed. This module knows a tokenizer's files, but no model."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from llm_quantize.errors import InputError

_PACKAGES = {"protobuf": "google.protobuf", "sentencepiece": "sentencepiece"}  # by the name that pip knows
_TIKTOKEN = "tiktoken.model"  # of another format


@contextlib.contextmanager
def naming_packages(directory: Path) -> Iterator[None]:
    """Name the missing packages where a tokenizer cannot be opened for want of them.

    A sentencepiece model without a tokenizer.json is converted by transformers, which needs both packages. Where one
    is missing, it tries the file as another format, and asks for the package of that one.

    directory: of the tokenizer. Raises InputError in place of the one that is raised within the context.
    """
    try:
        yield
    except InputError as error:
        missing = missing_packages(directory)
        if not missing or not str(error).startswith("no usable tokenizer"):
            raise
        raise InputError(
            f"the tokenizer in {directory} is a sentencepiece model without tokenizer.json, and needs "
            f"{' and '.join(missing)}: pip install {' '.join(missing)}"
        ) from None


def missing_packages(directory: Path) -> list[str]:
    """Return the packages that are missing to convert the tokenizer in a directory; none where it needs none."""
    models = [path for path in directory.glob("*.model") if path.name != _TIKTOKEN]
    if not models or (directory / "tokenizer.json").exists():
        return []
    return [name for name, module in _PACKAGES.items() if not _is_installed(module)]


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that the module is in
        return False
