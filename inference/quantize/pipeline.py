"""The run: what is asked -> what is published. The only loop over blocks."""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import resource
import shlex
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import backend
import capture
import card
import foreign
import libraries
import packing
from calibration import Windows, load_windows, longest_window
from checkpoint import CheckpointWriter
from config import EMBEDDED_MODEL, QuantizeConfig
from console import Blocks, Console, duration
from errors import FinalError, InputError, WorkError
from evaluate import Measured, QuantizedSource, heldout_windows, measure, pick_device, sample
from folds import Fold, exact_folds, find_folds, unknown
from follow import Follower
from hub import resolve_model
from journal import Journal
from moments import SecondMoment
from publish import Staging, check_target
from resume import KeptStates, first_entry, identity
from shards import Planned
from solve import EFFORTS, BlockChanges, LayerReport, Solved, SolveOptions, solve_block
from source import Source, convert_pickles

AWQ_DAMPING = 0.05  # of the mean diagonal; measured on held-out text


@dataclass(frozen=True, slots=True)
class Result:
    """What was published, for the front door to show. `seconds` by stage; `device_bytes` and
    `host_bytes` at most, up to the finished files, of the process that made them; the former 0 without a GPU.

    `versions`: of what did the work. `measured`: None where it was not asked for.
    """

    output: Path
    method: str
    bits: int
    layout: str
    rows: list[tuple[str, str]]
    sample: str | None
    serve_line: str
    seconds: dict[str, float]
    device_bytes: int
    host_bytes: int
    versions: dict[str, str]
    measured: Measured | None


