"""What an interrupted run left, whether this run may go on with it, and the states that spare it the way there."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llm_quantize.config import QuantizeConfig
from llm_quantize.errors import InputError, WorkError
from llm_quantize.io import safetensors_files
from llm_quantize.io.atomic_directory import AtomicDirectory
from llm_quantize.io.journal import Journal
from llm_quantize.model.block_forward import States
from llm_quantize.model.source import Source

_SHARE = 0.02  # of the time since states were last kept, that keeping them may take
_RATE = 1e9  # bytes a second that a disk takes, until one has been measured
_CHUNK = 64 << 20


# ------------------------------------------------------------------------------------------------------------
# Is it the same run?


def identity(
    config: QuantizeConfig, source: Source, device: torch.device, fingerprint: str
) -> dict[str, str | int | float]:
    """Everything that the published bytes depend on, by the name under which a difference is told.

    `fingerprint`: of the calibration tokens. Weights are known by name, length, time of change and header: reading
    them whole would cost what a resumed run spares.
    """
    found: dict[str, str | int | float] = {
        "the program": _program(),
        "the device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "the model's config": _digest((source.directory / "config.json").read_bytes()),
        "the model's weights": _weights(source),
        "the calibration text": fingerprint,
        "the method": config.method,
        "--bits": config.bits,
        "--group_size": config.group_size,
        **(
            {"--zero_point": str(config.zero_point)} if config.method == "awq" else {"--sym": str(config.sym)}
        ),
        "--format": config.file_layout,
        "--quality": config.quality,
    }
    if config.method == "gptq":
        found["--desc_act"] = str(config.desc_act)
        found["--act_order_groups"] = config.act_order_groups
        found["--damp_percent"] = config.damp_percent
    for name in ("torch", "transformers", "compressed-tensors"):
        found[name] = importlib.metadata.version(name)
    return found


def _digest(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def _program() -> str:
    """Of all modules of the package: another version of them may compute other bytes."""
    total = hashlib.sha256()
    package = Path(__file__).resolve().parents[1]
    for path in sorted(package.rglob("*.py")):
        total.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:32]


def _weights(source: Source) -> str:
    total = xxhash.xxh3_128()
    for path in sorted(set(source.files.values())):
        stat = path.stat()
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, 64 << 20))
        total.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode() + header)
    return total.hexdigest()


def first_entry(
    output_dir: AtomicDirectory, run: dict[str, str | int | float], more: dict[str, Any], *, restart: bool
) -> dict[str, Any]:
    """The first entry of the journal: that of the run to be continued, else a new one with `more` in it.

    Errors: `InputError`, saying what differs, where the staging place holds another run.
    """
    journal = Journal(output_dir.work / "journal")
    if restart:
        output_dir.clear()
    elif journal.entries:
        there = journal.entries[0].get("run")
        if there == run:
            return journal.entries[0]
        if isinstance(there, dict) and len(journal.entries) > 1:
            raise InputError(
                f"an interrupted run to {output_dir.shown} is kept in {output_dir.work.name}, and this one differs in "
                f"{_differences(there, run)}: add --restart to begin anew, or repeat its command"
            )
        output_dir.clear()
    return {"run": run, **more}


def _differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    words = []
    for name in dict.fromkeys([*here, *there]):
        old, new = there.get(name), here.get(name)
        if old == new:
            continue
        plain = name.startswith("--") or name in ("the method", "the device") or "." in str(new)
        told = f" ({old} there, {new} here)" if plain and old is not None and new is not None else ""
        words.append(f"{name}{told}")
    return ", ".join(words)


# ------------------------------------------------------------------------------------------------------------
# States


class KeptStates:
    """Keeps the states after a block in a file, as often as that costs little; context manager.

    They spare a resumed run the replay of the blocks that are done, and nothing depends on them: a file that is
    absent, old or damaged costs time only. `keep` False: nothing is written or read.
    """

    def __init__(self, output_dir: AtomicDirectory, keep: bool) -> None:
        self._path = output_dir.work / "states.safetensors"
        self._keep = keep
        self._rate = _RATE
        self._last = time.monotonic()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="states")
        self._pending: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)

    def offer(self, states: States, blocks: int) -> None:
        """`states` are those that `blocks` blocks have made; written in the background, if the time is right.

        They must not change before `wait` returns.
        """
        elapsed = time.monotonic() - self._last
        if self._keep and states.data.nbytes / self._rate <= _SHARE * elapsed:
            self._pending = self._thread.submit(self._write, states.data, blocks)

    def wait(self) -> None:
        """Returns when what was offered is on disk."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _write(self, data: Tensor, blocks: int) -> None:
        start = time.monotonic()
        # Another name until it is whole: the earlier ones stay good.
        shard = safetensors_files.single(f"{self._path.name}.new", _planned(data))
        with suppress(OSError):  # a full disk is the checkpoint's to tell
            handle = safetensors_files.create(shard, self._path.parent)
            try:
                total = xxhash.xxh3_128()
                offset = shard.offsets["states"]
                for part in _chunks(data):
                    host = safetensors_files.raw(part.to("cpu").contiguous())
                    total.update(host)
                    safetensors_files.write_at(handle, host, offset)
                    offset += len(host)
                for name, small in (
                    ("blocks", torch.tensor(blocks)),
                    ("digest", torch.frombuffer(bytearray(total.digest()), dtype=torch.uint8)),
                ):
                    safetensors_files.write_at(handle, safetensors_files.raw(small), shard.offsets[name])
                os.fsync(handle)
            finally:
                os.close(handle)
            (self._path.parent / shard.file).replace(self._path)
        self._last = time.monotonic()
        self._rate = data.nbytes / max(self._last - start, 1e-6)

    def restore(self, states: States, most: int) -> int:
        """Fills `states` with those that were kept; of how many blocks they are.

        0, and states as they were, where there are none, or damaged ones, or of more than `most` blocks. Errors:
        `WorkError` where the file cannot be read on the way.
        """
        if not self._keep or not self._path.is_file():
            return 0
        try:
            with safe_open(self._path, framework="pt") as stored:
                blocks = _sound(stored, states.data, most)
        except (SafetensorError, OSError, ValueError, TypeError, KeyError):
            return 0
        if blocks:
            try:
                with safe_open(self._path, framework="pt") as stored:
                    for part, kept in _beside(stored, states.data):
                        part.copy_(kept)
            except (SafetensorError, OSError) as error:
                raise WorkError(f"cannot read {self._path}: remove it and run again ({error})") from None
        return blocks


