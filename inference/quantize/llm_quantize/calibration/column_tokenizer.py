"""Turn the values of a column, texts or conversations, into token ids. This module knows a tokenizer, but no model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from llm_quantize.calibration.sampling import Item, batches, split_text
from llm_quantize.calibration.text_use import TextUse
from llm_quantize.errors import InputError, is_failure, one_line

BATCH_CHARS = 1 << 18  # characters tokenized in one call
# The roles of ShareGPT's conversations, as chat templates name them.
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


class ColumnTokenizer:
    """Split the values of one column into items, and tokenize items, with one tokenizer.

    tokenizer: of transformers. where: the source and its column, for messages. use: the words of messages.
    bos: the ids that begin every window: BOS, or nothing.
    separator: the ids that end every document.
    """

    def __init__(self, tokenizer: Any, where: str, use: TextUse) -> None:
        self.tokenizer = tokenizer
        self.where = where
        self.use = use
        # If the tokenizer begins every text with BOS, every window must begin with it, too. Models attend strongly to
        # the first token, which is always BOS in use. Other windows would calibrate on states that never occur:
        # Gemma's are noise.
        bos = tokenizer.bos_token_id
        self.bos = [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
        # EOS separates documents, as in the packed sequences of training: the model has learnt that the text after it
        # is unrelated to the text before. A tokenizer without EOS gets a blank line.
        eos = tokenizer.eos_token_id
        self.separator = [eos] if eos is not None else self._encode(["\n\n"])[0]
        self._refusals: list[str] = []  # of the chat template, since the last `join` began
        self._rendered = 0  # conversations, likewise

    def items(self, values: Iterable[Any], limit: int, *, single: bool) -> Iterator[Item]:
        """Yield pieces of at most `limit` characters of all texts that are not blank, and whole conversations.

        single: the values are parts of one document.

        Raises InputError: a value is neither text nor a conversation, or the tokenizer has no chat template.
        """
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
                        f"choose another with {self.use.flags}column"
                    )
                if getattr(self.tokenizer, "chat_template", None) is None:
                    raise InputError(
                        f"{self.where} holds conversations, and the model's tokenizer has no chat template: "
                        f"choose a text column with {self.use.flags}column"
                    )
                yield Item(document, sum(len(str(m.get("content"))) for m in messages), messages)

    def join(self, items: Iterable[Item], needed: int) -> tuple[int, list[int]]:
        """Tokenize items one after another until there are `needed` ids.

        Returns the number of documents they come from, and all ids: fewer than `needed` where the items have fewer.
        Raises InputError where the tokenizer fails.
        """
        self._refusals, self._rendered = [], 0
        documents: set[int] = set()
        stream: list[int] = []
        for batch in batches(items, BATCH_CHARS):
            for document, ids in self._tokenize(batch):
                documents.add(document)
                stream += ids
            if len(stream) >= needed:
                break
        return len(documents), stream

    def report(self, log: Callable[[str], None]) -> None:
        """Warn of conversations that the chat template refused. Raises InputError where it refused all of them."""
        if self._refusals and not self._rendered:
            raise InputError(
                f"the chat template refuses every conversation of {self.where}: {self._refusals[0]}"
            )
        if self._refusals:
            log(
                f"{self.use.noun}: the chat template refuses {len(self._refusals)} conversations: "
                f"{self._refusals[0]}"
            )

    def _tokenize(self, batch: list[Item]) -> Iterator[tuple[int, list[int]]]:
        """Yield document and ids of each item, closed by the separator; skip conversations that are refused."""
        texts = [
            self._render(item.content) if isinstance(item.content, list) else item.content for item in batch
        ]
        kept = [(item.document, text) for item, text in zip(batch, texts, strict=True) if text]
        for (document, _), ids in zip(kept, self._encode([text for _, text in kept]), strict=True):
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

    def _render(self, messages: list[dict[str, Any]]) -> str:
        """Render a conversation by the chat template; return "" where the template refuses it."""
        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # a template may raise anything: errors of jinja2, TypeError, KeyError
            self._refusals.append(one_line(error))
            return ""
        self._rendered += 1
        return text.removeprefix(self.tokenizer.bos_token or "") if self.bos else text


def as_messages(value: Any) -> list[dict[str, Any]] | None:
    """Convert a conversation to the form of chat templates: a list of messages with role and content.

    value: a list of such messages, or of ShareGPT's (from, value), or a dict of such lists, as Arrow stores them.

    Returns None where `value` is not a conversation.
    """
    if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return None
    messages = []
    for message in value:
        # Arrow sets the keys that a message lacks to None, and templates would take None for a value.
        present = {key: part for key, part in message.items() if part is not None}
        role = present.pop("role", None) or present.pop("from", None)
        content = present.pop("content", None) or present.pop("value", "")
        if not isinstance(role, str):
            return None
        messages.append({"role": ROLES.get(role, role), "content": content, **present})
    return messages
