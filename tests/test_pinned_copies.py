"""Test copies between host and device without a device: a copy that is completed only by `wait` replaces it."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm_quantize.checkpoint import background, reader
from llm_quantize.checkpoint.verification import verify_written
from llm_quantize.checkpoint.writer import CheckpointWriter, digest
from llm_quantize.device import Device
from llm_quantize.errors import FinalError, WorkError
from llm_quantize.evaluation.perplexity import measure
from llm_quantize.formats import FORMATS
from llm_quantize.io import pinned_copies, safetensors_files
from llm_quantize.io.atomic_directory import AtomicDirectory
from llm_quantize.io.pinned_copies import DeviceToHostCopier, Prefetcher
from llm_quantize.io.safetensors_files import PlannedTensor
from llm_quantize.model import tensor_store
from llm_quantize.model.source import SourceModel
from models import CPU, FAMILIES, write
from reference import write_rtn_checkpoint


def plain(size: int) -> Tensor:
    return torch.full((size,), 255, dtype=torch.uint8)


class DelayedCopier(DeviceToHostCopier):
    """Behave as with a GPU: the host memory is filled only by `wait`, with the values at `take`. Takes all tensors."""

    def __init__(self, size: int, allocate: Callable[[int], Tensor | None] = plain) -> None:
        super().__init__(size, allocate)
        self.started = 0

    def serves(self, tensor: Tensor) -> bool:
        return True

    def start_copy(self, host: Tensor, tensor: Tensor) -> Callable[[], object]:
        now = tensor.clone()
        self.started += 1
        return lambda: host.copy_(now)


# ----------------------------------------------------------------------------------------------------------
# Device to host


def test_slots_do_not_overlap_and_are_freed() -> None:
    out = DelayedCopier(16 << 10)
    rng = random.Random(0)
    held: list[tuple[pinned_copies.PendingCopy, Tensor]] = []
    for number in range(400):
        tensor = torch.full((rng.randint(1, 700),), number, dtype=torch.int32)
        with ThreadPoolExecutor(1) as pool:  # a slot may become free only when an earlier copy is released
            future = pool.submit(out.take, tensor)
            while True:
                try:
                    pending = future.result(timeout=0.01 if held else None)
                    break
                except TimeoutError:
                    first, expected = held.pop(0)
                    assert torch.equal(first.wait(), expected)
                    first.release()
        assert pending is not None
        pending.wait()
        held.append((pending, tensor))
        if rng.random() < 0.3:  # not in the order in which they were taken
            other, expected = held.pop(rng.randrange(len(held)))
            assert torch.equal(other.wait(), expected)
            other.release()
    for pending, expected in held:
        assert torch.equal(pending.wait(), expected)
        pending.release()
    whole = out.take(torch.zeros(4 << 10, dtype=torch.int32))  # the whole ring is free again
    assert whole is not None


@pytest.mark.parametrize(
    "tensor",
    [torch.tensor(3), torch.arange(6.0).reshape(2, 3).T, torch.ones(3, 1, 5, dtype=torch.bfloat16)],
    ids=["scalar", "transposed", "bfloat16"],
)
def test_shapes(tensor: Tensor) -> None:
    out = DelayedCopier(1 << 12)
    pending = out.take(tensor)
    assert pending is not None
    assert torch.equal(pending.wait(), tensor)
    assert pending.wait().is_contiguous()


def test_what_does_not_fit_is_left_to_the_caller() -> None:
    out = DelayedCopier(1 << 12)
    assert out.take(torch.zeros(4097, dtype=torch.uint8)) is None
    assert out.take(torch.zeros(0)) is None
    assert DeviceToHostCopier(1 << 12, plain).take(torch.zeros(4)) is None  # in host memory already
    tried: list[int] = []

    def refused(size: int) -> None:
        tried.append(size)

    none = DelayedCopier(1 << 12, refused)
    assert none.take(torch.zeros(4)) is None
    assert none.take(torch.zeros(4)) is None
    assert tried == [1 << 12]  # the allocator is called only once


def test_a_copy_that_cannot_start_frees_its_slot() -> None:
    class Broken(DelayedCopier):
        def start_copy(self, host: Tensor, tensor: Tensor) -> Callable[[], object]:
            raise MemoryError

    out = Broken(1 << 12)
    for _ in range(3):
        with pytest.raises(MemoryError):
            out.take(torch.zeros(4096, dtype=torch.uint8))


def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> dict[str, Tensor]:
    """Write four tensors through a writer, each changed as soon as `add` returns; return what the file holds."""
    out = DelayedCopier(size)
    monkeypatch.setattr(background, "DeviceToHostCopier", lambda: out)
    names = [f"t{n}" for n in range(4)]
    with AtomicDirectory(tmp_path / "out", overwrite=False) as output_dir:
        plan = [PlannedTensor(name, torch.int32, (300,)) for name in names]
        with CheckpointWriter(output_dir, plan, {"run": {}}) as writer:
            for number, name in enumerate(names):
                tensor = torch.full((300,), number, dtype=torch.int32)
                writer.add(name, tensor)
                writer.remember(f"layer{number}", (tensor, tensor + 1, tensor + 2))
                tensor.fill_(-1)
            writer.commit({})
            writer.wait()
            assert writer.layers["layer2"] == [
                digest(torch.full((300,), value, dtype=torch.int32)) for value in (2, 3, 4)
            ]
            monkeypatch.setattr(writer, "layers", {})
            verify_written(writer, FORMATS["awq"], {})
        output_dir.publish()
    assert out.started == (16 if size >= 1200 else 0)
    return load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("size", [1 << 16, 1536, 64], ids=["all at once", "one at a time", "none fits"])
def test_the_writer_waits_for_pending_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    found = written(tmp_path, monkeypatch, size)
    assert [set(found[f"t{n}"].tolist()) for n in range(4)] == [{0}, {1}, {2}, {3}]


def test_a_failed_write_does_not_stop_what_waits_for_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "DeviceToHostCopier", lambda: DelayedCopier(1536))

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with AtomicDirectory(tmp_path / "out", overwrite=False) as output_dir:
        plan = [PlannedTensor(f"t{n}", torch.int32, (300,)) for n in range(8)]
        with CheckpointWriter(output_dir, plan, {"run": {}}) as writer:
            monkeypatch.setattr(safetensors_files, "write_at", full)

            def add_all() -> None:
                for n in range(8):
                    writer.add(f"t{n}", torch.zeros(300, dtype=torch.int32))
                writer.wait()

            with pytest.raises(WorkError, match="disk full"):
                add_all()
            with pytest.raises(WorkError, match="disk full"):
                writer.add("t7", torch.zeros(300, dtype=torch.int32))


def test_fixed_tensors_are_not_copied(tmp_path: Path) -> None:
    held = threading.Event()
    with AtomicDirectory(tmp_path / "out", overwrite=False) as output_dir:
        plan = [PlannedTensor(name, torch.int32, (2, 3)) for name in ("fixed", "turned")]
        with CheckpointWriter(output_dir, plan, {"run": {}}) as writer:
            writer._background.submit(held.wait)  # the thread reaches the tensors only after `held`
            tensor, turned = torch.zeros(2, 3, dtype=torch.int32), torch.zeros(3, 2, dtype=torch.int32)
            writer.add("fixed", tensor, fixed=True)
            writer.add("turned", turned.T, fixed=True)  # not contiguous, so the writer makes a copy
            tensor.fill_(5)  # no caller may do this: it shows which memory was written
            turned.fill_(5)
            held.set()
            verify_written(writer, FORMATS["awq"], {})
        output_dir.publish()
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found["fixed"].eq(5).all()
    assert not found["turned"].any()


# ----------------------------------------------------------------------------------------------------------
# Host to device


class HostPrefetcher(Prefetcher):
    """Serve the host, too."""

    def serves(self, device: torch.device) -> bool:
        return True


STORED = {
    "a": torch.arange(600).reshape(20, 30),
    "b": torch.ones(3, dtype=torch.bfloat16),
    "none": torch.zeros(0, 4),
    "c": torch.tensor(2.5),
}


def read(name: str) -> Tensor:
    if name not in STORED:
        raise WorkError(f"the checkpoint has no tensor {name}")
    return STORED[name]


def test_prefetch_gives_each_tensor_once_in_its_own_memory() -> None:
    prefetch = HostPrefetcher(read, plain)
    assert prefetch.take("a", CPU) is None
    for _ in range(3):
        prefetch.start(["a", "b", "none", "c"])
        taken = {name: prefetch.take(name, CPU) for name in ("c", "a", "b")}
        assert prefetch.take("a", CPU) is None
        assert prefetch.take("none", CPU) is None  # nothing to read
        prefetch.start(["b"])  # does not change what was taken
        assert prefetch.take("b", CPU) is not None
        for name, tensor in taken.items():
            assert tensor is not None
            assert torch.equal(tensor, STORED[name])


def test_prefetch_raises_where_the_tensor_is_taken() -> None:
    prefetch = HostPrefetcher(read, plain)
    prefetch.start(["a", "missing", "c"])
    assert prefetch.take("c", CPU) is not None
    with pytest.raises(WorkError, match="has no tensor missing"):
        prefetch.take("missing", CPU)
    assert prefetch.take("a", CPU) is not None


def test_prefetch_drops_what_was_not_taken() -> None:
    prefetch = HostPrefetcher(read, plain)
    prefetch.start(["a"])
    prefetch.start(["b"])
    assert prefetch.take("a", CPU) is None
    assert prefetch.take("b", CPU) is not None


@pytest.mark.parametrize("short", ["no pinned memory", "little free", "a huge block"])
def test_nothing_is_prefetched_where_memory_is_short(short: str, monkeypatch: pytest.MonkeyPatch) -> None:
    allocated: list[int] = []

    def allocate(size: int) -> Tensor | None:
        allocated.append(size)
        return None if short == "no pinned memory" else plain(size)

    if short == "little free":
        monkeypatch.setattr(pinned_copies, "available_memory", lambda: 8000)
    if short == "a huge block":
        monkeypatch.setattr(pinned_copies, "LARGEST_PREFETCH", 2000)
    prefetch = HostPrefetcher(read, allocate)
    prefetch.start(["a", "b"])
    assert prefetch.take("a", CPU) is None
    assert prefetch.take("b", CPU) is None
    assert bool(allocated) == (short == "no pinned memory")


def test_prefetch_does_not_serve_the_host() -> None:
    prefetch = Prefetcher(read, plain)
    prefetch.start(["a"])
    assert prefetch.take("a", CPU) is None


def test_free_memory_is_known() -> None:
    assert 1 << 20 < pinned_copies.available_memory() <= 1 << 60


# ----------------------------------------------------------------------------------------------------------
# Prefetch by models


class RecordingPrefetcher(HostPrefetcher):
    """Record the names that were taken, for a source and a checkpoint."""

    taken: ClassVar[list[str]] = []

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        super().__init__(read, plain)

    def take(self, name: str, device: torch.device) -> Tensor | None:
        found = super().take(name, device)
        if found is not None:
            self.taken.append(name)
        return found


@pytest.fixture
def prefetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make every model prefetch, on the CPU too; return the list of the names that were taken."""
    monkeypatch.setattr(RecordingPrefetcher, "taken", [])
    for module in (tensor_store, reader):
        monkeypatch.setattr(module, "Prefetcher", RecordingPrefetcher)
    return RecordingPrefetcher.taken


