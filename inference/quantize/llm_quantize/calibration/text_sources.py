"""Where text comes from: names, hub datasets, local files and saved datasets, each opened as a `Table`.

Knows nothing about tokens. `datasets` and `pyarrow` are imported where they are used, so that `locate` can
look at what the user typed before anything heavy starts.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import itertools
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from llm_quantize.errors import InputError, one_line
from llm_quantize.io.hub import HUB_TIMEOUT, REPO_ID, hub_reason, looks_like_path
from llm_quantize.io.untrusted import read_limited, stays_inside

SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet", ".txt.gz", ".jsonl.gz", ".json.gz", ".csv.gz")
LOCAL = "a local .txt, .jsonl, .json, .csv or .parquet file, or a directory from save_to_disk"
SPLITS = ("train", "validation", "test")
COLUMNS = ("text", "messages", "conversations", "content")
# A hub dataset up to this size is downloaded and then serves without a network; a larger one is streamed.
DOWNLOAD_LIMIT = 256 << 20
SIDE_BY_SIDE = 8  # files of a streamed dataset
BLOCK = 1 << 20  # characters of a text file read at once
# What text from strangers may take: a line, a document read whole, and how far a packed file may grow.
LINE = 64 << 20
WHOLE = 1 << 30
GROWTH, GROWTH_FREE = 100, 64 << 20  # text packs to a third, repetitive text to a twentieth
HEADER = 1 << 20  # of a CSV file


@dataclass(frozen=True, slots=True)
class HubData:
    """A dataset on the hub; None stands for what the repository itself prefers."""

    repo: str
    config: str | None = None
    split: str | None = None
    column: str | None = None


NAMES = {
    "wikitext": HubData("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
    "c4": HubData("allenai/c4", "en", "train"),
    "pileval": HubData("mit-han-lab/pile-val-backup", None, "validation"),
}


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text, opened but not read.

    `read(column)` yields that column's values in order and may be called again. `streamed`: reading costs
    network, so stop when there is enough, and articles are joined already. `single`: the rows are consecutive
    parts of one document.
    """

    where: str
    columns: tuple[str, ...]
    read: Callable[[str], Iterator[Any]]
    streamed: bool = False
    single: bool = False

    def documents(self, column: str) -> Iterator[Any]:
        """The column's values, one for each document."""
        rows = self.read(column)
        return rows if self.single or self.streamed else articles(rows)

    def column(self, asked: str | None) -> str:
        """The column to read: the one asked for, else the first usual name, else the only one there is."""
        has = f"{self.where} has {', '.join(self.columns) or 'none'}"
        if asked is not None:
            if asked not in self.columns:
                raise InputError(f"no column '{asked}': {has}: choose with --calib_column")
            return asked
        usual = [name for name in COLUMNS if name in self.columns]
        if usual or len(self.columns) == 1:
            return (usual or list(self.columns))[0]
        raise InputError(f"no column 'text': {has}: choose with --calib_column")


def locate(data: str) -> Path | HubData:
    """What `--calib_data` means: an existing file or saved dataset, or a dataset on the hub. No network.

    Raises InputError: missing path, unknown extension, a directory without a saved dataset, a malformed id.
    """
    try:
        path = Path(data).expanduser()
        there = data.partition(":")[0] not in NAMES and path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a user without a home
        raise InputError(f"cannot look for {data}: {one_line(error)}") from None
    if there:
        if path.is_dir():
            if not any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
                raise InputError(f"{data} holds no dataset written by save_to_disk: give {LOCAL}")
        elif not path.is_file():
            raise InputError(f"{data} is no file but a pipe or a device: give {LOCAL}")
        elif _suffix(path) is None:
            raise InputError(
                f"cannot tell what {data} is by its name: give {LOCAL} (.gz too, but for parquet)"
            )
        return path
    if looks_like_path(data) or _suffix(path) is not None:
        raise InputError(f"no such file or directory: {data}")
    repo, *rest = data.split(":")
    if len(rest) > 3 or (repo not in NAMES and not REPO_ID.fullmatch(repo)):
        raise InputError(
            f"cannot read '{data}' as calibration data: give {', '.join(NAMES)}, "
            f"a hub id repo[:config[:split[:column]]], or {LOCAL}"
        )
    given = {key: value for key, value in zip(("config", "split", "column"), rest, strict=False) if value}
    return replace(NAMES.get(repo, HubData(repo)), **given)


