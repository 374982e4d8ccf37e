"""Names of models and data sets as others may see them."""

from __future__ import annotations

from pathlib import Path


def shown_name(place: str) -> str:
    """A hub id as it is, a local path by its last part; a path into the hub's cache as the id and revision it holds."""
    path = Path(place).expanduser()
    if not path.exists():
        return place
    path = path.absolute()
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return f"{path.parent.parent.name[8:].replace('--', '/')}@{path.name}"
    return path.name or path.resolve().name or "model"
