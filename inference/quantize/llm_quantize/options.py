"""How a field of a configuration appears on the command line. The field's default is the option's."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from llm_quantize.types import Method

BOTH: tuple[Method, ...] = ("awq", "gptq")
Kind = Literal["text", "integer", "number", "boolean"]
_KEY = "options"


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option of the command line.

    help: what it does; by method where that differs. group: the heading it stands under. flag: its name without
    dashes, where that is not the field's. methods: the scripts that have it. kind: how its value is read. metavar: how
    the value is shown. choices: the values it takes. default: how help says the default, where that is not the field's;
    by method where that differs. inverted: the field is the opposite of the option's boolean.
    """

    help: str | dict[Method, str]
    group: str
    flag: str | None = None
    methods: tuple[Method, ...] = BOTH
    kind: Kind = "text"
    metavar: str | dict[Method, str] | None = None
    choices: tuple[str, ...] | dict[Method, tuple[str, ...]] | None = None
    default: str | dict[Method, str] | None = None
    inverted: bool = False


def option(default: Any, *options: Option) -> Any:
    """A dataclass field with a default, and its options: one, or one for each method."""
    return dataclasses.field(default=default, metadata={_KEY: options})


def options_of(config: type, method: Method) -> list[tuple[dataclasses.Field[Any], Option]]:
    """The fields of a config's class that a method's script has options for, with the options, in their order."""
    return [
        (each, found)
        for each in dataclasses.fields(config)
        for found in each.metadata.get(_KEY, ())
        if method in found.methods
    ]


def for_method(value: Any, method: Method) -> Any:
    """A value that may be given by method."""
    return value[method] if isinstance(value, dict) else value


def shown(value: object) -> str:
    """A default as help and documentation write it."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
