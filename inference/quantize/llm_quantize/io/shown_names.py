"""Names of models and data sets as others may see them."""

from __future__ import annotations

from pathlib import Path

from llm_quantize.io.hub import REPO_ID


def shown_name(place: str) -> str:
    """A hub id as it is, a local path by its last part; a path into the hub's cache as the id and revision it holds."""
    path = Path(place).expanduser()
    if not path.exists():
        return place
    path = path.absolute()
    cached = path.parent.parent.name
    if path.parent.name == "snapshots" and cached.startswith("models--"):
        repository = cached[8:].replace("--", "/")
        if REPO_ID.fullmatch(repository):  # what merely looks like the cache may have any name
            return f"{repository}@{path.name}"
    return path.name or path.resolve().name or "model"