def open_table(source: Path | HubData, *, seed: int) -> Table:
    """Opens what `locate` found. `seed` chooses which files of a streamed dataset are read first.

    Raises InputError: unreadable, unreachable, or no such configuration or split (names those there are).
    """
    if isinstance(source, HubData):
        with reading(source), quiet():
            return _open_hub(source, seed)
    with reading(source):
        if source.is_dir():
            with quiet():
                return _open_saved(source)
        kind = (_suffix(source) or "").removesuffix(".gz")
        return {".txt": _open_txt, ".csv": _open_csv, ".parquet": _open_parquet}.get(kind, _open_json)(source)


@contextlib.contextmanager
def reading(source: Path | HubData) -> Iterator[None]:
    """Turns whatever opening or reading `source` raises into one line of InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if isinstance(source, HubData):
            reason = hub_reason(error, "dataset", source.repo)
            raise InputError(f"{reason}. Without the hub, --calib_data takes {LOCAL}") from error
        if isinstance(error, UnicodeError):
            raise InputError(f"cannot read {source}: not UTF-8 text ({one_line(error)})") from error
        raise InputError(f"cannot read {source}: {one_line(error)}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and log lines of `datasets` and `huggingface_hub`."""
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


def _suffix(path: Path) -> str | None:
    name = path.name.lower()
    return next((s for s in SUFFIXES if name.endswith(s)), None)


class _Unpacked(io.RawIOBase):
    """The bytes of a gzip file. Errors: `InputError` where they are more than text ever packs so small."""

    def __init__(self, path: Path) -> None:
        self._name = path
        self._file = gzip.open(path, "rb")  # noqa: SIM115 (closed with this)
        self._left = GROWTH_FREE + GROWTH * path.stat().st_size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        self._left -= count
        if self._left < 0:
            raise InputError(f"{self._name} unpacks to more than {GROWTH} times its size: no text does")
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _text_file(path: Path, newline: str | None = None) -> IO[str]:
    if path.suffix.lower() != ".gz":
        return open(path, encoding="utf-8-sig", newline=newline)
    unpacked = io.BufferedReader(_Unpacked(path), 1 << 16)
    return io.TextIOWrapper(unpacked, encoding="utf-8-sig", newline=newline)


def _lines(file: IO[str], path: Path, limit: int = LINE) -> Iterator[str]:
    """The lines of a file. Errors: `InputError` for one of more than `limit` characters."""
    number = 0
    while line := file.readline(limit + 1):
        number += 1
        if len(line) > limit:
            raise InputError(f"cannot read {path}: line {number} is longer than {limit >> 20} MiB")
        yield line


def _open_txt(path: Path) -> Table:
    def read(column: str) -> Iterator[str]:
        with _text_file(path) as file:
            while block := file.read(BLOCK):
                yield block + file.readline(BLOCK)

    return Table(str(path), ("text",), read, single=True)


