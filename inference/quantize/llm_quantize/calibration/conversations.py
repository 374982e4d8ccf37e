"""Bring conversations to the form of chat templates, and render them. This module knows a tokenizer, but no model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from llm_quantize.errors import one_line

# The roles of ShareGPT's conversations, as chat templates name them.
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
USUAL_ROLES = {"system", "user", "assistant", "tool"}
# What a message may hold in place of content.
_INSTEAD = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
_TEXT_PARTS = ("text", "input_text", "output_text", None)  # a tuple: a kind may be of any type
_LONGEST_JSON = 16 << 20  # characters of a conversation that is written as JSON
# How Python, and numpy, print a conversation.
_PRINTED = re.compile(r"\s*(\[\s*)?\{\s*'(role|from|content|value)'\s*:")
_PROBE = "probe of the template"
_QUOTED = re.compile(rf"""['"]\s*:\s*['"]{_PROBE}""")  # in a list that is printed


class UnusableError(Exception):
    """A conversation cannot be rendered as it is meant. The text says why, in a few words."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a chat template is given. messages: with role and content, a text or a list of parts; tools: schemas."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None

    @property
    def size(self) -> int:
        """The characters of its messages, without those that the template adds."""
        return sum(len(text_of(m["content"])) for m in self.messages)


def as_conversation(value: Any, tools: Any = None) -> Conversation | None:
    """Convert a value of a column, and the tools of its row, to a conversation.

    Returns None where `value` is no conversation. Raises UnusableError where it is one, but holds something else than
    text, or its tools are no list.
    """
    messages = as_messages(value)
    return None if messages is None else Conversation(messages, as_tools(tools))


def as_messages(value: Any) -> list[dict[str, Any]] | None:
    """Convert messages to the form of chat templates: a list of dicts with role and content.

    value: a list of such messages, or of ShareGPT's (from, value), or a dict of such lists, as Arrow stores them.

    Returns None where `value` is not a conversation. Raises UnusableError where a message has no content, or content
    that is neither text nor parts of text.
    """
    value = _rows(value)
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        return None
    messages = []
    for message in value:
        # Arrow sets the keys that a message lacks to None, and templates would take None for a value.
        present = {key: without_none(part) for key, part in message.items() if part is not None}
        role = present.pop("role", None) or present.pop("from", None)
        if not isinstance(role, str):
            return None
        key = next((k for k in ("content", "value") if present.get(k)), None)
        content = present.get(key or "content", present.get("value"))
        for name in ("content", "value"):
            present.pop(name, None)
        role = role.lower() if role.lower() in ROLES.keys() | USUAL_ROLES else role
        messages.append({"role": ROLES.get(role, role), "content": content, **present})
    for message in messages:
        message["content"] = _checked_content(message)
        if "tool_calls" in message:
            message["tool_calls"] = _with_parsed_arguments(message["tool_calls"])
    return messages


def as_tools(value: Any) -> list[Any] | None:
    """Convert a row's tools to a list of schemas; None where there are none.

    value: a list of dicts, or JSON of one.

    Raises UnusableError.
    """
    value = _parsed(value)
    if not value or (isinstance(value, str) and not value.strip()):
        return None
    value = _rows(value)
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        value = [_parsed(tool) for tool in value]
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise UnusableError("its tools are no list of JSON schemas")
    tools: list[Any] = without_none(value)
    return tools


def text_of(content: Any) -> str:
    """Return the text of a message's content, that of its parts joined by line ends."""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def from_json(text: str) -> Any:
    """Return the messages that a text holds as JSON, as they are in it; None where it holds none."""
    if len(text) > _LONGEST_JSON or text.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        value = json.loads(text)
        return value if as_messages(value) is not None else None
    except UnusableError:
        return value
    except (ValueError, RecursionError):
        return None


def is_printed_conversation(text: str) -> bool:
    """Return whether a text is a conversation as Python prints it, which some libraries write into CSV files."""
    return _PRINTED.match(text) is not None


def without_none(value: Any) -> Any:
    """Return a JSON value without the keys that Arrow set to None."""
    if isinstance(value, dict):
        return {key: without_none(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [without_none(part) for part in value]
    return value


class ChatTemplate:
    """The chat template of a tokenizer, and whether it takes content as text or as a list of parts."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._takes_parts = self._takes(parts=True)
        self._takes_text = self._takes(parts=False)

    def render(self, conversation: Conversation) -> str:
        """Return the text of a conversation. Raises UnusableError where the template refuses it."""
        messages = [self._fitting(message) for message in conversation.messages]
        try:
            rendered = self.tokenizer.apply_chat_template(messages, tools=conversation.tools, tokenize=False)
        except Exception as error:  # a template may raise anything: errors of jinja2, TypeError, KeyError
            raise UnusableError(one_line(error)) from None
        if not isinstance(rendered, str):
            raise UnusableError("the template gives no text")
        return rendered

    def _fitting(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return a message whose content has the form that the template takes."""
        content = message["content"]
        if isinstance(content, list) and not self._takes_parts:
            return {**message, "content": text_of(content)}
        if isinstance(content, str) and content and self._takes_parts and not self._takes_text:
            return {**message, "content": [{"type": "text", "text": content}]}
        return message

    def _takes(self, *, parts: bool) -> bool:
        """Try one message: a template without support for parts prints the list, one without support for texts none."""
        content = [{"type": "text", "text": _PROBE}] if parts else _PROBE
        try:
            rendered = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False
            )
        except Exception:
            return False
        return isinstance(rendered, str) and _PROBE in rendered and _QUOTED.search(rendered) is None


def _parsed(value: Any) -> Any:
    """Return what a text holds as JSON; the text where it is none, and another value as it is."""
    if isinstance(value, str) and len(value) <= _LONGEST_JSON:
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            pass
    return value


def _with_parsed_arguments(calls: Any) -> Any:
    """Return tool calls whose arguments are objects, as chat templates take them, and not JSON, as services give them.

    Source: vllm/entrypoints/chat_utils.py, `_postprocess_messages`.
    """
    if not isinstance(calls, list):
        return calls
    found = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(arguments := _parsed(function.get("arguments")), dict):
            call = {**call, "function": {**function, "arguments": arguments}}
        found.append(call)
    return found


def _rows(value: Any) -> Any:
    """Return the rows of a dict of lists, as Arrow stores a list of dicts; another value as it is."""
    if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        columns: Iterable[list[Any]] = value.values()
        if len({len(v) for v in columns}) == 1:
            return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    return value


def _checked_content(message: dict[str, Any]) -> str | list[dict[str, Any]]:
    """Return the content of a message: a text, or parts of text. Raises UnusableError."""
    content = _rows(message["content"])
    if content is None:
        if any(key in message for key in _INSTEAD):
            return ""
        raise UnusableError(f"a message of role {one_line(message['role'], 40)} has no content")
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise UnusableError(f"a message's content is {type(content).__name__}, not text")
    parts = []
    for part in content:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind not in _TEXT_PARTS or not isinstance(text, str):
            shown = one_line(kind, 40) if isinstance(kind, str) else type(part).__name__
            raise UnusableError(f"a message has a part that is not text: {shown}")
        parts.append({"type": "text", "text": text})
    return parts
