"""Open datasets of the library `datasets` that are on disk. The library is imported only where it is used."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llm_quantize.calibration.table import Table
from llm_quantize.errors import InputError, one_line
from llm_quantize.io.untrusted import read_limited, stays_inside

SPLITS = ("train", "validation", "test")  # by preference
_LARGEST_DICT = 1 << 20  # bytes of dataset_dict.json
_LARGEST_STATE = 64 << 20  # bytes of state.json


def is_saved_dataset(path: Path) -> bool:
    """Return whether `save_to_disk` wrote the directory `path`."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def open_saved(path: Path) -> Table:
    """Open a directory that `save_to_disk` wrote; of several splits, the first of `SPLITS` there is.

    Raises InputError where it names files outside its own directories, and what `datasets` raises.
    """
    import datasets

    _check_saved(path)
    data = datasets.load_from_disk(str(path))
    where = str(path)
    if isinstance(data, datasets.DatasetDict):
        split = pick_split(list(data), None, where)
        data, where = data[split], f"{where} ({split})"
    return arrow_table(data, where)


def arrow_table(data: Any, where: str) -> Table:
    """Wrap a `datasets.Dataset` as a table. where: its name, for messages."""

    def rows(columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        for batch in data.select_columns(list(columns)).iter(batch_size=1024):
            yield from zip(*(batch[column] for column in columns), strict=True)

    return Table(where, tuple(data.column_names), rows)


def pick_split(splits: list[str], asked: str | None, where: str) -> str:
    """Choose the split `asked`; where None, the first of `SPLITS` there is, else the first split.

    where: the name of the dataset, for messages. Raises InputError where there is no such split.
    """
    if asked is None:
        return next((s for s in SPLITS if s in splits), splits[0])
    if asked not in splits:
        raise InputError(f"{where} has no split '{asked}': it has {', '.join(splits)}")
    return asked


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and log lines of `datasets` and `huggingface_hub` within the context."""
    import datasets
    from huggingface_hub import utils as hub_utils

    libraries: tuple[Any, ...] = (datasets, hub_utils)
    before = [(lib, lib.logging.get_verbosity(), lib.are_progress_bars_disabled()) for lib in libraries]
    for lib in libraries:
        lib.logging.set_verbosity_error()
        lib.disable_progress_bars()
    try:
        yield
    finally:
        for lib, level, without_bars in before:
            lib.logging.set_verbosity(level)
            if not without_bars:
                lib.enable_progress_bars()


def _check_saved(path: Path) -> None:
    """Refuse a saved dataset that names files outside its own directories. Raises InputError."""
    parts = [path]
    if (path / "dataset_dict.json").is_file():
        splits = json.loads(read_limited(path / "dataset_dict.json", _LARGEST_DICT)).get("splits", [])
        parts = [path / _plain_name(split, path) for split in splits]
    for part in parts:
        state = json.loads(read_limited(part / "state.json", _LARGEST_STATE))
        for key in ("_data_files", "_indices_files"):
            for entry in state.get(key) or []:
                if not stays_inside(part / _plain_name(entry["filename"], path)):
                    raise InputError(f"{path} names a file that is not in it: save the dataset again")


def _plain_name(name: Any, path: Path) -> str:
    """Return `name` if it is a file name without a directory part. Raises InputError naming `path`."""
    if not isinstance(name, str) or Path(name).name != name:
        raise InputError(
            f"{path} names {one_line(name, 60)!r}, which is no file in it: save the dataset again"
        )
    return name