@dataclass(slots=True)
class _Run:
    """Everything that is known before the first block."""

    config: QuantizeConfig
    console: Console
    source: Source
    device: torch.device
    compute: torch.dtype
    store: torch.dtype
    options: SolveOptions
    scratch: tempfile.TemporaryDirectory[str] | None  # a converted copy of pickled weights
    stages: dict[str, float] = field(default_factory=dict)
    reports: list[LayerReport] = field(default_factory=list)
    library: backend.Session | None = None  # None: this program does the work
    outcome: backend.Outcome | None = None  # of the library's work

    @property
    def versions(self) -> dict[str, str]:
        """Of what does the work."""
        if self.library is not None:
            return self.library.versions
        return {name: importlib.metadata.version(name) for name in ("torch", "transformers")}

    @property
    def device_bytes(self) -> int:
        """On the device at most, of what did the work; 0 without a GPU."""
        if self.outcome is not None:
            return self.outcome.device_bytes
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    @property
    def host_bytes(self) -> int:
        """Of memory at most, of the process that did the work."""
        if self.outcome is not None:
            return self.outcome.host_bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time inside to `stages`; device work belongs to the stage that started it."""
        self.stages.setdefault(name, 0.0)  # in the order in which they begin
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.stages[name] += time.perf_counter() - start


def quantize(config: QuantizeConfig, console: Console) -> Result:
    """Quantizes, writes, checks, measures. Errors: `InputError` before any long work, `WorkError` after."""
    started = time.perf_counter()
    with Staging(config.target, overwrite=config.may_replace) as staging, ExitStack() as stack:
        run = _prepare(config, console)
        if config.backend != libraries.NATIVE:
            library = backend.Session(libraries.LIBRARIES[config.backend], run.device, console)
            run.library = stack.enter_context(library)
        windows = load_windows(config.calibration, run.source.tokenizer, log=console.warn)
        console.note(f"calibration: {windows}")
        heldout = None
        if config.eval_data != "off":
            heldout = heldout_windows(config, run.source.tokenizer, log=console.note)
        if run.device.type == "cuda":
            torch.cuda.set_device(run.device)
            torch.zeros((), device=run.device)  # the statistics exist once the device is in use
            torch.cuda.reset_peak_memory_stats(run.device)
        with _kept(staging, len(run.source.blocks)):
            write = _write_checkpoint if run.library is None else _have_written
            size = write(run, windows, staging)
            memory = run.device_bytes, run.host_bytes
            worked = time.perf_counter() - started
            measured = _measure(run, staging, heldout)
            _describe(run, staging, windows, heldout, measured)
            staging.publish()
    rows = _rows(run, windows, measured, size, worked, time.perf_counter() - started)
    text = sample(config.target, run.source.tokenizer, run.device, _PROMPT) if config.embedded else None
    return Result(
        config.target,
        config.method,
        config.bits,
        config.file_layout,
        rows,
        text,
        serve_line(config),
        run.stages,
        *memory,
        run.versions,
        measured,
    )


@contextmanager
def _kept(staging: Staging, blocks: int) -> Iterator[None]:
    """A failure says what is kept for the same command; nothing is where that would fail again."""
    try:
        yield
    except FinalError:
        staging.keep = False
        raise
    except InputError:
        raise
    except BaseException as error:
        if staging.keep:
            done = min(len(Journal(staging.work / "journal").entries) - 1, blocks)
            error.add_note(f"{done} of {blocks} blocks are kept, the same command goes on there")
        raise


def _write_checkpoint(run: _Run, windows: Windows, staging: Staging) -> int:
    """Everything but what is told of it, complete and read back; how many bytes its tensors have."""
    config = run.config
    run_id = identity(config, run.source, run.device, windows.fingerprint)
    length = windows.tokens.shape[1]
    widest = max(max(x.in_features, x.out_features) for x in run.source.linears(0))
    batch = capture.MicroBatch(run.device, length, widest, limit=config.max_memory)
    first = first_entry(
        staging, run_id, {"windows": batch.windows}, restart=config.restart or config.no_resume
    )
    batch.windows = first["windows"]
    keep = not config.no_resume
    with CheckpointWriter(staging, _plan(run), first, keep=keep) as writer, KeptStates(staging, keep) as kept:
        staging.write_json("config.json", _config_json(run))
        _blocks(run, windows, writer, kept, batch)
        _copy_side_files(run, staging)
        writer.complete(config.file_layout, config.bits, config.group_size)
    return writer.tensor_bytes


def _have_written(run: _Run, windows: Windows, staging: Staging) -> int:
    """The same by a library: its files as it writes them, complete and read back."""
    config, source, session = run.config, run.source, run.library
    assert session is not None
    # What an interrupted run of this program left is not thrown away unasked; a library leaves nothing to go on from.
    run_id = identity(config, source, run.device, windows.fingerprint) | {"--backend": config.backend}
    first_entry(staging, run_id, {}, restart=config.restart or config.no_resume)
    staging.clear()
    job = backend.Job(
        model=str(session.model(source, trust=config.trust_remote_code)),
        output=str(staging.content),
        windows=str(session.windows(windows.tokens)),
        method=config.method,
        bits=config.bits,
        group_size=config.group_size,
        symmetric=config.symmetric,
        act_order=config.act_order_groups if config.method == "gptq" and config.desc_act else "none",
        damping=config.damp_percent,
        dtype="float16" if session.library.float16 else str(run.store).removeprefix("torch."),
        blocks=len(source.blocks),
        device=run.device.type,
        trust_remote_code=config.trust_remote_code,
    )
    with run.console.blocks(len(source.blocks)) as progress:
        run.outcome = session.quantize(job, progress)
    run.stages |= run.outcome.seconds
    with run.stage("reading back"):
        size = foreign.verify(
            staging.content,
            source,
            config.file_layout,
            config.bits,
            config.group_size,
            config.symmetric,
            session.library.title,
            trust=config.trust_remote_code,
        )
    staging.settle()
    _copy_side_files(run, staging)
    return size


def _copy_side_files(run: _Run, staging: Staging) -> None:
    files = _side_files(run)
    if run.library is not None:  # what it wrote itself stays; what an interrupted run left would be cut off
        files = [path for path in files if not (staging.content / path.name).exists()]
    skipped = staging.copy(files)
    if skipped:
        run.console.warn(f"links that lead out of the model's directory are left out: {', '.join(skipped)}")


_PROMPT = "This module provides"


def serve_line(config: QuantizeConfig) -> str:
    """The command that serves the result."""
    flag = "" if config.file_layout == "compressed-tensors" else f" --quantization {config.file_layout}"
    return f"./run_vllm.sh {shlex.quote(str(config.target))}{flag}"


# -- before the work


def _prepare(config: QuantizeConfig, console: Console) -> _Run:
    device = pick_device(config.device)
    if config.max_memory is not None:
        if device.type != "cuda":
            raise InputError("--max_memory limits GPU memory and the run is on the CPU: leave it out")
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, config.max_memory * 2**30 / total), device)
    if config.model_path is None:
        directory = EMBEDDED_MODEL
    else:
        directory = resolve_model(
            config.model_path,
            trust_remote_code=config.trust_remote_code,
            allow_pickle=config.allow_pickle,
            log=console.note,
        )
    scratch = None
    if config.allow_pickle and not any(directory.glob("*.safetensors")):
        scratch = tempfile.TemporaryDirectory(prefix="llm-quantize-")
        directory = convert_pickles(directory, Path(scratch.name))
    source = Source.open(directory, trust_remote_code=config.trust_remote_code)
    layout = config.file_layout
    parameters = 0
    for index in range(len(source.blocks)):
        for linear in source.linears(index):
            packing.check_shape(
                layout, config.bits, config.group_size, linear.name, linear.out_features, linear.in_features
            )
            parameters += linear.out_features * linear.in_features
    if config.backend != libraries.NATIVE:
        _check_library(config, source, console)
    elif config.method == "awq":
        find_folds(source.modules[0], source.config)  # refuses an unknown architecture now
    outside = (
        sum(path.stat().st_size for path in set(source.files.values())) - parameters * source.dtype.itemsize
    )
    check_target(
        config.target,
        config.may_replace,
        int(parameters * (config.bits + 0.5) / 8) + max(outside, 0),
        directory,
    )
    limit = longest_window(
        source.tokenizer, getattr(source.config.get_text_config(), "max_position_embeddings", None)
    )
    if limit is not None and config.calibration.seq_len > limit:
        raise InputError(
            f"--calib_seq_len {config.calibration.seq_len} is more than the model takes: at most {limit}"
        )
    store = torch.float16 if source.dtype == torch.float32 else source.dtype
    options = SolveOptions(
        bits=config.bits,
        group_size=config.group_size,
        symmetric=config.symmetric,
        act_order=config.method == "awq" or config.desc_act,
        dynamic_groups=config.dynamic_groups,
        damping=AWQ_DAMPING if config.method == "awq" else config.damp_percent,
        effort=EFFORTS[config.quality],
        zero_min=1 if layout == "gptq" else 0,
        scale_dtypes=(torch.bfloat16, torch.float16) if store == torch.bfloat16 else (torch.float16,),
        store=store,
    )
    return _Run(
        config,
        console,
        source,
        device,
        torch.float32 if device.type == "cpu" else source.dtype,
        store,
        options,
        scratch,
    )


def _check_library(config: QuantizeConfig, source: Source, console: Console) -> None:
    library = libraries.LIBRARIES[config.backend]
    widths = {linear.name: linear.out_features for linear in source.linears(0)}
    libraries.check_model(config.backend, source.config.model_type, widths)
    if library.float16 and source.dtype != torch.float16:
        name = str(source.dtype).removeprefix("torch.")
        console.warn(f"{library.title} works in float16: weights in {name} are converted, and may overflow")


# -- the work


def _blocks(
    run: _Run, windows: Windows, writer: CheckpointWriter, kept: KeptStates, batch: capture.MicroBatch
) -> None:
    source, device = run.source, run.device
    done = len(writer.steps)
    for step in writer.steps:
        run.reports += [LayerReport(**report) for report in step["reports"]]
    if done > len(source.blocks):
        return
    with run.console.blocks(len(source.blocks)) as progress:
        if done < len(source.blocks):
            with run.stage("embed"):
                home = _home(run, windows.tokens)
                states, calls = capture.embed(source, windows.tokens, home, device, run.compute)
                reference = capture.copied(states) if run.options.effort.follow else None
        if done:
            run.console.note(f"going on after {done} of {len(source.blocks)} blocks that an earlier run did")
            if done < len(source.blocks):
                progress.step("replay of what is done")
                with run.stage("replay of what is done"):
                    _catch_up(run, writer, kept, states, reference, calls, batch)
            progress.skip(done)
        for index in range(done, len(source.blocks)):
            while True:
                reported = len(run.reports)
                try:
                    kwargs = calls.kwargs[index]
                    follower = _block(run, index, writer, states, reference, kwargs, batch, progress)
                    break
                except torch.cuda.OutOfMemoryError as error:
                    told = str(error)
                # Outside of the handler, which would keep what the failed attempt held.
                source.release(source.modules[index])
                writer.forget()
                del run.reports[reported:]
                streams = [states] if reference is None else [states, reference]
                _relieve(run, source.blocks[index], streams, batch, told)
            block = source.modules[index]
            if index + 1 < len(source.blocks):
                progress.step("replay")
                with run.stage("replay"):
                    kept.wait()
                    capture.replay(block, source.blocks[index], states, kwargs, batch)
                    if follower is not None:
                        follower.advance(source.blocks[index])
            del follower
            source.release(block)
            writer.commit({"reports": [asdict(r) for r in run.reports[reported:]], "windows": batch.windows})
            if index + 1 < len(source.blocks):
                kept.offer(states, index + 1)
            progress.advance()
    with run.stage("pass through"):
        _copy_outside(run, writer)
    writer.commit({"reports": [], "windows": batch.windows})


def _block(
    run: _Run,
    index: int,
    writer: CheckpointWriter,
    states: capture.States,
    reference: capture.States | None,
    kwargs: dict[str, Any],
    batch: capture.MicroBatch,
    progress: Blocks,
) -> Follower | None:
    """Quantizes one block and hands everything of it to the writer; the states stay as they are.

    reference: the source's own states, where they are followed; the result takes them on.
    """
    source, name, block = run.source, run.source.blocks[index], run.source.modules[index]
    progress.step("load")
    with run.stage("load"):
        source.load(block, name, run.device, run.compute)
    groups = capture.distinct_inputs(block, states, kwargs)
    _all_reached(source, index, groups)
    folds = _folds(run, index, states, kwargs) if run.config.method == "awq" else []
    moments: list[Tensor | None] = [None] * len(groups)
    if folds or reference is None:
        progress.step("capture")
        with run.stage("capture"):
            moments = _moments(run, block, name, states, kwargs, groups, batch)
    follower = None if reference is None else Follower(block, reference, states, kwargs, batch)
    changes = BlockChanges()
    with run.stage("solve and write"):
        for solved in solve_block(block, name, groups, moments, folds, run.options, changes, follower):
            progress.step(f"solved {solved.path}")
            with run.stage("of which write"):
                _write(run, writer, name, solved)
    with run.stage("pass through"):
        _pass_through(run, writer, block, index, changes)
    return follower


def _relieve(
    run: _Run, name: str, streams: list[capture.States], batch: capture.MicroBatch, told: str
) -> None:
    """After memory ran out in a block: gives up what can be done without, for another attempt.

    Errors: `WorkError` where nothing is left, saying how much would have been needed; `told`: PyTorch's words.
    """
    moved = sum(states.to_host() for states in streams) > 0
    if moved or batch.halve():
        torch.cuda.empty_cache()
        how = "the states in host memory" if moved else f"{batch.windows} windows at a time"
        run.console.warn(f"{name}: out of memory on {run.device}, tried again with {how}")
        return
    match = re.search(r"allocate ([\d.]+) ([KMG])iB", told)
    more = f" ({match[1]} {match[2]}iB more were asked for)" if match else ""
    raise WorkError(
        f"out of memory on {run.device} in {name}{more}, with one window at a time and the states in host memory: "
        "free the GPU, raise --max_memory, lower --calib_seq_len, or take --device cpu"
    )


def _catch_up(
    run: _Run,
    writer: CheckpointWriter,
    kept: KeptStates,
    states: capture.States,
    reference: capture.States | None,
    calls: capture.Calls,
    batch: capture.MicroBatch,
) -> None:
    """Brings the states to where the first block that is not done takes them, through those in the files; and the
    source's own, where they are followed, through the source's blocks.

    In the same micro-batches as then: their size can change the last bits of a product.
    """
    done = len(writer.steps)
    if reference is not None:
        for index in range(done):
            batch.windows = writer.steps[index]["windows"]
            name, block = run.source.blocks[index], run.source.modules[index]
            run.source.load(block, name, run.device, run.compute)
            capture.replay(block, name, reference, calls.kwargs[index], batch)
            run.source.release(block)
    start = kept.restore(states, done)
    if start < done:
        quantized = QuantizedSource(run.source, writer.directory)
        for index in range(start, done):
            batch.windows = writer.steps[index]["windows"]
            name, block = run.source.blocks[index], quantized.modules[index]
            quantized.load(block, name, run.device, run.compute)
            capture.replay(block, name, states, calls.kwargs[index], batch)
            quantized.release(block)
    batch.windows = writer.steps[-1]["windows"]


def _home(run: _Run, tokens: Tensor) -> torch.device:
    """Where the states live: on the device if they take at most a third of what is free, else in host memory."""
    if run.device.type == "cpu":
        return run.device
    width = run.source.skeleton.get_input_embeddings().weight.shape[1]
    needed = tokens.numel() * width * run.compute.itemsize * (2 if run.options.effort.follow else 1)
    free = capture.free_memory(run.device, run.config.max_memory)
    return run.device if needed < free / 3 else torch.device("cpu")


def _all_reached(source: Source, index: int, groups: list[list[str]]) -> None:
    reached = {path for group in groups for path in group}
    missed = [linear.name for linear in source.linears(index) if linear.path not in reached]
    if missed:
        raise WorkError(f"{missed[0]} is never used in the forward pass: this architecture is not supported")


def _folds(run: _Run, index: int, states: capture.States, kwargs: dict[str, Any]) -> list[Fold]:
    """The folds of block `index` that hold for what it computes. Errors: `InputError` where the first has none."""
    block = run.source.modules[index]
    named = find_folds(block, run.source.config)
    folds = exact_folds(block, named, states.get(0, 1), lambda hidden: capture.forward(block, hidden, kwargs))
    if index == 0 and not folds:
        raise unknown(block)
    if index == 0 and len(folds) < len(named):
        without = ", ".join(t for fold in named if fold not in folds for t in fold.targets)
        run.console.warn(f"{type(block).__name__}: no channel scales fit {without}; rounded without them")
    return folds


def _moments(
    run: _Run,
    block: torch.nn.Module,
    name: str,
    states: capture.States,
    kwargs: dict[str, Any],
    groups: list[list[str]],
    batch: capture.MicroBatch,
) -> list[Tensor | None]:
    sums: list[SecondMoment] = []
    for paths in groups:
        linear = block.get_submodule(paths[0])
        assert isinstance(linear, torch.nn.Linear)
        sums.append(SecondMoment(linear.in_features, run.device))
    capture.capture(block, states, kwargs, groups, batch, lambda index, x: sums[index].add(x))
    found: list[Tensor | None] = []
    for paths, total in zip(groups, sums, strict=True):
        if total.finite():
            found.append(total.finish())
        else:
            run.console.warn(f"{name}.{paths[0]}: its inputs overflow; rounded to nearest")
            found.append(None)
    return found


def _write(run: _Run, writer: CheckpointWriter, name: str, solved: Solved) -> None:
    config, prefix = run.config, run.source.stored_name(f"{name}.{solved.path}")
    tensors = packing.pack(
        config.file_layout,
        solved.q,
        solved.grid,
        config.group_size,
        config.bits,
        g_idx=solved.g_idx,
        scale_dtype=run.store,
        symmetric=config.symmetric,
    )
    for suffix, tensor in tensors.items():
        writer.add(f"{prefix}.{suffix}", tensor)
    if len(run.reports) % 7 == 0:  # a sample of layers is unpacked again and compared
        writer.remember(prefix, solved.q, solved.grid.scale, solved.grid.zero)
    report = solved.report
    run.reports.append(report)
    if report.fallback is not None:
        run.console.warn(f"{report.name}: {report.fallback}")
    elif report.damping > run.options.damping:
        run.console.warn(
            f"{report.name}: damping raised to {report.damping:g} before the factorization succeeded"
        )
    if report.dead and report.fallback is None:
        run.console.warn(
            f"{report.name}: {report.dead} of {solved.q.shape[1]} input channels carried nothing; their weights are "
            "rounded to nearest"
        )


def _others(source: Source, index: int | None) -> list[str]:
    """Stored names of what is not quantized: in block `index`, or (None) in no block."""
    prefixes = tuple(source.stored_name(f"{block}.") for block in source.blocks)
    if index is None:
        return sorted(name for name in source.files if not name.startswith(prefixes))
    quantized = {source.stored_name(f"{linear.name}.weight") for linear in source.linears(index)}
    return sorted(n for n in source.files if n.startswith(prefixes[index]) and n not in quantized)


def _head_copy(run: _Run) -> tuple[str, str] | None:
    """The tied output head's name and tensor, where the file is to hold it twice.

    AutoGPTQ takes what the file does not hold for zero, tied or not; who asks for its layout by name gets a file
    that it can read.
    """
    return run.source.tied_head if run.config.layout == "gptq" else None


def _plan(run: _Run) -> list[Planned]:
    """Every tensor of the checkpoint, block by block and then the rest."""
    source, config = run.source, run.config
    planned: list[Planned] = []

    def copied(stored: str, name: str | None = None) -> Planned:
        dtype, shape = source.describe(stored)
        return Planned(name or stored, run.store if dtype.is_floating_point else dtype, shape)

    for index in range(len(source.blocks)):
        for linear in source.linears(index):
            tensors = packing.planned(
                config.file_layout,
                linear.out_features,
                linear.in_features,
                config.group_size,
                config.bits,
                scale_dtype=run.store,
                symmetric=config.symmetric,
            )
            prefix = source.stored_name(linear.name)
            planned += [Planned(f"{prefix}.{suffix}", *what) for suffix, what in tensors.items()]
        planned += [copied(stored) for stored in _others(source, index)]
    planned += [copied(stored) for stored in _others(source, None)]
    head = _head_copy(run)
    if head is not None:
        planned.append(copied(head[1], head[0]))
    return planned


def _pass_through(
    run: _Run, writer: CheckpointWriter, block: torch.nn.Module, index: int, changes: BlockChanges
) -> None:
    """Writes what is not quantized in block `index`: as folds changed it, or as it was.

    The block goes on with what the file holds, so that reading it back gives the same states.
    """
    source, prefix = run.source, f"{run.source.blocks[index]}."
    changed = {source.stored_name(f"{prefix}{name}"): name for name in changes.names}
    for stored in _others(source, index):
        tensor = block.get_parameter(changed[stored]) if stored in changed else source.read(stored)
        writer.add(stored, _stored(run, stored, tensor))
    quantized = {f"{linear.path}.weight" for linear in source.linears(index)}
    for name, parameter in block.named_parameters():
        if name not in quantized:
            parameter.copy_(parameter.to(run.store))


def _copy_outside(run: _Run, writer: CheckpointWriter) -> None:
    for stored in _others(run.source, None):
        writer.add(stored, _stored(run, stored, run.source.read(stored)))
    head = _head_copy(run)
    if head is not None:
        writer.add(head[0], _stored(run, head[0], run.source.read(head[1])))


def _stored(run: _Run, name: str, tensor: Tensor) -> Tensor:
    """A tensor in the dtype of the file. Errors: `FinalError` where float16 cannot hold it."""
    if not tensor.is_floating_point() or tensor.dtype == run.store:
        return tensor
    cast = tensor.to(run.store)
    if bool(torch.isfinite(tensor).all()) and not bool(torch.isfinite(cast).all()):
        raise FinalError(f"{name} does not fit float16: convert the model to BF16 first")
    return cast


# -- the end


def _settings(run: _Run) -> dict[str, Any]:
    config = run.config
    return packing.quantization_config(
        config.file_layout,
        method=config.method,
        bits=config.bits,
        group_size=config.group_size,
        symmetric=config.symmetric,
        desc_act=config.dynamic_groups,
        damp_percent=run.options.damping,
        not_converted=["lm_head"],
    )


def _config_json(run: _Run) -> dict[str, Any]:
    raw = run.source.published_config()
    raw["dtype" if "dtype" in raw else "torch_dtype"] = str(run.store).removeprefix("torch.")
    raw["quantization_config"] = _settings(run)
    return raw


_OWN = ("config.json", "quantize_config.json", *card.OWN)


def _side_files(run: _Run) -> list[Path]:
    return [path for path in run.source.side_files() if path.name not in _OWN]


def _measure(run: _Run, staging: Staging, heldout: Tensor | None) -> Measured | None:
    """What the files lose, None where it is not asked. Errors: `FinalError` over a limit."""
    if heldout is None:
        return None
    with run.stage("measuring"):
        measured = measure(run.source, staging.content, heldout, run.device)
    _within(run.config, measured)
    return measured


def _describe(
    run: _Run, staging: Staging, windows: Windows, heldout: Tensor | None, measured: Measured | None
) -> None:
    """Writes what goes beside the weights; nothing in it depends on when, where or how long."""
    source = run.source
    if run.config.file_layout == "gptq" and run.library is None:
        staging.write_json("quantize_config.json", _settings(run))
    facts = card.Facts(
        config=run.config,
        directory=source.directory,
        source_bytes=_source_bytes(source),
        quantized_bytes=sum(file.stat().st_size for file in staging.content.glob("*.safetensors")),
        architecture=type(source.skeleton).__name__,
        tied=source.tied_head is not None,
        windows=windows,
        heldout_sha256=None if heldout is None else hashlib.sha256(heldout.numpy().tobytes()).hexdigest(),
        damping=run.options.damping,
        layers=run.reports,
        measured=measured,
        library=None if run.library is None else run.library.versions,
    )
    for name, content in card.files(facts).items():
        staging.write(name, content)


def _source_bytes(source: Source) -> int:
    return sum(path.stat().st_size for path in set(source.files.values()))


def _within(config: QuantizeConfig, measured: Measured) -> None:
    """The gates. Errors: `FinalError` where a limit is passed; nothing is published then."""
    if config.max_kl is not None and measured.kl > config.max_kl:
        raise FinalError(
            f"KL divergence {measured.kl:.4f} is over --max_kl {config.max_kl:g}: nothing published"
        )
    increase = 100 * (measured.perplexity_quantized / measured.perplexity_source - 1)
    if config.max_ppl_increase is not None and increase > config.max_ppl_increase:
        raise FinalError(
            f"perplexity rises by {increase:.2f} %, over --max_ppl_increase {config.max_ppl_increase:g}: "
            "nothing published"
        )


def _rows(
    run: _Run, windows: Windows, measured: Measured | None, size: int, worked: float, total: float
) -> list[tuple[str, str]]:
    before = _source_bytes(run.source)
    rows = [
        ("written", str(run.config.target)),
        ("size", f"{before / 2**20:,.1f} MiB -> {size / 2**20:,.1f} MiB"),
        ("calibration", str(windows)),
        ("time", f"{duration(total)}, of which quantization {duration(worked)}"),
    ]
    if run.library is not None:
        rows.append(("by", ", ".join(f"{name} {version}" for name, version in run.versions.items())))
    else:
        worst = max(run.reports, key=lambda r: r.error)
        slowest = max(run.reports, key=lambda r: r.seconds)
        rows.append(("slowest layer", f"{slowest.name}: {slowest.seconds:.2f} s"))
        rows.append(("worst layer", f"{worst.name}: relative output error {worst.error:.2e}"))
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in run.stages.items() if seconds >= 0.05)
    rows.append(("stages", stages))
    fallbacks = sum(r.fallback is not None for r in run.reports)
    if fallbacks:
        rows.append(("fallback", f"{fallbacks} layers rounded to nearest, see quantization_report.json"))
    if run.device_bytes:
        rows.append(("device memory", f"{run.device_bytes / 2**30:.2f} GiB at most"))
    if measured is not None:
        rows += [
            ("perplexity", f"{measured.perplexity_source:.3f} -> {measured.perplexity_quantized:.3f}"),
            ("KL divergence", f"{measured.kl:.5f} nats a token over {measured.tokens:,} tokens"),
            ("same next token", f"{100 * measured.agreement:.1f} %"),
        ]
    if run.config.not_served is not None:
        rows.append(("vLLM", "does not serve this combination"))
    return rows
