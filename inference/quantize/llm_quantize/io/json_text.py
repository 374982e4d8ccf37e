"""The text of a JSON file."""

from __future__ import annotations

import json
from typing import Any


def as_json(value: Any) -> str:
    """Format a JSON value as the text of a file: indented, UTF-8 characters kept, with a final newline.

    Half of a surrogate pair, which UTF-8 cannot hold, stays the escape that it was.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace").decode()
