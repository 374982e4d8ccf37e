"""Open datasets on the Hugging Face hub: download small ones, stream large ones.

`datasets` and `huggingface_hub` are imported only where they are used.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llm_quantize.calibration.saved_datasets import arrow_table, pick_split
from llm_quantize.calibration.table import Table, articles
from llm_quantize.errors import InputError
from llm_quantize.io import hub

# Bytes. A dataset up to this size is downloaded, so that later runs need no network; a larger one is streamed.
DOWNLOAD_LIMIT = 256 << 20
INTERLEAVED_FILES = 8  # of a streamed dataset, read in turn


@dataclass(frozen=True, slots=True)
class HubData:
    """A dataset on the hub. None means the repository's own default."""

    repo: str
    config: str | None = None
    split: str | None = None
    column: str | None = None


NAMES = {
    "wikitext": HubData("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
    "c4": HubData("allenai/c4", "en", "train"),
    "pileval": HubData("mit-han-lab/pile-val-backup", None, "validation"),
}

# Kinds of files that `datasets` takes for names of datasets: it would look for such files in the current directory.
KINDS = {
    "csv", "json", "pandas", "parquet", "arrow", "text", "conll", "imagefolder", "audiofolder",
    "videofolder", "meshfolder", "pdffolder", "niftifolder", "webdataset", "xml", "hdf5", "eval", "lance",
    "tsfile", "iceberg", "vortex", "mmcif", "pdb", "genbank", "fasta", "fastq", "harbor",
}  # fmt: skip


def not_a_dataset(name: str) -> InputError:
    """Return the refusal of one of `KINDS`."""
    return InputError(
        f"'{name}' is a kind of file, not a dataset: give the file itself, such as ./words.txt, or a hub id such as "
        "org/name"
    )


def open_hub(source: HubData, seed: int) -> Table:
    """Open a dataset on the hub, or its copy in the cache. seed: the order of the files of a streamed dataset.

    Raises InputError that lists the configurations or splits where the one asked for does not exist, and what
    `datasets` and `huggingface_hub` raise.
    """
    try:
        builder = _builder(source)
    except ValueError as error:
        # `datasets` lists the configurations only here, in brackets, whether one is missing or must be chosen.
        listed = re.search(r"\[(.*)\]", str(error))
        if listed is None:
            raise
        names = listed[1].replace("'", "")
        wrong = f"has no configuration '{source.config}'" if source.config else "has several configurations"
        raise InputError(f"{source.repo} {wrong}: name one as {source.repo}:CONFIG: {names}") from None
    files = (
        builder.config.data_files
    )  # None where the hub is unreachable and the dataset comes from the cache
    splits = list(files or builder.info.splits or ())
    label = f"{source.repo}:{source.config}" if source.config else source.repo
    split = pick_split(splits, source.split, label)
    label = f"{label}:{split}"
    if files is None or not _is_large(builder):
        builder.download_and_prepare(verification_mode="no_checks")
        return arrow_table(builder.as_dataset(split=split), label)
    return _streamed(builder, split, label, seed)


def _streamed(builder: Any, split: str, label: str, seed: int) -> Table:
    """Open a dataset whose rows are fetched while they are read."""
    _register_zstd()
    data = builder.as_streaming_dataset(split=split)
    columns = data.column_names or list(next(iter(data), {}))
    # One file may hold a single subject: read several in turn, in an order that the seed decides.
    count = data.num_shards
    order = random.Random(seed).sample(range(count), count)

    def shard(names: list[str], index: int) -> Iterator[tuple[Any, ...]]:
        shards = data.select_columns(names).shard(num_shards=count, index=index)
        values = (tuple(row[name] for name in names) for row in shards)
        return ((value,) for value in articles(v for (v,) in values)) if len(names) == 1 else values

    def rows(names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        for start in range(0, count, INTERLEAVED_FILES):
            yield from _interleaved([shard(list(names), i) for i in order[start : start + INTERLEAVED_FILES]])

    return Table(label, tuple(columns), rows, streamed=True)


def _builder(source: HubData) -> Any:
    """Return the dataset's builder from the hub, or from the cache where the hub does not answer."""
    import datasets
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
    from huggingface_hub import HfApi

    if source.repo in _PACKAGED_DATASETS_MODULES:  # a later version may know more than KINDS
        raise not_a_dataset(source.repo)
    # Ask the hub first, once: `datasets` tries an unreachable hub for half a minute, and hides the reason.
    refusal: Exception | None = None
    try:
        HfApi().dataset_info(source.repo, timeout=hub.HUB_TIMEOUT)
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


def _interleaved(iterators: list[Iterator[Any]]) -> Iterator[Any]:
    """Yield one value of each iterator in turn, until all are exhausted."""
    end = object()
    while iterators:
        for iterator in tuple(iterators):
            if (value := next(iterator, end)) is end:
                iterators.remove(iterator)
            else:
                yield value


def _is_large(builder: Any) -> bool:
    """Return whether to stream a dataset: its files, of all splits, exceed `DOWNLOAD_LIMIT` or its size is unknown.

    All splits count, because they are downloaded together. Many files, and .zst files, are streamed without asking.
    """
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
    """Let `datasets` stream .zst files (pileval is one) with pyarrow where no zstd package is installed."""
    import pyarrow
    from fsspec import compression  # type: ignore[import-untyped]

    if "zstd" not in compression.compr:

        def open_zstd(file: Any, mode: str = "rb", **_: Any) -> Any:
            return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")

        compression.register_compression("zstd", open_zstd, "zst")
