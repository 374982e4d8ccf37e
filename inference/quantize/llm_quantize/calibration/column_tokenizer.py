"""Turn the values of a column, texts or conversations, into token ids. This module knows a tokenizer, but no model."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from llm_quantize.calibration.conversations import (
    ChatTemplate,
    Conversation,
    UnusableError,
    as_conversation,
    from_json,
    is_printed_conversation,
)
from llm_quantize.calibration.sampling import Item, batches, split_text
from llm_quantize.calibration.table import MANY, WithTools
from llm_quantize.calibration.text_use import TextUse
from llm_quantize.errors import InputError, is_failure, one_line

BATCH_CHARS = 1 << 18  # characters tokenized in one call
BATCH_ITEMS = 1 << 14  # likewise; only very short texts are as many
HOPELESS = 1000  # conversations that cannot be used, and none that can, after which no more are tried
SHORT = 8  # characters; sources of more than MANY rows have as many a row, or more
TRIED = 32  # values by which it is told whether texts are conversations
# Columns whose texts are conversations if they can be read as such.
CONVERSATIONS = ("messages", "conversations")


class ColumnTokenizer:
    """Split the values of one column into items, and tokenize items, with one tokenizer.

    tokenizer: of transformers. where: the source and its column, for messages. use: the words of messages.
    column: the name of the column.
    bos: the ids that begin every window: BOS, or nothing.
    separator: the ids that end every document.
    """

    def __init__(self, tokenizer: Any, where: str, use: TextUse, column: str = "text") -> None:
        self.tokenizer = tokenizer
        self.where = where
        self.use = use
        self.column = column
        # If the tokenizer begins every text with BOS, every window must begin with it, too. Models attend strongly to
        # the first token, which is always BOS in use. Other windows would calibrate on states that never occur:
        # Gemma's are noise.
        bos = tokenizer.bos_token_id
        self.bos = [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
        # EOS separates documents, as in the packed sequences of training: the model has learnt that the text after it
        # is unrelated to the text before. A tokenizer without EOS gets a blank line.
        eos = tokenizer.eos_token_id
        self.separator = [eos] if eos is not None else self._encode(["\n\n"])[0]
        self._unusable: tuple[int, str] = 0, ""  # conversations of the last `items`, and why the first one is
        self._refused: tuple[int, str] = 0, ""  # likewise by the chat template, since the last `join` began
        self._rendered = 0  # conversations, likewise
        self._rows, self._missing = 0, 0  # of the last `items`: all, and those without a value

    def items(self, values: Iterable[Any], limit: int, *, single: bool) -> Iterator[Item]:
        """Yield pieces of at most `limit` characters of all texts that are not blank, and whole conversations.

        values: texts, conversations, or `WithTools`. single: the values are parts of one document.

        Raises InputError: a value is neither text nor a conversation, the tokenizer has no chat template, or very many
        rows hold next to nothing.
        """
        characters = 0
        self._unusable, self._rows, self._missing = (0, ""), 0, 0
        values = iter(values)
        head = [] if single else list(itertools.islice(values, TRIED))
        json_too = self._hold_json(head)
        for number, value in enumerate(itertools.chain(head, values)):
            document = 0 if single else number
            value, tools = (value.value, value.tools) if isinstance(value, WithTools) else (value, None)
            self._rows += 1
            if self._rows > MANY and characters < SHORT * self._rows:
                raise InputError(
                    f"{self.where} has more than {MANY:,} rows of fewer than {SHORT} characters on average: "
                    "join them to documents"
                )
            self._missing += value is None
            if json_too and isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
                value = from_json(value)
                if value is None:
                    self._leave_out("it is text that begins as JSON, but no conversation")
                    continue
            if isinstance(value, str):
                characters += len(value)
                for piece in split_text(value, limit):
                    if not piece.isspace() and piece:
                        yield Item(document, len(piece), piece)
            elif value:
                try:
                    conversation = as_conversation(value, tools)
                except UnusableError as error:
                    self._leave_out(str(error))
                    continue
                size, content = self._checked(conversation, value)
                characters += size
                yield Item(document, size, content)

    def _leave_out(self, reason: str) -> None:
        count, first = self._unusable
        self._unusable = count + 1, first or reason

    def _checked(self, conversation: Conversation | None, value: Any) -> tuple[int, Conversation]:
        """Return size and content of an item. Raises InputError where there is no conversation, or no template."""
        if conversation is None:
            raise InputError(
                f"{self.where} holds {type(value).__name__} values, neither text nor conversations: "
                f"choose another with {self.use.flags}column"
            )
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise InputError(
                f"{self.where} holds conversations, and the model's tokenizer has no chat template: "
                f"choose a text column with {self.use.flags}column"
            )
        return conversation.size, conversation

    def _hold_json(self, head: list[Any]) -> bool:
        """Return whether texts of the column may be conversations written as JSON, by its first values.

        They may in a column of `CONVERSATIONS`, and in one in which all are: among documents, one may be a conversation
        by its nature.

        Raises InputError where they are conversations as Python prints them.
        """
        values = [value.value if isinstance(value, WithTools) else value for value in head]
        texts = [value for value in values if isinstance(value, str) and value.strip()]
        named = self.column in CONVERSATIONS
        if not texts or (len(texts) < sum(map(bool, values)) and not named):
            return False
        if (any if named else all)(map(is_printed_conversation, texts)):
            raise InputError(
                f"{self.where} holds conversations as Python prints them, which is no format: write them as JSON"
            )
        return named or all(from_json(text) is not None for text in texts)

    def join(self, items: Iterable[Item], needed: int) -> tuple[int, list[int]]:
        """Tokenize items one after another until there are `needed` ids.

        Returns the number of documents they come from, and all ids: fewer than `needed` where the items have fewer.
        Raises InputError where the tokenizer fails, or no conversation of many can be used.
        """
        self._refused, self._rendered = (0, ""), 0
        documents: set[int] = set()
        stream: list[int] = []
        for batch in batches(items, BATCH_CHARS, BATCH_ITEMS):
            for document, ids in self._tokenize(batch):
                documents.add(document)
                stream += ids
            if len(stream) >= needed:
                break
        return len(documents), stream

    def report(self, log: Callable[[str], None]) -> None:
        """Warn of rows that are left out. Raises InputError where no conversation can be used."""
        count, reason = self._refused
        if count and not self._rendered:
            raise InputError(f"the chat template refuses every conversation of {self.where}: {reason}")
        if count:
            log(f"{self.use.noun}: the chat template refuses {count} conversations: {reason}")
        count, reason = self._unusable
        if count == self._rows - self._missing and count:
            raise InputError(f"no conversation of {self.where} can be used: {reason}")
        if count:
            log(f"{self.use.noun}: {self.where}: {count} conversations are left out: {reason}")
        if self._missing * 2 > self._rows:
            log(f"{self.use.noun}: {self.where}: {self._missing} of {self._rows} rows have no value there")

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer)

    def _tokenize(self, batch: list[Item]) -> Iterator[tuple[int, list[int]]]:
        """Yield document and ids of each item, closed by the separator; skip conversations that are refused."""
        texts = [
            item.content if isinstance(item.content, str) else self._render(item.content) for item in batch
        ]
        kept = [(item.document, text) for item, text in zip(batch, texts, strict=True) if text]
        for (document, _), ids in zip(kept, self._encode([text for _, text in kept]), strict=True):
            # Text that was rendered before may begin with BOS, and every window begins with it already.
            start = next((i for i, token in enumerate(ids) if [token] != self.bos), len(ids))
            ids = ids[start:] if start else ids
            # A chat template may have ended the conversation with EOS already, perhaps before a line end.
            closed = set(self.separator) & set(ids[-2:])
            if ids:  # else windows could consist of separators alone
                yield document, ids if closed else ids + self.separator

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # JSON can hold half of a surrogate pair, which UTF-8 cannot.
        texts = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        try:
            encoded = self.tokenizer(
                texts,
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,  # no warning of texts longer than the model's maximum: windows are cut later
            )
        except BaseException as error:
            if not is_failure(error) or isinstance(error, MemoryError):
                raise
            raise InputError(
                f"the model's tokenizer fails on {self.where} ({one_line(error)}): copy its files anew"
            ) from None
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _render(self, conversation: Conversation) -> str:
        """Render a conversation by the chat template; return "" where the template refuses it."""
        try:
            text = self._template.render(conversation)
        except UnusableError as error:
            count, reason = self._refused
            self._refused = count + 1, reason or str(error)
            if count + 1 >= HOPELESS and not self._rendered:
                raise InputError(
                    f"the chat template refuses {count + 1} conversations of {self.where}, and none is good: "
                    f"{self._refused[1]}"
                ) from None
            return ""
        self._rendered += 1
        return text.removeprefix(self.tokenizer.bos_token or "") if self.bos else text
