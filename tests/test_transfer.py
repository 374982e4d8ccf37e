"""Tensors on their way between host and device. There is no device here: a copy that ends late stands for one."""

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

from llm_quantize.checkpoint import reader
from llm_quantize.checkpoint import writer as writer_module
from llm_quantize.checkpoint.writer import CheckpointWriter, digest
from llm_quantize.errors import FinalError, WorkError
from llm_quantize.evaluation.perplexity import measure
from llm_quantize.io import pinned_copies, safetensors_files
from llm_quantize.io.atomic_directory import AtomicDirectory
from llm_quantize.io.pinned_copies import DeviceToHostCopier, Prefetcher
from llm_quantize.io.safetensors_files import Planned
from llm_quantize.model import source
from models import FAMILIES, write
from reference import write_rtn_checkpoint


def plain(size: int) -> Tensor:
    return torch.full((size,), 255, dtype=torch.uint8)


class Late(DeviceToHostCopier):
    """As from a GPU: what the tensor holds now arrives only when it is waited for. Takes all tensors."""

    def __init__(self, size: int, allocate: Callable[[int], Tensor | None] = plain) -> None:
        super().__init__(size, allocate)
        self.launched = 0

    def serves(self, tensor: Tensor) -> bool:
        return True

    def launch(self, host: Tensor, tensor: Tensor) -> Callable[[], object]:
        now = tensor.clone()
        self.launched += 1
        return lambda: host.copy_(now)


# ----------------------------------------------------------------------------------------------------------
# Out


def test_places_do_not_overlap_and_come_back() -> None:
    out = Late(16 << 10)
    rng = random.Random(0)
    held: list[tuple[pinned_copies.PendingCopy, Tensor]] = []
    for number in range(400):
        tensor = torch.full((rng.randint(1, 700),), number, dtype=torch.int32)
        with ThreadPoolExecutor(1) as pool:  # room may come only when an earlier one is released
            future = pool.submit(out.take, tensor)
            while True:
                try:
                    landing = future.result(timeout=0.01 if held else None)
                    break
                except TimeoutError:
                    first, expected = held.pop(0)
                    assert torch.equal(first.wait(), expected)
                    first.release()
        assert landing is not None
        landing.wait()
        held.append((landing, tensor))
        if rng.random() < 0.3:  # in another order than they came
            other, expected = held.pop(rng.randrange(len(held)))
            assert torch.equal(other.wait(), expected)
            other.release()
    for landing, expected in held:
        assert torch.equal(landing.wait(), expected)
        landing.release()
    whole = out.take(torch.zeros(4 << 10, dtype=torch.int32))  # all of it is free again
    assert whole is not None


@pytest.mark.parametrize(
    "tensor",
    [torch.tensor(3), torch.arange(6.0).reshape(2, 3).T, torch.ones(3, 1, 5, dtype=torch.bfloat16)],
    ids=["scalar", "transposed", "bfloat16"],
)
def test_shapes(tensor: Tensor) -> None:
    out = Late(1 << 12)
    landing = out.take(tensor)
    assert landing is not None
    assert torch.equal(landing.wait(), tensor)
    assert landing.wait().is_contiguous()


def test_what_does_not_fit_is_left_to_the_caller() -> None:
    out = Late(1 << 12)
    assert out.take(torch.zeros(4097, dtype=torch.uint8)) is None
    assert out.take(torch.zeros(0)) is None
    assert DeviceToHostCopier(1 << 12, plain).take(torch.zeros(4)) is None  # in host memory already
    tried: list[int] = []

    def refused(size: int) -> None:
        tried.append(size)

    none = Late(1 << 12, refused)
    assert none.take(torch.zeros(4)) is None
    assert none.take(torch.zeros(4)) is None
    assert tried == [1 << 12]  # asked for once


def test_a_copy_that_cannot_begin_leaves_its_place() -> None:
    class Broken(Late):
        def launch(self, host: Tensor, tensor: Tensor) -> Callable[[], object]:
            raise MemoryError

    out = Broken(1 << 12)
    for _ in range(3):
        with pytest.raises(MemoryError):
            out.take(torch.zeros(4096, dtype=torch.uint8))