@pytest.mark.parametrize("format_name", ["awq", "gptq", "compressed-tensors"])
def test_measurement_is_the_same_with_and_without_prefetch(
    format_name: str, tmp_path: Path, prefetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "model", FAMILIES["qwen2"]())
    write_rtn_checkpoint(tmp_path / "model", tmp_path / "out", format_name, 4, 32, False, shards=2)
    ids = torch.arange(3, 43).reshape(2, 20)
    model = SourceModel.open(tmp_path / "model")
    found = measure(model, tmp_path / "out", ids, Device(CPU))
    names = [name for name in model.store.files if ".layers." in name]
    assert set(names) <= set(prefetched)
    assert [n for n in prefetched if n.endswith("weight_packed" if format_name[0] == "c" else "qweight")]
    for module in (tensor_store, reader):
        monkeypatch.setattr(module, "Prefetcher", Prefetcher)
    prefetched.clear()
    assert measure(SourceModel.open(tmp_path / "model"), tmp_path / "out", ids, Device(CPU)) == found
    assert not prefetched


def test_a_block_is_the_same_with_and_without_prefetch(tmp_path: Path, prefetched: list[str]) -> None:
    write(tmp_path, FAMILIES["qwen2"]())
    model = SourceModel.open(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    model.prefetch(0, CPU)
    model.prefetch(len(model.blocks), CPU)  # past the last block: does nothing, drops nothing
    for index, name in enumerate(model.blocks):
        block = model.load_block(index, CPU, torch.float32)
        model.prefetch(index + 1, CPU)
        for path, parameter in block.named_parameters():
            assert torch.equal(parameter, expected[f"{name}.{path}"])
            parameter.data.fill_(0)  # its memory is its own: no other tensor changes
        model.release(block)
    assert sorted(prefetched) == sorted(name for name in expected if ".layers." in name)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), SafetensorError("InvalidOffset")])
