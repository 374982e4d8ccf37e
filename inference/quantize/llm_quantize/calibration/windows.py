"""Calibration text -> token windows. Knows no model, only a tokenizer.

Documents are drawn at random from a pool larger than needed, tokenized, joined and cut into windows of equal
length, so that blank and short rows cost nothing and no document is dropped for its length.

Torch is imported in the functions that need it: `check_source` answers before anything heavy is loaded.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llm_quantize.calibration import text_sources
from llm_quantize.config import CalibrationConfig
from llm_quantize.errors import InputError, is_failure, one_line

if TYPE_CHECKING:
    import torch

CHARS_PER_TOKEN = 4  # of English; only sizes of buffers depend on it
POOL = 4  # so many times the text that is needed is drawn from, where there is as much
PIECE = 4  # a document is drawn in pieces of up to so many windows, cut at line ends
BATCH_CHARS = 1 << 18  # text tokenized in one call
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


@dataclass(frozen=True, slots=True)
class Windows:
    """Token windows and where they came from.

    `tokens` int64 (n, seq_len); `documents` they were drawn from; `tokens_seen` before cutting; `requested`
    number of windows; `source` for people; `fingerprint` SHA-256 over the tokens.
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


def check_source(config: CalibrationConfig) -> None:
    """Refuses, before any work and without a network, what cannot be calibration data.

    Raises InputError: missing file, unknown extension, malformed id, sizes below one.
    """
    if config.samples < 1:
        raise InputError(f"--calib_samples {config.samples}: at least 1 is needed")
    if config.seq_len < 2:
        raise InputError(f"--calib_seq_len {config.seq_len}: at least 2 is needed")
    text_sources.locate(config.data)


def longest_window(tokenizer: Any, max_position_embeddings: int | None = None) -> int | None:
    """Tokens that tokenizer and model both allow in one sequence; None where neither says."""
    # Tokenizers without a limit give a huge number (1e30 or so) instead.
    limits = (max_position_embeddings, getattr(tokenizer, "model_max_length", None))
    known = [int(x) for x in limits if isinstance(x, int | float) and 0 < x < 10**9]
    return min(known, default=None)


