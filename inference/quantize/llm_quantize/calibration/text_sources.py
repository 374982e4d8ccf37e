"""Find and open text by what the user wrote: a name, a hub dataset, a local file or a saved dataset.

This module knows nothing of tokens. It imports heavy packages only to open a source, so that `locate` can refuse the
user's input at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from llm_quantize.calibration.hub_datasets import KINDS, NAMES, HubData, not_a_dataset, open_hub
from llm_quantize.calibration.local_files import file_suffix, open_file
from llm_quantize.calibration.saved_datasets import is_saved_dataset, open_saved, quiet
from llm_quantize.calibration.table import Table
from llm_quantize.calibration.text_use import CALIBRATION, TextUse
from llm_quantize.errors import InputError, one_line
from llm_quantize.io.hub import REPO_ID, hub_error, looks_like_path

LOCAL = "a local .txt, .jsonl, .json, .csv or .parquet file, or a directory from save_to_disk"


def locate(data: str, use: TextUse = CALIBRATION) -> Path | HubData:
    """Find what `data` means: an existing file or saved dataset, or a dataset on the hub. Uses no network.

    data: the value of `--calib_data` or a like flag.

    Raises InputError: no such path, unknown suffix, a directory without a saved dataset, a malformed hub id, a name
    by which `datasets` would read local files.
    """
    try:
        path = Path(data).expanduser()
        exists = data.partition(":")[0] not in NAMES and path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a user without a home
        raise InputError(f"cannot look for {data}: {one_line(error)}") from None
    if exists:
        if path.is_dir():
            if not is_saved_dataset(path):
                raise InputError(f"{data} holds no dataset written by save_to_disk: give {LOCAL}")
        elif not path.is_file():
            raise InputError(f"{data} is no file but a pipe or a device: give {LOCAL}")
        elif file_suffix(path) is None:
            raise InputError(
                f"cannot tell what {data} is by its name: give {LOCAL} (.gz too, but for parquet)"
            )
        return path
    if looks_like_path(data) or file_suffix(path) is not None:
        raise InputError(f"no such file or directory: {data}")
    repo, *rest = data.split(":")
    if len(rest) > 3 or (repo not in NAMES and not REPO_ID.fullmatch(repo)):
        raise InputError(
            f"cannot read '{data}' as {use.what}: give {', '.join(NAMES)}, "
            f"a hub id repo[:config[:split[:column]]], or {LOCAL}"
        )
    if repo in KINDS:
        raise not_a_dataset(repo)
    given = {key: value for key, value in zip(("config", "split", "column"), rest, strict=False) if value}
    found = replace(NAMES.get(repo, HubData(repo)), **given)
    if Path(found.repo).exists():
        raise InputError(
            f"{found.repo} is also a name in the current directory, which would be read in place of the hub's "
            f"dataset: start from another directory, or give {LOCAL}"
        )
    return found


def open_table(source: Path | HubData, *, seed: int, use: TextUse = CALIBRATION) -> Table:
    """Open what `locate` found. seed: the order of the files of a streamed dataset.

    Raises InputError: unreadable, unreachable, or no such configuration or split (the message lists those there are).
    Raises WorkError: the hub's cache is not writable, or the disk is full.
    """
    with reading(source, use):
        if isinstance(source, HubData):
            with quiet():
                return open_hub(source, seed)
        if source.is_dir():
            with quiet():
                return open_saved(source)
        return open_file(source)


@contextlib.contextmanager
def reading(source: Path | HubData, use: TextUse = CALIBRATION) -> Iterator[None]:
    """Turn any exception from opening or reading `source` into one line: InputError, or WorkError for a full disk."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if isinstance(source, HubData):
            failure = hub_error(error, "dataset", source.repo)
            if isinstance(failure, InputError):
                failure = InputError(f"{failure}. Without the hub, {use.data} takes {LOCAL}")
            raise failure from error
        if isinstance(error, UnicodeError):
            encoding = getattr(
                error, "encoding", "utf-8"
            ).upper()  # of UTF-16 and UTF-32 without the byte order
            raise InputError(f"cannot read {source}: not {encoding} text ({one_line(error)})") from error
        raise InputError(f"cannot read {source}: {one_line(error)}") from error