def test_a_tensor_that_cannot_be_prefetched_gives_the_usual_error(
    error: Exception, tmp_path: Path, prefetched: list[str]
) -> None:
    class Broken:
        def get_tensor(self, name: str) -> Tensor:
            raise error

    write(tmp_path, FAMILIES["qwen2"]())
    errors: list[str] = []
    for with_prefetch in (False, True):
        model = SourceModel.open(tmp_path)
        model.store._handles = {tmp_path / "model.safetensors": Broken()}
        if with_prefetch:
            model.prefetch(1, CPU)
        with pytest.raises(WorkError) as caught:
            model.load_block(1, CPU, torch.float32)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    assert "cannot read model.layers.1" in errors[0]
    assert not prefetched


def test_the_first_broken_weight_is_named(tmp_path: Path) -> None:
    write(tmp_path, FAMILIES["qwen2"]())
    tensors = load_file(tmp_path / "model.safetensors")
    for path in ("mlp.up_proj", "mlp.down_proj"):
        tensors[f"model.layers.1.{path}.weight"][2, 3] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = SourceModel.open(tmp_path)
    model.load_block(0, CPU, torch.float32)
    with pytest.raises(FinalError, match=r"layers\.1\.mlp\.up_proj\.weight has NaN"):
        model.load_block(1, CPU, torch.float32)
