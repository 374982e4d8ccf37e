"""What the front matter of a stranger's model card says: some of its keys, within limits."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import yaml

LARGEST_BLOCK = 1 << 20  # bytes at a card's start among which the front matter is looked for
LARGEST_PARSED = 16 << 10  # characters that are read as YAML
DEEPEST = 20  # levels
_BLOCK = re.compile(r"\s*---(?:\r\n|\r|\n)(.*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$)", re.DOTALL)


def read_front_matter(card: bytes, keys: Collection[str]) -> dict[str, Any]:
    """Return the values of `keys` in the front matter of a card; none of a card without one, or with a broken one.

    card: at least the first `LARGEST_BLOCK` bytes of the file. Of a long front matter the lines of these keys alone
    are read. Aliases, by which a few lines can stand for gigabytes, are no part of a card: with one, nothing is read.
    """
    try:
        block = _BLOCK.match(card[:LARGEST_BLOCK].decode("utf-8-sig", "replace"))
        text = block[1] if block else ""
        if len(text) > LARGEST_PARSED:
            text = _lines_of(text, keys)
        if len(text) > LARGEST_PARSED:
            return {}
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > DEEPEST:
                return {}
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError, TypeError, AttributeError):
        return {}  # whatever its author wrote there is no reason to lose a checkpoint
    return {key: found[key] for key in keys if key in found} if isinstance(found, dict) else {}


def _lines_of(text: str, keys: Collection[str]) -> str:
    """The lines of the top level's `keys`, and those that belong to their values."""
    begins = re.compile(rf"""["']?({"|".join(map(re.escape, keys))})["']?\s*:""")
    kept, inside = [], False
    for line in text.splitlines(keepends=True):
        if line[0] not in " \t-#\r\n":
            inside = begins.match(line) is not None
        if inside:
            kept.append(line)
    return "".join(kept)