def _sound(stored: Any, data: Tensor, most: int) -> int:
    """Of how many blocks the states in an opened file are; 0 where they do not fit or are damaged."""
    blocks = int(stored.get_tensor("blocks"))
    kept = stored.get_slice("states")
    dtype, shape = safetensors_files.NAMES.get(kept.get_dtype()), tuple(kept.get_shape())
    if not 0 < blocks <= most or (dtype, shape) != (data.dtype, tuple(data.shape)):
        return 0
    total = xxhash.xxh3_128()
    for _, part in _beside(stored, data):
        total.update(safetensors_files.raw(part))
    return blocks if total.digest() == bytes(stored.get_tensor("digest").tolist()) else 0


def _beside(stored: Any, data: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of `data`, and what the file holds in their places."""
    kept, start = stored.get_slice("states"), 0
    for part in _chunks(data):
        yield part, kept[start : start + len(part)].contiguous()
        start += len(part)


def _planned(data: Tensor) -> list[safetensors_files.Planned]:
    return [
        safetensors_files.Planned("states", data.dtype, tuple(data.shape)),
        safetensors_files.Planned("blocks", torch.int64, ()),
        safetensors_files.Planned("digest", torch.uint8, (16,)),
    ]


def _chunks(data: Tensor) -> list[Tensor]:
    rows = max(1, _CHUNK // max(1, data[:1].nbytes))
    return list(torch.split(data, rows))