def _open_csv(path: Path) -> Table:
    csv.field_size_limit(LINE)  # the default, 128 KiB, is less than a long document

    def read(column: str) -> Iterator[str | None]:
        with _text_file(path, newline="") as file:
            for row in csv.DictReader(_lines(file, path, LINE // 4), strict=True):
                yield row[column]

    with _text_file(path, newline="") as file:
        columns = tuple(next(csv.reader(_lines(file, path, HEADER)), ()))
    return Table(str(path), columns, read)


def _open_parquet(path: Path) -> Table:
    import pyarrow.parquet as pq

    def read(column: str) -> Iterator[Any]:
        # A text that is stored once and meant a million times stays one: taken out of its dictionary alone.
        with pq.ParquetFile(path, read_dictionary=[column] if column in texts else None) as file:
            # Not of the column alone: pyarrow ends the process at a column's damaged metadata.
            groups = range(file.metadata.num_row_groups)
            stored = [file.metadata.row_group(i).total_byte_size for i in groups]
            if sum(stored) > GROWTH_FREE + GROWTH * path.stat().st_size:
                raise InputError(f"{path} unpacks to more than {GROWTH} times its size: no text does")
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for value in batch.column(0):
                    yield value.as_py()

    with pq.ParquetFile(path) as file:
        columns = tuple(file.schema_arrow.names)
        texts = {n for n, kind in zip(columns, file.schema_arrow.types, strict=True) if str(kind) == "string"}
    return Table(str(path), columns, read)


def _open_json(path: Path) -> Table:
    """One record a line, or one document: a list of records, or an object that holds one. Records are objects
    or plain strings."""

    def lines() -> Iterator[Any]:
        with _text_file(path) as file:
            for number, line in enumerate(_lines(file, path), 1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except json.JSONDecodeError as error:
                        raise InputError(f"cannot read {path}: line {number} is not JSON ({error})") from None

    def whole() -> Iterable[Any]:
        with _text_file(path) as file:
            text = file.read(WHOLE + 1)
        if len(text) > WHOLE:
            raise InputError(f"{path} is one document of more than {WHOLE >> 30} GiB: give one record a line")
        value = json.loads(text)
        if isinstance(value, dict):
            lists = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
            is_record = any(name in value for name in COLUMNS)
            return lists[0] if len(lists) == 1 and not is_record else [value]
        return value if isinstance(value, list) else [value]

    records: Callable[[], Iterable[Any]] = lines
    # Many a .json holds one record a line: its first line is JSON, and others follow.
    if ".json" in path.suffixes[-2:] and not _by_lines(path):
        loaded = whole()
        records = lambda: loaded  # noqa: E731

    def read(column: str) -> Iterator[Any]:
        for record in records():
            if isinstance(record, dict):
                yield record.get(column)
            elif isinstance(record, str):
                yield record if column == "text" else None
            else:
                raise InputError(
                    f"{path} holds {type(record).__name__} records: they must be objects or strings"
                )

    first: Any = next(iter(records()), {})
    return Table(str(path), tuple(first) if isinstance(first, dict) else ("text",), read)


def _by_lines(path: Path) -> bool:
    """Whether a .json file holds a record on each line rather than one document."""
    with _text_file(path) as file:
        filled = (line for line in _lines(file, path, WHOLE) if line.strip())
        try:
            json.loads(next(filled, ""))
        except json.JSONDecodeError:
            return False
        return next(filled, None) is not None


def _check_saved(path: Path) -> None:
    """Refuses a saved dataset whose files are not in its own directories. Errors: `InputError`."""
    parts = [path]
    if (path / "dataset_dict.json").is_file():
        splits = json.loads(read_limited(path / "dataset_dict.json", HEADER)).get("splits", [])
        parts = [path / _plain(split, path) for split in splits]
    for part in parts:
        state = json.loads(read_limited(part / "state.json", LINE))
        for key in ("_data_files", "_indices_files"):
            for entry in state.get(key) or []:
                if not stays_inside(part / _plain(entry["filename"], path)):
                    raise InputError(f"{path} names a file that is not in it: save the dataset again")


def _plain(name: Any, path: Path) -> str:
    if not isinstance(name, str) or Path(name).name != name:
        raise InputError(
            f"{path} names {one_line(name, 60)!r}, which is no file in it: save the dataset again"
        )
    return name


def _open_saved(path: Path) -> Table:
    import datasets

    _check_saved(path)

    data = datasets.load_from_disk(str(path))
    where = str(path)
    if isinstance(data, datasets.DatasetDict):
        split = _pick_split(list(data), None, where)
        data, where = data[split], f"{where} ({split})"
    return _arrow_table(data, where)


def _arrow_table(data: Any, where: str) -> Table:
    def read(column: str) -> Iterator[Any]:
        for batch in data.select_columns([column]).iter(batch_size=1024):
            yield from batch[column]

    return Table(where, tuple(data.column_names), read)


def _pick_split(splits: list[str], asked: str | None, where: str) -> str:
    if asked is None:
        return next((s for s in SPLITS if s in splits), splits[0])
    if asked not in splits:
        raise InputError(f"{where} has no split '{asked}': it has {', '.join(splits)}")
    return asked


def _builder(source: HubData) -> Any:
    """What `datasets` knows of the repository, or of its copy in the cache where the hub does not answer."""
    import datasets
    from huggingface_hub import HfApi

    # Asked first and once: `datasets` tries an unreachable hub for half a minute, and loses the reason.
    refusal: Exception | None = None
    try:
        HfApi().dataset_info(source.repo, timeout=HUB_TIMEOUT)
    except Exception as error:
        refusal = error
    offline = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = offline or refusal is not None
    try:
        return datasets.load_dataset_builder(source.repo, source.config)
    except Exception:
        if refusal is None:
            raise
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    raise refusal


def _open_hub(source: HubData, seed: int) -> Table:
    try:
        builder = _builder(source)
    except ValueError as error:
        # Both "not found" and "pick one" say what there is in brackets, and nowhere else.
        there = re.search(r"\[(.*)\]", str(error))
        if there is None:
            raise
        names = there[1].replace("'", "")
        wrong = f"has no configuration '{source.config}'" if source.config else "has several configurations"
        raise InputError(f"{source.repo} {wrong}: name one as {source.repo}:CONFIG: {names}") from None
    files = builder.config.data_files  # None where the hub is out of reach and the cache answers
    splits = list(files or builder.info.splits or ())
    label = f"{source.repo}:{source.config}" if source.config else source.repo
    split = _pick_split(splits, source.split, label)
    label = f"{label}:{split}"
    if files is None or not _is_large(builder):
        builder.download_and_prepare(verification_mode="no_checks")
        return _arrow_table(builder.as_dataset(split=split), label)

    _register_zstd()
    data = builder.as_streaming_dataset(split=split)
    columns = data.column_names or list(next(iter(data), {}))
    # Files in an order that the seed gives, several side by side: one file may hold one subject alone.
    count = data.num_shards
    order = random.Random(seed).sample(range(count), count)

    def shard(column: str, index: int) -> Iterator[Any]:
        rows = data.select_columns([column]).shard(num_shards=count, index=index)
        return articles(row[column] for row in rows)

    def read(column: str) -> Iterator[Any]:
        for start in range(0, count, SIDE_BY_SIDE):
            yield from _in_turn([shard(column, i) for i in order[start : start + SIDE_BY_SIDE]])

    return Table(label, tuple(columns), read, streamed=True)


def _in_turn(iterators: list[Iterator[Any]]) -> Iterator[Any]:
    """One value of each, again and again, until all are at their end."""
    end = object()
    while iterators:
        for iterator in tuple(iterators):
            if (value := next(iterator, end)) is end:
                iterators.remove(iterator)
            else:
                yield value


def _is_large(builder: Any) -> bool:
    """Whether the files of all splits, which are downloaded together, exceed the limit, or need streaming."""
    from huggingface_hub import HfApi

    urls = [str(url) for files in builder.config.data_files.values() for url in files]
    if len(urls) > 100 or any(url.endswith((".zst", ".zstd")) for url in urls):
        return True
    pattern = re.compile(r"hf://datasets/(?P<repo>[^@]+)@(?P<revision>[^/]+)/(?P<path>.+)")
    matches = [pattern.fullmatch(url) for url in urls]
    found = [m for m in matches if m is not None]
    if not found or len(found) < len(urls):
        return True
    info = HfApi().get_paths_info(
        found[0]["repo"], [m["path"] for m in found], revision=found[0]["revision"], repo_type="dataset"
    )
    return sum(getattr(entry, "size", 0) for entry in info) > DOWNLOAD_LIMIT


def _register_zstd() -> None:
    """Lets `datasets` stream .zst files (pileval is one) by pyarrow where no zstd package is there."""
    import pyarrow
    from fsspec import compression  # type: ignore[import-untyped]

    if "zstd" not in compression.compr:

        def open_zstd(file: Any, mode: str = "rb", **_: Any) -> Any:
            return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")

        compression.register_compression("zstd", open_zstd, "zst")


def articles(values: Iterable[Any]) -> Iterator[Any]:
    """Joins rows that are lines of articles, as wikitext has them, so that an article is one document again.

    Such rows are known by a title line, ` = Title = `, among the first; other rows pass through as they are.
    """
    rows = iter(values)
    head = list(itertools.islice(rows, 256))
    if not any(isinstance(row, str) and _TITLE.fullmatch(row) for row in head):
        yield from itertools.chain(head, rows)
        return
    lines: list[str] = []
    for row in itertools.chain(head, rows):
        if _TITLE.fullmatch(row or "") and lines:
            yield "\n".join(lines)
            lines = []
        lines.append((row or "").removesuffix("\n"))
    yield "\n".join(lines)


_TITLE = re.compile(r" ?= (?!=).*(?<!=) = ?\n?")