def load_windows(config: CalibrationConfig, tokenizer: Any, *, log: Callable[[str], None]) -> Windows:
    """Reads `config.data` and gives up to `config.samples` windows of `config.seq_len` tokens.

    The same config, data and tokenizer give the same windows; another seed draws others. Each warning is one
    line to `log`: fewer windows than asked for, conversations the chat template refuses.

    Raises InputError: the source cannot be read (see `corpus`), the column holds no text, a chat column
    without a chat template, less text than one window.
    """
    check_source(config)
    source = text_sources.locate(config.data)
    table = text_sources.open_table(source, seed=config.seed)
    asked = config.column or (source.column if isinstance(source, text_sources.HubData) else None)
    column = table.column(asked)
    where = table.where if table.columns == ("text",) else f"{table.where}, column {column}"

    text = _Text(tokenizer, where)
    head = text.bos[: config.seq_len - 1]
    body = config.seq_len - len(head)  # tokens of text in a window
    needed = config.samples * body
    budget = POOL * CHARS_PER_TOKEN * needed
    while True:
        with text_sources.reading(source):
            items = text.items(
                table.documents(column), PIECE * CHARS_PER_TOKEN * config.seq_len, single=table.single
            )
            # Reading a stream costs network: it ends when the pool is full. Others are read to their end.
            pool = draw(_first(items, budget) if table.streamed else items, budget, config.seed)
        documents, stream = text.join(pool, needed)
        if len(stream) >= needed or sum(item.size for item in pool) < budget:
            break
        budget *= 4  # text of very long tokens: the pool held too few, the source may hold more
    text.report(log)

    count = min(len(stream) // body, config.samples)
    if count == 0:
        raise InputError(
            f"too little text to calibrate on: {where} gives {len(stream):,} tokens and one window needs "
            f"{body:,}: take a smaller --calib_seq_len or more text"
        )
    if count < config.samples:
        log(
            f"calibration: {where} has only {len(stream):,} tokens: {count} windows of {config.seq_len} "
            f"instead of the {config.samples} asked for"
        )

    import torch

    tokens = torch.tensor(stream[: count * body], dtype=torch.int64).view(count, body)
    tokens = torch.cat([torch.tensor(head, dtype=torch.int64).expand(count, -1), tokens], dim=1)
    digest = hashlib.sha256(f"{tuple(tokens.shape)}".encode() + tokens.numpy().astype("<i8").tobytes())
    return Windows(tokens, documents, len(stream), config.samples, where, digest.hexdigest())


@dataclass(frozen=True, slots=True)
class Item:
    """Something to draw: a piece of a document, or a conversation that is not rendered yet."""

    document: int
    size: int  # characters
    content: str | list[dict[str, Any]]


def draw(items: Iterable[Item], budget: int, seed: int) -> list[Item]:
    """Items in an order that `seed` gives, of which the first `budget` characters are kept.

    Every item gets a random key and those with the smallest stay, so that the whole source is drawn from
    evenly in one pass, while no more than the budget is held.
    """
    rng = random.Random(seed)
    heap: list[tuple[float, int, Item]] = []
    held = 0
    for index, item in enumerate(items):
        key = rng.random()
        if held >= budget and -heap[0][0] < key:
            continue
        heapq.heappush(heap, (-key, index, item))
        held += item.size
        while held - heap[0][2].size >= budget:
            held -= heapq.heappop(heap)[2].size
    return [item for _, _, item in sorted(heap, key=lambda entry: (-entry[0], entry[1]))]


def split_text(text: str, limit: int) -> Iterator[str]:
    """Consecutive pieces of at most `limit` characters, cut after a line end, or else a space, where the
    second half has one."""
    start = 0
    while len(text) - start > limit:
        middle, end = start + limit // 2, start + limit
        cut = text.rfind("\n", middle, end) + 1 or text.rfind(" ", middle, end) + 1 or end
        yield text[start:cut]
        start = cut
    yield text[start:]


class _Text:
    """Values of a column -> items -> token ids, with this tokenizer's habits."""

    def __init__(self, tokenizer: Any, where: str) -> None:
        self.tokenizer = tokenizer
        self.where = where
        # Where the tokenizer opens every text with BOS, so does every window: models rest their attention on
        # the first token, which in use is always BOS. Windows that begin otherwise would calibrate on states
        # that never occur; Gemma's are noise.
        bos = tokenizer.bos_token_id
        self.bos = [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
        # Documents are separated by EOS, as in the packed sequences that models are trained on: it says that
        # what follows has nothing to do with what came before, so that a window over two documents is text as
        # the model knows it, and not a sentence that jumps. A tokenizer without EOS gets a blank line.
        eos = tokenizer.eos_token_id
        self.separator = [eos] if eos is not None else self._encode(["\n\n"])[0]
        self.refused: list[str] = []
        self.rendered = 0

    def items(self, values: Iterable[Any], limit: int, *, single: bool) -> Iterator[Item]:
        """Pieces of all documents that are not blank. Raises InputError on values that are no text."""
        for number, value in enumerate(values):
            document = 0 if single else number
            if isinstance(value, str):
                for piece in split_text(value, limit):
                    if not piece.isspace() and piece:
                        yield Item(document, len(piece), piece)
            elif value:
                messages = as_messages(value)
                if messages is None:
                    raise InputError(
                        f"{self.where} holds {type(value).__name__} values, neither text nor conversations: "
                        "choose another with --calib_column"
                    )
                if getattr(self.tokenizer, "chat_template", None) is None:
                    raise InputError(
                        f"{self.where} holds conversations, and the model's tokenizer has no chat template: "
                        "choose a text column with --calib_column"
                    )
                yield Item(document, sum(len(str(m.get("content"))) for m in messages), messages)

    def join(self, items: Iterable[Item], needed: int) -> tuple[int, list[int]]:
        """Token ids of the items one after the other, at least `needed` where they give as many, and the number
        of documents that they come from."""
        self.refused, self.rendered = [], 0
        documents: set[int] = set()
        stream: list[int] = []
        for batch in _batches(items):
            for document, ids in self.tokenize(batch):
                documents.add(document)
                stream += ids
            if len(stream) >= needed:
                break
        return len(documents), stream

    def tokenize(self, batch: list[Item]) -> Iterator[tuple[int, list[int]]]:
        """Document and token ids of each item, closed by the separator; none of a conversation refused."""
        texts = [
            self._render(item.content) if isinstance(item.content, list) else item.content for item in batch
        ]
        kept = [(item.document, text) for item, text in zip(batch, texts, strict=True) if text]
        for (document, _), ids in zip(kept, self._encode([text for _, text in kept]), strict=True):
            # A chat template may have closed the conversation itself, with a line end behind.
            closed = set(self.separator) & set(ids[-2:])
            if ids:  # else separators alone would make windows
                yield document, ids if closed else ids + self.separator

    def report(self, log: Callable[[str], None]) -> None:
        """Tells of conversations that the template refused. Raises InputError where it was all of them."""
        if self.refused and not self.rendered:
            raise InputError(
                f"the chat template refuses every conversation of {self.where}: {self.refused[0]}"
            )
        if self.refused:
            log(
                f"calibration: the chat template refuses {len(self.refused)} conversations: {self.refused[0]}"
            )

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # JSON can escape half of a surrogate pair, which is no text.
        texts = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        # verbose=False: longer than the model's maximum is no matter, since windows are cut afterwards.
        try:
            encoded = self.tokenizer(
                texts,
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
        except BaseException as error:
            if not is_failure(error) or isinstance(error, MemoryError):
                raise
            raise InputError(
                f"the model's tokenizer fails on {self.where} ({one_line(error)}): copy its files anew"
            ) from None
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _render(self, messages: list[dict[str, Any]]) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # templates raise what they like: jinja2's errors, TypeError, KeyError
            self.refused.append(one_line(error))
            return ""
        self.rendered += 1
        return text.removeprefix(self.tokenizer.bos_token or "") if self.bos else text


def as_messages(value: Any) -> list[dict[str, Any]] | None:
    """A conversation as chat templates want it (role, content), from that or from ShareGPT's (from, value);
    None where it is none."""
    if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return None
    messages = []
    for message in value:
        # Arrow fills the keys that a message lacks with None, which templates take for a value.
        present = {key: part for key, part in message.items() if part is not None}
        role = present.pop("role", None) or present.pop("from", None)
        content = present.pop("content", None) or present.pop("value", "")
        if not isinstance(role, str):
            return None
        messages.append({"role": ROLES.get(role, role), "content": content, **present})
    return messages


def _first(items: Iterable[Item], budget: int) -> Iterator[Item]:
    for item in items:
        yield item
        budget -= item.size
        if budget <= 0:
            return


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += item.size
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