def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> dict[str, Tensor]:
    """Four tensors through a writer, each changed as soon as it is handed in."""
    out = Late(size)
    monkeypatch.setattr(writer_module, "DeviceToHostCopier", lambda: out)
    names = [f"t{n}" for n in range(4)]
    with AtomicDirectory(tmp_path / "out", overwrite=False) as output_dir:
        plan = [Planned(name, torch.int32, (300,)) for name in names]
        with CheckpointWriter(output_dir, plan, {"run": {}}) as writer:
            for number, name in enumerate(names):
                tensor = torch.full((300,), number, dtype=torch.int32)
                writer.add(name, tensor)
                writer.remember(f"layer{number}", tensor, tensor + 1, tensor + 2)
                tensor.fill_(-1)
            writer.commit({})
            writer.wait()
            assert writer._layers["layer2"] == [
                digest(torch.full((300,), value, dtype=torch.int32)) for value in (2, 3, 4)
            ]
            monkeypatch.setattr(writer, "_layers", {})
            writer.complete("awq", 4, 16)
        output_dir.publish()
    assert out.launched == (16 if size >= 1200 else 0)
    return load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("size", [1 << 16, 1536, 64], ids=["all at once", "one at a time", "none fits"])
def test_the_writer_waits_for_what_arrives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    found = written(tmp_path, monkeypatch, size)
    assert [set(found[f"t{n}"].tolist()) for n in range(4)] == [{0}, {1}, {2}, {3}]


def test_a_failed_write_does_not_stop_what_waits_for_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "DeviceToHostCopier", lambda: Late(1536))

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with AtomicDirectory(tmp_path / "out", overwrite=False) as output_dir:
        plan = [Planned(f"t{n}", torch.int32, (300,)) for n in range(8)]
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
        plan = [Planned(name, torch.int32, (2, 3)) for name in ("fixed", "turned")]
        with CheckpointWriter(output_dir, plan, {"run": {}}) as writer:
            writer._submit(held.wait, 0)  # the thread comes to the tensors later
            tensor, turned = torch.zeros(2, 3, dtype=torch.int32), torch.zeros(3, 2, dtype=torch.int32)
            writer.add("fixed", tensor, fixed=True)
            writer.add("turned", turned.T, fixed=True)  # has to be made contiguous: a copy
            tensor.fill_(5)  # what no caller does: it shows whose memory was written
            turned.fill_(5)
            held.set()
            writer.complete("awq", 4, 16)
        output_dir.publish()
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found["fixed"].eq(5).all()
    assert not found["turned"].any()


# ----------------------------------------------------------------------------------------------------------
# In


class Here(Prefetcher):
    """Serves the host, too."""

    def serves(self, device: torch.device) -> bool:
        return True


CPU = torch.device("cpu")
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


def test_ahead_gives_each_once_in_memory_of_its_own() -> None:
    prefetch = Here(read, plain)
    assert prefetch.take("a", CPU) is None
    for _ in range(3):
        prefetch.begin(["a", "b", "none", "c"])
        taken = {name: prefetch.take(name, CPU) for name in ("c", "a", "b")}
        assert prefetch.take("a", CPU) is None
        assert prefetch.take("none", CPU) is None  # nothing to read
        prefetch.begin(["b"])  # what was taken stays
        assert prefetch.take("b", CPU) is not None
        for name, tensor in taken.items():
            assert tensor is not None
            assert torch.equal(tensor, STORED[name])


def test_ahead_raises_where_the_tensor_is_asked_for() -> None:
    prefetch = Here(read, plain)
    prefetch.begin(["a", "missing", "c"])
    assert prefetch.take("c", CPU) is not None
    with pytest.raises(WorkError, match="has no tensor missing"):
        prefetch.take("missing", CPU)
    assert prefetch.take("a", CPU) is not None


def test_ahead_drops_what_was_not_taken() -> None:
    prefetch = Here(read, plain)
    prefetch.begin(["a"])
    prefetch.begin(["b"])
    assert prefetch.take("a", CPU) is None
    assert prefetch.take("b", CPU) is not None


@pytest.mark.parametrize("short", ["no pinned memory", "little free", "a huge block"])
def test_ahead_of_nothing_where_memory_is_short(short: str, monkeypatch: pytest.MonkeyPatch) -> None:
    allocated: list[int] = []

    def allocate(size: int) -> Tensor | None:
        allocated.append(size)
        return None if short == "no pinned memory" else plain(size)

    if short == "little free":
        monkeypatch.setattr(pinned_copies, "available", lambda: 8000)
    if short == "a huge block":
        monkeypatch.setattr(pinned_copies, "LARGEST", 2000)
    prefetch = Here(read, allocate)
    prefetch.begin(["a", "b"])
    assert prefetch.take("a", CPU) is None
    assert prefetch.take("b", CPU) is None
    assert bool(allocated) == (short == "no pinned memory")


