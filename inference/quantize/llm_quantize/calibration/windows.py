"""Read text and cut it into token windows of equal length, for calibration and for measurement.

Documents are drawn at random from a pool larger than needed, tokenized, joined and cut. So blank and short rows waste
no tokens, and no document is dropped for its length. This module knows a tokenizer, but no model.

Torch is imported only in the functions that need it, so that `check_source` answers at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llm_quantize.calibration import text_sources
from llm_quantize.calibration.column_tokenizer import ColumnTokenizer
from llm_quantize.calibration.hub_datasets import HubData
from llm_quantize.calibration.sampling import draw, take_first
from llm_quantize.calibration.text_use import CALIBRATION, TextUse
from llm_quantize.errors import InputError, one_line
from llm_quantize.options import Option, option

if TYPE_CHECKING:
    import torch

MIN_SEQ_LEN = 32
GROUP = "calibration"  # of the options, in the help
CHARS_PER_TOKEN = 4  # of English text; only the size of the pool depends on it
POOL_FACTOR = 4  # the pool holds this many times the text needed, where the source has as much
PIECE_WINDOWS = 4  # a document is drawn in pieces of at most this many windows


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationConfig:
    """What text to read, and how much of it.

    data: a name (`wikitext`, `c4`, `pileval`), a hub id `repo[:config[:split[:column]]]`, a local file (.txt .jsonl
    .json .csv .parquet, also .gz) or a directory from `datasets.save_to_disk`.
    samples: windows; seq_len: tokens per window.
    column: the column that holds the text; None: choose by name.
    seed: which documents are drawn, and their order.
    """

    data: str = option(
        "wikitext",
        Option(
            group=GROUP,
            flag="calib_data",
            metavar="DATA",
            default="wikitext; its own text with the embedded model",
            help="text to calibrate on: wikitext, c4, pileval, a hub id repo[:config[:split[:column]]], a local .txt "
            ".jsonl .json .csv (.gz too) or .parquet, or a saved dataset; take text like that of your use",
        ),
    )
    samples: int = option(
        512,
        Option(
            group=GROUP,
            flag="calib_samples",
            kind="integer",
            metavar="N",
            help="windows of text; more for accuracy, fewer for speed",
        ),
    )
    seq_len: int = option(
        512,
        Option(
            group=GROUP,
            flag="calib_seq_len",
            kind="integer",
            metavar="N",
            help=f"tokens a window, {MIN_SEQ_LEN} or more; lower it if memory is short",
        ),
    )
    column: str | None = option(
        None,
        Option(
            group=GROUP,
            flag="calib_column",
            metavar="NAME",
            help="column that holds the text where it is not found by itself",
        ),
    )
    seed: int = option(
        0,
        Option(
            group=GROUP,
            kind="integer",
            metavar="N",
            help="draws the windows; the same seed gives the same ones",
        ),
    )


@dataclass(frozen=True, slots=True)
class Windows:
    """Token windows and their origin.

    tokens: int64 (n, seq_len).
    documents: the number of documents they come from.
    tokens_seen: the tokens of the text before it was cut.
    requested: the number of windows asked for; n may be smaller.
    source: the name of the source and its column, for people.
    fingerprint: SHA-256 of shape and tokens, in hex.
    """

    tokens: torch.Tensor
    documents: int
    tokens_seen: int
    requested: int
    source: str
    fingerprint: str

    def __str__(self) -> str:
        n, length = self.tokens.shape
        documents = f"{self.documents:,} document" + "s" * (self.documents != 1)
        return f"{n} x {length} = {n * length:,} tokens from {documents} of {self.source}"


def check_source(config: CalibrationConfig, use: TextUse = CALIBRATION) -> None:
    """Refuse, before any work and without a network, what cannot be read as text.

    Raises InputError: no such file, unknown suffix, malformed id, too few samples or tokens per window.
    """
    if config.samples < 1:
        raise InputError(f"{use.flags}samples {config.samples}: at least 1 is needed")
    if config.seq_len < 2:
        raise InputError(f"{use.flags}seq_len {config.seq_len}: at least 2 is needed")
    check_data(config.data, use)


def check_data(data: str, use: TextUse) -> None:
    """Refuse, before any work and without a network, what names no text. Raises InputError."""
    text_sources.locate(data, use)


def longest_window(tokenizer: Any, max_position_embeddings: int | None = None) -> int | None:
    """Return the most tokens that tokenizer and model both accept in one sequence; None where neither says."""
    # Tokenizers without a limit have a huge number instead, such as 1e30.
    limits = (max_position_embeddings, getattr(tokenizer, "model_max_length", None))
    known = [int(x) for x in limits if isinstance(x, int | float) and 0 < x < 10**9]
    return min(known, default=None)


def check_window_length(flag: str, seq_len: int, tokenizer: Any, max_position_embeddings: int | None) -> None:
    """Refuse windows of more tokens than model or tokenizer accept. flag: the option that says `seq_len`.

    Raises InputError that says which of the two it is.
    """
    longest = longest_window(tokenizer, max_position_embeddings)
    if longest is None or seq_len <= longest:
        return
    if longest_window(None, max_position_embeddings) == longest:
        raise InputError(f"{flag} {seq_len} is more than the model takes: at most {longest}")
    raise InputError(
        f"{flag} {seq_len} is more than the tokenizer takes, by the model_max_length of its tokenizer_config.json: "
        f"at most {longest}, or correct that file"
    )


def load_windows(
    config: CalibrationConfig,
    tokenizer: Any,
    *,
    log: Callable[[str], None],
    use: TextUse = CALIBRATION,
) -> Windows:
    """Read `config.data` and return at most `config.samples` windows of `config.seq_len` tokens.

    The same config, data and tokenizer give the same windows; another seed draws others.

    log: is called with each warning, one line: fewer windows than asked for, conversations that the chat template
    refuses.
    use: the words and flags in messages.

    Raises InputError: the source cannot be read (see `text_sources`), the column holds no text, the tokenizer has no
    chat template for a column of conversations, less text than one window. Raises WorkError: the hub's cache is not
    writable, or the disk is full.
    """
    check_source(config, use)
    source = text_sources.locate(config.data, use)
    table = text_sources.open_table(source, seed=config.seed, use=use)
    asked = config.column or (source.column if isinstance(source, HubData) else None)
    with text_sources.reading(source, use):
        column = table.column(asked, use, log)
    where = table.where if table.columns == ("text",) else f"{table.where}, column {column}"

    where = one_line(where)  # names may hold control characters
    text = ColumnTokenizer(tokenizer, where, use, column)
    head = text.bos[: config.seq_len - 1]
    body = config.seq_len - len(head)  # tokens of text in a window
    needed = config.samples * body
    budget = POOL_FACTOR * CHARS_PER_TOKEN * needed  # characters of the pool
    most = needed  # items of the pool: each gives a token or more
    while True:
        with text_sources.reading(source, use):
            items = text.items(
                table.documents(column),
                PIECE_WINDOWS * CHARS_PER_TOKEN * config.seq_len,
                single=table.single,
            )
            # A stream costs network traffic: read only until the pool is full. Read other sources to their end.
            first = take_first(items, budget, most) if table.streamed else items
            pool = draw(first, budget, config.seed, most)
        documents, stream = text.join(pool, needed)
        if len(stream) >= needed or (sum(item.size for item in pool) < budget and len(pool) < most):
            break
        # Tokens are longer than expected: the pool had too few, the source may have more.
        budget, most = budget * 4, most * 4
    text.report(log)

    count = min(len(stream) // body, config.samples)
    if count == 0:
        raise InputError(
            f"{use.too_little}: {where} gives {len(stream):,} tokens and one window needs "
            f"{body:,}: take a smaller {use.flags}seq_len or more text"
        )
    if count < config.samples:
        log(
            f"{use.noun}: {where} has only {len(stream):,} tokens: {count} windows of {config.seq_len} "
            f"instead of the {config.samples} asked for"
        )

    import torch

    tokens = torch.tensor(stream[: count * body], dtype=torch.int64).view(count, body)
    tokens = torch.cat([torch.tensor(head, dtype=torch.int64).expand(count, -1), tokens], dim=1)
    digest = hashlib.sha256(f"{tuple(tokens.shape)}".encode() + tokens.numpy().astype("<i8").tobytes())
    return Windows(tokens, documents, len(stream), config.samples, where, digest.hexdigest())
