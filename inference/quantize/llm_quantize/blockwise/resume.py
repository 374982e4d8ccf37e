"""Whether this run may go on with what an interrupted one left."""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any

import xxhash

from llm_quantize.device import Device
from llm_quantize.errors import InputError
from llm_quantize.io.atomic_directory import AtomicDirectory
from llm_quantize.io.journal import Journal
from llm_quantize.model.source import SourceModel

Identity = dict[str, str | int | float]

# What stands for much: only that it differs is said.
DIGESTS = ("the program", "the model's weights", "the calibration text")
_FILE = "the model's file "  # and its name


def run_identity(options: Identity, model: SourceModel, device: Device, text_fingerprint: str) -> Identity:
    """Everything that the published bytes depend on, by the name under which a difference is told.

    options: those of the run that the bytes depend on. text_fingerprint: of the calibration tokens. Weights are known
    by name, length, time of change and header: to read them whole would cost what a resumed run spares.
    """
    return {
        "the program": _program_digest(),
        "the device": device.name,
        **{_FILE + name: digest for name, digest in model.side_files.digests.items()},
        "the model's weights": _weights_digest(model),
        "the calibration text": text_fingerprint,
        **options,
        **{
            name: importlib.metadata.version(name) for name in ("torch", "transformers", "compressed-tensors")
        },
    }


def _program_digest() -> str:
    """Of all modules of the package: another version of them may compute other bytes."""
    total = hashlib.sha256()
    package = Path(__file__).resolve().parents[1]
    for path in sorted(package.rglob("*.py")):
        total.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:32]


def _weights_digest(model: SourceModel) -> str:
    total = xxhash.xxh3_128()
    for path in sorted(set(model.store.files.values())):
        stat = path.stat()
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, 64 << 20))
        total.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode() + header)
    return total.hexdigest()


def first_entry(
    output: AtomicDirectory, run: Identity, more: dict[str, Any], *, restart: bool
) -> dict[str, Any]:
    """The first entry of the journal: that of the run to be continued, else a new one with `more` in it.

    Raises InputError, saying what differs, where another run is kept.
    """
    journal = Journal(output.work / "journal")
    if restart:
        output.clear()
    elif journal.entries:
        kept = journal.entries[0].get("run")
        if kept == run:
            return journal.entries[0]
        if isinstance(kept, dict) and len(journal.entries) > 1:
            raise InputError(
                f"an interrupted run to {output.shown} is kept in {output.work.name}, and this one differs in "
                f"{_differences(kept, run)}: add --restart to begin anew, or repeat its command"
            )
        output.clear()
    return {"run": run, **more}


def _differences(kept: dict[str, Any], here: Identity) -> str:
    words = []
    for name in dict.fromkeys([*here, *kept]):
        old, new = kept.get(name), here.get(name)
        if old == new:
            continue
        shown = not name.startswith((*DIGESTS, _FILE)) and old is not None and new is not None
        words.append(f"{name} ({old} there, {new} here)" if shown else name)
    return ", ".join(words)