def test_ahead_serves_no_host() -> None:
    prefetch = Prefetcher(read, plain)
    prefetch.begin(["a"])
    assert prefetch.take("a", CPU) is None


def test_free_memory_is_known() -> None:
    assert 1 << 20 < pinned_copies.available() <= 1 << 60


# ----------------------------------------------------------------------------------------------------------
# Models read ahead


class Ahead(Here):
    """For a source and a checkpoint, with what was taken from it."""

    taken: ClassVar[list[str]] = []

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        super().__init__(read, plain)

    def take(self, name: str, device: torch.device) -> Tensor | None:
        found = super().take(name, device)
        if found is not None:
            self.taken.append(name)
        return found


@pytest.fixture
def reads_ahead(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes every model read ahead, on the CPU too; the names that came that way."""
    monkeypatch.setattr(Ahead, "taken", [])
    for module in (source, reader):
        monkeypatch.setattr(module, "Prefetcher", Ahead)
    return Ahead.taken


@pytest.mark.parametrize("layout", ["awq", "gptq", "compressed-tensors"])
def test_measured_the_same_read_ahead_or_not(
    layout: str, tmp_path: Path, reads_ahead: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "model", FAMILIES["qwen2"]())
    write_rtn_checkpoint(tmp_path / "model", tmp_path / "out", layout, 4, 32, False, shards=2)
    ids = torch.arange(3, 43).reshape(2, 20)
    model = source.Source.open(tmp_path / "model")
    found = measure(model, tmp_path / "out", ids, CPU)
    names = [name for name in model.files if ".layers." in name]
    assert set(names) <= set(reads_ahead)
    assert [n for n in reads_ahead if n.endswith("weight_packed" if layout[0] == "c" else "qweight")]
    for module in (source, reader):
        monkeypatch.setattr(module, "Prefetcher", Prefetcher)
    reads_ahead.clear()
    assert measure(source.Source.open(tmp_path / "model"), tmp_path / "out", ids, CPU) == found
    assert not reads_ahead


def test_a_block_is_the_same_read_ahead_or_not(tmp_path: Path, reads_ahead: list[str]) -> None:
    write(tmp_path, FAMILIES["qwen2"]())
    model = source.Source.open(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    model.prefetch(0, CPU)
    model.prefetch(len(model.blocks), CPU)  # past the end: nothing, and nothing is dropped
    for index, name in enumerate(model.blocks):
        block = model.modules[index]
        model.load(block, name, CPU, torch.float32)
        model.prefetch(index + 1, CPU)
        for path, parameter in block.named_parameters():
            assert torch.equal(parameter, expected[f"{name}.{path}"])
            parameter.data.fill_(0)  # in memory of its own: not what is read for another
        model.release(block)
    assert sorted(reads_ahead) == sorted(name for name in expected if ".layers." in name)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), SafetensorError("InvalidOffset")])
def test_a_tensor_that_cannot_be_read_ahead_is_told_as_ever(
    error: Exception, tmp_path: Path, reads_ahead: list[str]
) -> None:
    class Broken:
        def get_tensor(self, name: str) -> Tensor:
            raise error

    write(tmp_path, FAMILIES["qwen2"]())
    told: list[str] = []
    for prefetch in (False, True):
        model = source.Source.open(tmp_path)
        model._handles = {tmp_path / "model.safetensors": Broken()}
        if prefetch:
            model.prefetch(1, CPU)
        with pytest.raises(WorkError) as caught:
            model.load(model.modules[1], model.blocks[1], CPU, torch.float32)
        told.append(str(caught.value))
    assert told[0] == told[1]
    assert "cannot read model.layers.1" in told[0]
    assert not reads_ahead


def test_the_first_broken_weight_is_named(tmp_path: Path) -> None:
    write(tmp_path, FAMILIES["qwen2"]())
    tensors = load_file(tmp_path / "model.safetensors")
    for path in ("mlp.up_proj", "mlp.down_proj"):
        tensors[f"model.layers.1.{path}.weight"][2, 3] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = source.Source.open(tmp_path)
    model.load(model.modules[0], model.blocks[0], CPU, torch.float32)
    with pytest.raises(FinalError, match=r"layers\.1\.mlp\.up_proj\.weight has NaN"):
        model.load(model.modules[1], model.blocks[1], CPU, torch.float32)
