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

    data = data.with_format(None)  # values of Python, not of the library that it was saved for

    def rows(columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        for column in columns:
            if _opens_files(data.features[column]):
                raise InputError(f"{where}, column {column} holds images, sound or video, and no text")
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
    """Refuse a saved dataset that reads files outside its own directories. Raises InputError naming the file."""
    parts = [path]
    if (path / "dataset_dict.json").exists():
        splits = _read(path, path / "dataset_dict.json", _LARGEST_DICT).get("splits")
        if not isinstance(splits, list) or not splits:
            raise InputError(f"cannot read {path}: dataset_dict.json names no splits: save the dataset again")
        parts = [path / _plain_name(split, path) for split in splits]
    for part in parts:
        if part != path and part.resolve().parent != path.resolve():
            raise _leads_out(path, part)
        _read(path, part / "dataset_info.json", _LARGEST_STATE)
        state = _read(path, part / "state.json", _LARGEST_STATE)
        for key in ("_data_files", "_indices_files"):
            entries = state.get(key) or []
            if not isinstance(entries, list):
                raise InputError(
                    f"cannot read {path}: {key} of state.json is no list: save the dataset again"
                )
            for entry in entries:
                name = entry.get("filename") if isinstance(entry, dict) else entry
                _check_inside(path, part / _plain_name(name, path))


def _read(path: Path, file: Path, limit: int) -> dict[str, Any]:
    """Read a JSON object from a file of the saved dataset `path`. Raises InputError."""
    _check_inside(path, file)
    try:
        found = json.loads(read_limited(file, limit))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"cannot read {path}: {file.name}: {one_line(error)}: save the dataset again"
        ) from None
    if not isinstance(found, dict):
        raise InputError(f"cannot read {path}: {file.name} holds no JSON object: save the dataset again")
    return found


def _check_inside(path: Path, file: Path) -> None:
    """Refuse what is not a regular file in its own directory, links resolved. Raises InputError naming the file."""
    if not file.exists():
        raise InputError(f"cannot read {path}: {one_line(file.name, 60)} is missing: save the dataset again")
    if not file.is_file():
        raise InputError(f"{one_line(file.name, 60)} in {path} is not a regular file: save the dataset again")
    if not stays_inside(file):
        raise _leads_out(path, file)


def _leads_out(path: Path, file: Path) -> InputError:
    return InputError(f"{one_line(file.name, 60)} in {path} leads out of it: put a copy in its place")


def _plain_name(name: Any, path: Path) -> str:
    """Return `name` if it is a file name without a directory part. Raises InputError naming `path`."""
    if not isinstance(name, str) or Path(name).name != name or "\0" in name:
        raise InputError(
            f"{path} names {one_line(name, 60)!r}, which is no file in it: save the dataset again"
        )
    return name


def _opens_files(feature: Any) -> bool:
    """Return whether values of a column's type are files that `datasets` opens: images, sound, video."""
    if isinstance(feature, dict):
        return any(map(_opens_files, feature.values()))
    if isinstance(feature, list | tuple):
        return any(map(_opens_files, feature))
    return hasattr(feature, "decode_example") or _opens_files(getattr(feature, "feature", ()))
