"""The run: what is asked -> what is published. The only loop over blocks."""

from __future__ import annotations

import importlib.metadata
import shlex
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import capture
import layouts
import packing
from calibration import Windows, load_windows, longest_window
from checkpoint import CheckpointWriter, check_target
from config import EMBEDDED_MODEL, QuantizeConfig
from console import Console, duration
from errors import InputError, WorkError
from evaluate import Measured, heldout_windows, measure, pick_device, sample
from folds import Fold, exact_folds, find_folds, unknown
from hub import resolve_model
from moments import SecondMoment
from solve import EFFORTS, BlockChanges, LayerReport, Solved, SolveOptions, solve_block
from source import Source, convert_pickles

AWQ_DAMPING = 0.05  # of the mean diagonal; measured on held-out text


@dataclass(frozen=True, slots=True)
class Result:
    """What was published, for the front door to show."""

    output: Path
    method: str
    bits: int
    layout: str
    rows: list[tuple[str, str]]
    sample: str | None
    serve_line: str


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

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time inside to `stages`; device work belongs to the stage that started it."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - start


def quantize(config: QuantizeConfig, console: Console) -> Result:
    """Quantizes, writes, checks, measures. Errors: `InputError` before any long work, `WorkError` after."""
    started = time.perf_counter()
    run = _prepare(config, console)
    windows = load_windows(config.calibration, run.source.tokenizer, log=console.warn)
    console.note(f"calibration: {windows}")
    heldout = None
    if config.eval_data != "off":
        heldout = heldout_windows(config, run.source.tokenizer, log=console.note)
    if run.device.type == "cuda":
        torch.cuda.set_device(run.device)
        torch.zeros((), device=run.device)  # the statistics exist once the device is in use
        torch.cuda.reset_peak_memory_stats(run.device)
    with CheckpointWriter(config.target, overwrite=config.may_replace) as writer:
        _blocks(run, windows, writer)
        worked = time.perf_counter() - started
        gate = (lambda partial: _measure(run, partial, heldout)) if heldout is not None else None
        published, measured = _finish(run, writer, windows, gate)
    rows = _rows(run, windows, measured, published, worked, time.perf_counter() - started)
    text = sample(config.target, run.source.tokenizer, run.device, _PROMPT) if config.embedded else None
    return Result(
        config.target, config.method, config.bits, config.file_layout, rows, text, serve_line(config)
    )


_PROMPT = "This module provides"


def serve_line(config: QuantizeConfig) -> str:
    """The command that serves the result."""
    flag = "" if config.file_layout == "compressed-tensors" else f" --quantization {config.file_layout}"
    return f"./run_vllm.sh {shlex.quote(str(config.target))}{flag}"


# -- before the work


def _prepare(config: QuantizeConfig, console: Console) -> _Run:
    check_target(config.target, config.may_replace)
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
    if config.method == "awq":
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


# -- the work


def _blocks(run: _Run, windows: Windows, writer: CheckpointWriter) -> None:
    source, device = run.source, run.device
    widest = max(max(x.in_features, x.out_features) for x in source.linears(0))
    home = _home(run, windows.tokens)
    with run.stage("embed"):
        states, calls = capture.embed(source, windows.tokens, home, device, run.compute)
    batch = capture.MicroBatch(device, states.length, widest, limit=run.config.max_memory)
    with run.console.blocks(len(source.blocks)) as progress:
        for index, name in enumerate(source.blocks):
            block = source.modules[index]
            progress.step("load")
            with run.stage("load"):
                source.load(block, name, device, run.compute)
            kwargs = calls.kwargs[index]
            groups = capture.distinct_inputs(block, states, kwargs)
            _all_reached(source, index, groups)
            progress.step("capture")
            with run.stage("capture"):
                moments = _moments(run, block, name, states, kwargs, groups, batch)
            folds = _folds(run, index, states, kwargs) if run.config.method == "awq" else []
            changes = BlockChanges()
            with run.stage("solve and write"):
                for solved in solve_block(block, name, groups, moments, folds, run.options, changes):
                    progress.step(f"solved {solved.path}")
                    with run.stage("of which write"):
                        _write(run, writer, name, solved)
            for parameter in sorted(changes.names):
                writer.add(
                    source.stored_name(f"{name}.{parameter}"),
                    _stored(run, name, block.get_parameter(parameter)),
                )
            with run.stage("pass through"):
                _pass_through(run, writer, index, changes)
            if index + 1 < len(source.blocks):
                progress.step("replay")
                with run.stage("replay"):
                    capture.replay(block, name, states, kwargs, batch)
            source.release(block)
            progress.advance()
    with run.stage("pass through"):
        _pass_through(run, writer, None, BlockChanges())


def _home(run: _Run, tokens: Tensor) -> torch.device:
    """Where the states live: on the device if they take at most a third of what is free, else in host memory."""
    if run.device.type == "cpu":
        return run.device
    width = run.source.skeleton.get_input_embeddings().weight.shape[1]
    needed = tokens.numel() * width * run.compute.itemsize
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


