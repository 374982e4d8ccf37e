"""The small model that ships with the program, and text for it that its training never saw."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
# Beside the package in the tree, inside it where it is installed.
_DIRECTORY = next((d for d in (_PACKAGE / "embedded", _PACKAGE.parent / "embedded") if d.is_dir()), _PACKAGE)

EMBEDDED_NAME = "tiny"
EMBEDDED_MODEL = _DIRECTORY / "model"
EMBEDDED_CALIBRATION = _DIRECTORY / "calibration.txt"
EMBEDDED_HELDOUT = _DIRECTORY / "heldout.txt"
