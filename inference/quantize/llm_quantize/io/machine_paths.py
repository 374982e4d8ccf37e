"""Take the paths of this machine out of what is published."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from llm_quantize.io.json_text import as_json

_ADDRESS = re.compile(r"file:(//(localhost)?)?(?=/)", re.IGNORECASE)
# Below these keys of a tokenizer's files are tokens, of which "/root" may be one.
_LEAST_VOCABULARY = 256  # tokens: an object of so many whole numbers is one
_TOKENS = {"vocab", "merges", "added_tokens", "added_tokens_decoder"}


def paths_of_this_machine(directory: Path) -> tuple[str, ...]:
    """Return the paths that no published file may hold: those of the model `directory` and the user's home."""
    found = {str(directory), str(directory.absolute()), str(directory.resolve())}
    with suppress(RuntimeError):  # a user without a home
        found.add(str(Path.home()))
    return tuple(sorted(path for path in found if path.startswith("/") and path != "/"))


def without_paths(value: Any, paths: tuple[str, ...]) -> Any:
    """Return a JSON value in which each string that is one of `paths`, or below one, is cut to its last part.

    Keys of objects are cut as values are, and so are `file:` addresses of such paths. Where two keys become the same,
    the later one gets a number behind it, so that nothing is lost. The tokens of a tokenizer are left alone.
    """
    if isinstance(value, dict):
        vocabulary = len(value) >= _LEAST_VOCABULARY and all(type(each) is int for each in value.values())
        result: dict[str, Any] = {}
        for key, inner in value.items():
            name = key if vocabulary else _free(_cut(key, paths), result)
            result[name] = inner if key in _TOKENS else without_paths(inner, paths)
        return result
    if isinstance(value, list):
        return [without_paths(inner, paths) for inner in value]
    return _cut(value, paths) if isinstance(value, str) else value


def json_without_paths(data: bytes, paths: tuple[str, ...]) -> bytes:
    """Return the bytes of a JSON file as `without_paths` leaves its value; `data` itself where there is no such path.

    What is no JSON is returned as it is: no reader takes a path from it.
    """
    if not any(form in data for path in paths for form in _forms(path)):
        return data  # most files, some of which are large
    try:
        value = json.loads(data)
        cleaned = without_paths(value, paths)
    except (ValueError, RecursionError):
        return data
    return data if cleaned == value else as_json(cleaned).encode()


def _cut(text: str, paths: tuple[str, ...]) -> str:
    address = _ADDRESS.match(text)
    place = unquote(text[address.end() :]) if address else text
    if any(place == path or place.startswith(path + "/") for path in paths):
        return place.rstrip("/").rpartition("/")[2]
    return text


def _free(key: str, taken: dict[str, Any]) -> str:
    """Return `key`, with a number behind it where it is taken."""
    number, free = 1, key
    while free in taken:
        number += 1
        free = f"{key} {number}"
    return free


def _forms(path: str) -> Iterator[bytes]:
    """Yield a path as a JSON file may spell it: as it is, escaped in two ways, in an address."""
    escaped = json.dumps(path)[1:-1]
    yield path.encode("utf-8", "surrogatepass")
    yield escaped.encode()
    yield escaped.replace("/", "\\/").encode()
    yield quote(path.encode("utf-8", "surrogatepass")).encode()