def _pass_through(run: _Run, writer: CheckpointWriter, index: int | None, changes: BlockChanges) -> None:
    """Copies tensors that are not quantized: those of block `index`, or (None) those of no block."""
    source = run.source
    prefixes = tuple(source.stored_name(f"{block}.") for block in source.blocks)
    if index is None:
        names = [n for n in source.outside() if not n.startswith(prefixes)]
    else:
        own = prefixes[index]
        changed = {source.stored_name(f"{source.blocks[index]}.{n}") for n in changes.names}
        quantized = {source.stored_name(f"{linear.name}.weight") for linear in source.linears(index)}
        names = [n for n in source.files if n.startswith(own) and n not in changed and n not in quantized]
    for stored in sorted(names):
        writer.add(stored, _stored(run, stored, source.read(stored)))


def _stored(run: _Run, name: str, tensor: Tensor) -> Tensor:
    """A tensor in the dtype of the file. Errors: `WorkError` where float16 cannot hold it."""
    if not tensor.is_floating_point() or tensor.dtype == run.store:
        return tensor
    cast = tensor.to(run.store)
    if bool(torch.isfinite(tensor).all()) and not bool(torch.isfinite(cast).all()):
        raise WorkError(f"{name} does not fit float16: convert the model to BF16 first")
    return cast


# -- the end


def _finish(run: _Run, writer: CheckpointWriter, windows: Windows, gate: Any) -> tuple[Any, Measured | None]:
    config, source = run.config, run.source
    raw = source.published_config()
    name = str(run.store).removeprefix("torch.")
    raw["dtype" if "dtype" in raw else "torch_dtype"] = name
    settings = packing.quantization_config(
        config.file_layout,
        method=config.method,
        bits=config.bits,
        group_size=config.group_size,
        symmetric=config.symmetric,
        desc_act=config.dynamic_groups,
        damp_percent=run.options.damping,
        not_converted=["lm_head"],
    )
    raw["quantization_config"] = settings
    extra: dict[str, dict[str, Any]] = {}
    if config.file_layout == "gptq":
        extra["quantize_config.json"] = settings
    extra["quantization_report.json"] = {
        "method": config.method,
        "bits": config.bits,
        "group_size": config.group_size,
        "symmetric": config.symmetric,
        "format": config.file_layout,
        "quality": config.quality,
        "seed": config.calibration.seed,
        "calibration": {"tokens": windows.tokens.numel(), "sha256": windows.fingerprint},
        "versions": {n: importlib.metadata.version(n) for n in ("torch", "transformers")},
        "seconds": {name: round(seconds, 2) for name, seconds in run.stages.items()},
        "layers": [asdict(r) | {"seconds": round(r.seconds, 3)} for r in run.reports],
    }
    measured: list[Measured] = []

    def check(partial: Path) -> None:
        if gate is not None:
            measured.append(gate(partial))
            _within(config, measured[0])

    published = writer.finish(
        raw,
        source.side_files(),
        extra,
        layout=config.file_layout,
        bits=config.bits,
        group_size=config.group_size,
        accept=check,
    )
    return published, measured[0] if measured else None


def _measure(run: _Run, directory: Path, heldout: Tensor) -> Measured:
    return measure(run.source, directory, heldout, run.device)


def _within(config: QuantizeConfig, measured: Measured) -> None:
    """The gates. Errors: `WorkError` where a limit is passed; nothing is published then."""
    if config.max_kl is not None and measured.kl > config.max_kl:
        raise WorkError(
            f"KL divergence {measured.kl:.4f} is over --max_kl {config.max_kl:g}: nothing published"
        )
    increase = 100 * (measured.perplexity_quantized / measured.perplexity_source - 1)
    if config.max_ppl_increase is not None and increase > config.max_ppl_increase:
        raise WorkError(
            f"perplexity rises by {increase:.2f} %, over --max_ppl_increase {config.max_ppl_increase:g}: "
            "nothing published"
        )


def _rows(
    run: _Run, windows: Windows, measured: Measured | None, published: Any, worked: float, total: float
) -> list[tuple[str, str]]:
    before = sum(path.stat().st_size for path in set(run.source.files.values()))
    worst = max(run.reports, key=lambda r: r.error)
    rows = [
        ("written", str(run.config.target)),
        ("size", f"{before / 2**20:,.1f} MiB -> {published.tensor_bytes / 2**20:,.1f} MiB"),
        ("calibration", str(windows)),
        ("time", f"{duration(total)}, of which quantization {duration(worked)}"),
        ("worst layer", f"{worst.name}: relative output error {worst.error:.2e}"),
    ]
    fallbacks = sum(r.fallback is not None for r in run.reports)
    if fallbacks:
        rows.append(("fallback", f"{fallbacks} layers rounded to nearest, see quantization_report.json"))
    if run.device.type == "cuda":
        rows.append(
            ("device memory", f"{torch.cuda.max_memory_allocated(run.device) / 2**30:.2f} GiB at most")
        )
    if measured is not None:
        rows += [
            ("perplexity", f"{measured.perplexity_source:.3f} -> {measured.perplexity_quantized:.3f}"),
            ("KL divergence", f"{measured.kl:.5f} nats a token over {measured.tokens:,} tokens"),
            ("same next token", f"{100 * measured.agreement:.1f} %"),
        ]
    if layouts.not_served(
        run.config.file_layout,
        run.config.bits,
        run.config.group_size,
        run.config.symmetric,
        run.config.dynamic_groups,
    ):
        rows.append(("vLLM", "does not serve this combination"))
    return rows
