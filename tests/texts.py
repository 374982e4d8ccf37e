"""Make what the tests of calibration read: a tokenizer of words, and files of every kind.

Each word is one token, and its id tells its number.
"""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from llm_quantize.calibration.saved_datasets import quiet
from llm_quantize.calibration.windows import CalibrationConfig, Windows, load_windows

EOS, BOS, UNKNOWN, LINE = 0, 1, 2, 3
FIRST = 4  # the id of word w0
TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}{{ raise_exception('no ' + m.role) }}"
    "{% endif %}{{ 'w900' if m.role == 'user' else 'w901' }} {{ m.content }} {% endfor %}<eos>\n"
)


def words(start: int, stop: int) -> str:
    return " ".join(f"w{i}" for i in range(start, stop))


def make_tokenizer(*, bos: bool = False, eos: bool = True, template: str | None = None) -> Any:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    vocabulary = {"<eos>": EOS, "<bos>": BOS, "<unk>": UNKNOWN, "\n\n": LINE}
    vocabulary |= {f"w{i}": i + FIRST for i in range(40_000)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    # Tokens are words, and the blank line that separates documents where there is no EOS.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[ =]+|(?<!\n)\n(?!\n)"), "removed"),
            pre_tokenizers.Split(Regex(r"\n\n"), "isolated"),
        ]
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
        )
    special = {"bos_token": "<bos>"} if bos else {}
    special |= {"eos_token": "<eos>"} if eos else {}
    fast: Any = PreTrainedTokenizerFast
    # The maximum is far below every document: it must not matter, nor cause warnings.
    made = fast(tokenizer_object=tokenizer, unk_token="<unk>", model_max_length=4, **special)
    made.chat_template = template
    return made


def load(data: object, tokenizer: Any, **options: Any) -> tuple[Windows, list[str]]:
    """Return the windows and the warnings."""
    lines: list[str] = []
    config = CalibrationConfig(**{"data": str(data), "samples": 4, "seq_len": 8, **options})
    return load_windows(config, tokenizer, log=lines.append), lines


def numbers(windows: Windows) -> list[int]:
    """Return the numbers of all words, in order."""
    return [int(i) - FIRST for i in windows.tokens.flatten() if i >= FIRST]


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def write_lines(path: Path, records: list[Any]) -> Path:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return path


def write_csv(path: Path, rows: list[str]) -> Path:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *([i, row] for i, row in enumerate(rows))])
    return path


def write_gz(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()))
    return path


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)
    return path


def save_dataset(path: Path, columns: dict[str, list[Any]], *splits: str) -> Path:
    import datasets

    data = datasets.Dataset.from_dict(columns)
    with quiet():
        (datasets.DatasetDict(dict.fromkeys(splits, data)) if splits else data).save_to_disk(path)
    return path


def write_text(path: Path, text: str) -> Path:
    path.write_text(text)
    return path
