"""The run: what is asked -> what is published."""

from __future__ import annotations

import hashlib
import importlib.metadata
import resource
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_quantize.backends import registry
from llm_quantize.backends.session import Job, Session
from llm_quantize.blockwise.export import check_settings, config_json, planned_tensors, quantization_settings
from llm_quantize.blockwise.kernel_warmup import KernelWarmup
from llm_quantize.blockwise.layer_report import LayerReport
from llm_quantize.blockwise.loop import quantize_blocks
from llm_quantize.blockwise.resume import first_entry, run_identity
from llm_quantize.blockwise.run_context import ExecutionPlan, RunContext, choose_storage
from llm_quantize.calibration.windows import Windows, load_windows
from llm_quantize.checkpoint.external import verify_external
from llm_quantize.checkpoint.verification import verify_written
from llm_quantize.checkpoint.writer import CheckpointWriter
from llm_quantize.config import QuantizeConfig, shown_text
from llm_quantize.console import Console, duration
from llm_quantize.device import Device
from llm_quantize.errors import FinalError, InputError
from llm_quantize.evaluation import model_card
from llm_quantize.evaluation.heldout import heldout_windows
from llm_quantize.evaluation.perplexity import Measured, measure
from llm_quantize.evaluation.sample import sample
from llm_quantize.io.atomic_directory import AtomicDirectory
from llm_quantize.io.embedded_files import EMBEDDED_CALIBRATION, EMBEDDED_NAME
from llm_quantize.io.escaping import shell_word
from llm_quantize.io.journal import Journal
from llm_quantize.io.manifest import files_below
from llm_quantize.io.shown_names import shown_name
from llm_quantize.model.block_forward import MicroBatch
from llm_quantize.preparation import Prepared, make_solver, prepare, stored_dtype
from llm_quantize.timing import StageTimes
from llm_quantize.types import Method
from llm_quantize.validation import check_places, validate

PROMPT = "This module provides"  # of the embedded model's sample
OWN_FILES = ("config.json", "quantize_config.json", *model_card.OWN)  # written anew, whatever the source has
ROOT = Path(__file__).resolve().parents[3]  # of the tree, where the program runs from there


@dataclass(frozen=True, slots=True)
class Result:
    """What was published.

    output: the directory. rows: of the summary. sample: words by the embedded model. serve_line: the command that
    serves it. seconds: by stage. device_bytes, host_bytes: of memory at most, up to the finished files, of the process
    that made them; the first is 0 without a GPU. versions: of what did the work. measured: None where it was not asked
    for.
    """

    output: Path
    method: Method
    bits: int
    format: str
    rows: list[tuple[str, str]]
    sample: str | None
    serve_line: str
    seconds: dict[str, float]
    device_bytes: int
    host_bytes: int
    versions: dict[str, str]
    measured: Measured | None


@dataclass(slots=True)
class _Written:
    """What wrote the checkpoint, and what it took. library: None where this program did the work."""

    tensor_bytes: int
    device_bytes: int
    host_bytes: int
    versions: dict[str, str]
    library: registry.Library | None = None
    reports: list[LayerReport] = field(default_factory=list)


@dataclass(slots=True)
class _Run:
    """What the steps of one run share."""

    config: QuantizeConfig
    console: Console
    device: Device
    times: StageTimes
    output: AtomicDirectory
    prepared: Prepared
    windows: Windows
    heldout: Tensor | None


def quantize(config: QuantizeConfig, console: Console | None = None) -> Result:
    """Quantize, write, check, measure and publish. console: shows progress; without one only warnings are shown.

    Raises InputError before any long work, WorkError after.
    """
    console = console or Console(quiet=True)
    started = time.perf_counter()
    validate(config)
    check_places(config)
    with AtomicDirectory(config.target, overwrite=config.may_replace) as output, ExitStack() as stack:
        device = Device.pick(config.device, config.max_memory)
        times = StageTimes(device)
        warmup = stack.enter_context(KernelWarmup())
        prepared = prepare(config, device, console, lambda found: _warm_up(warmup, config, device, found))
        times.seconds["opening"] = time.perf_counter() - started
        session = None
        if not config.native:
            library = registry.LIBRARIES[config.backend]
            session = stack.enter_context(Session(library, device.torch, console))
        with times.stage("text"):
            windows, heldout = _read_text(config, prepared, console)
        with times.stage("warming up"):
            warmup.join()
        device.start_statistics()
        run = _Run(config, console, device, times, output, prepared, windows, heldout)
        with _kept_for_resume(run):
            written = _write_natively(run) if session is None else _write_by_library(run, session)
            worked = time.perf_counter() - started
            measured = _measure(run)
            with times.stage("describing"):
                _describe(run, written, measured)
            with times.stage("publishing"):
                output.publish()
    rows = _rows(run, written, measured, worked, time.perf_counter() - started)
    text = None
    if config.embedded:
        text = sample(config.target, prepared.model.tokenizer, device.torch, PROMPT)
    return Result(
        output=config.target,
        method=config.method,
        bits=config.bits,
        format=config.checkpoint_format.name,
        rows=rows,
        sample=text,
        serve_line=serve_line(config),
        seconds=times.seconds,
        device_bytes=written.device_bytes,
        host_bytes=written.host_bytes,
        versions=written.versions,
        measured=measured,
    )


def serve_line(config: QuantizeConfig) -> str:
    """The command that serves the result: the tree's script, or vLLM itself where the program is installed."""
    script = "./run_vllm.sh" if (ROOT / "run_vllm.sh").is_file() else "vllm serve"
    return f"{script} {shell_word(str(config.target))}{config.checkpoint_format.serve_flag}"


# -- before the work


def _warm_up(warmup: KernelWarmup, config: QuantizeConfig, device: Device, model_config: Any) -> None:
    """Start it for weights as the config promises; for another dtype, kernels are compiled when they are used."""
    if config.native:
        dtype = model_config.dtype if isinstance(model_config.dtype, torch.dtype) else torch.bfloat16
        warmup.start(make_solver(config, stored_dtype(dtype), most_sweeps=1), device)


def _read_text(config: QuantizeConfig, prepared: Prepared, console: Console) -> tuple[Windows, Tensor | None]:
    """The calibration windows, and the held-out ones where something is to be measured."""
    tokenizer = prepared.model.tokenizer
    windows = load_windows(config.calibration, tokenizer, log=console.warn)
    console.note(f"calibration: {windows}")
    if config.eval_data == "off":
        return windows, None
    heldout = heldout_windows(
        config.eval_data,
        config.eval_samples,
        config.calibration,
        tokenizer,
        embedded=config.embedded,
        log=console.note,
    )
    return windows, heldout


@contextmanager
def _kept_for_resume(run: _Run) -> Iterator[None]:
    """A failure says what is kept for the same command; nothing is where that would fail again."""
    try:
        yield
    except FinalError:
        run.output.keep = False
        raise
    except InputError:
        raise
    except BaseException as error:
        if run.output.keep:
            blocks = len(run.prepared.model.blocks)
            done = min(len(Journal(run.output.work / "journal").entries) - 1, blocks)
            error.add_note(f"{done} of {blocks} blocks are kept, the same command goes on there")
        raise


# -- the work


def _identity(run: _Run) -> dict[str, str | int | float]:
    return run_identity(run.config.identity(), run.prepared.model, run.device, run.windows.fingerprint)


def _write_natively(run: _Run) -> _Written:
    """Everything but what is said of it, complete and read back."""
    config, prepared, device = run.config, run.prepared, run.device
    form = config.checkpoint_format
    context = RunContext(
        model=prepared.model,
        device=device,
        scheme=prepared.solver.scheme,
        format=form,
        solver=prepared.solver,
        compute_dtype=prepared.model.dtype if device.is_gpu else torch.float32,
        store_dtype=prepared.store_dtype,
        console=run.console,
        times=run.times,
        dynamic_groups=config.dynamic_groups,
        repeat_tied_head=form.repeats_tied_head and config.format == form.name,
    )
    planned = planned_tensors(context)
    check_settings(context, planned)
    windows, length = run.windows.tokens.shape
    batch = MicroBatch(device, length, prepared.model.widest())
    storage = choose_storage(context, windows, length)
    begun = {"windows": batch.windows, "in_order": storage == device.torch}
    fresh = config.restart or config.no_resume
    first = first_entry(run.output, _identity(run), begun, restart=fresh)
    batch.windows = first["windows"]
    plan = ExecutionPlan(batch, storage, first["in_order"])
    with CheckpointWriter(run.output, planned, first, keep=not config.no_resume) as writer:
        run.output.write_json("config.json", config_json(context))
        _write_side_files(run)
        quantize_blocks(context, run.windows.tokens, writer, plan)
        settings = quantization_settings(context)
        with run.times.stage("reading back"):
            verify_written(writer, form, settings, device.torch)
        if form.settings_file is not None:
            run.output.write_json(form.settings_file, settings)
    return _Written(
        tensor_bytes=writer.tensor_bytes,
        device_bytes=device.peak_memory(),
        host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        versions={name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        reports=context.reports,
    )


def _write_by_library(run: _Run, session: Session) -> _Written:
    """The same by a library: its files as it writes them, complete and read back."""
    config, model, library = run.config, run.prepared.model, session.library
    # What an interrupted run of this program left is not thrown away unasked; a library leaves nothing to go on from.
    identity = _identity(run) | {"--backend": config.backend}
    first_entry(run.output, identity, {}, restart=config.restart or config.no_resume)
    run.output.clear()
    job = Job(
        model=str(session.model(model, trust=config.trust_remote_code)),
        output=str(run.output.content),
        windows=str(session.windows(run.windows.tokens)),
        method=config.method,
        bits=config.bits,
        group_size=config.group_size,
        symmetric=config.symmetric,
        act_order=config.act_order_groups if config.method == "gptq" and config.desc_act else "none",
        damping=config.damping,
        dtype="float16" if library.float16 else str(run.prepared.store_dtype).removeprefix("torch."),
        blocks=len(model.blocks),
        device=run.device.torch.type,
        trust_remote_code=config.trust_remote_code,
    )
    with run.console.blocks(len(model.blocks)) as progress:
        outcome = session.quantize(job, progress)
    run.times.seconds |= outcome.seconds
    run.output.make_durable()
    written = [path.relative_to(run.output.content).as_posix() for path in files_below(run.output.content)]
    run.output.take_over(written)  # what is published is what is checked now
    with run.times.stage("reading back"):
        tensor_bytes = verify_external(
            run.output.content,
            model,
            config.checkpoint_format,
            config.scheme,
            library.title,
            trust_remote_code=config.trust_remote_code,
        )
    _write_side_files(run)
    return _Written(tensor_bytes, outcome.device_bytes, outcome.host_bytes, session.versions, library)


def _write_side_files(run: _Run) -> None:
    """Write what lies beside the source's weights, as it was when the run began; the source's card as `BASE_CARD`.

    Files that a library wrote itself stay.
    """
    files = run.prepared.model.side_files
    for name, content in files.published():
        if name == model_card.CARD:
            name = model_card.BASE_CARD
        elif name in OWN_FILES:
            continue
        if name not in run.output.manifest:
            run.output.write(name, content)
    files.release()


# -- after the work


def _measure(run: _Run) -> Measured | None:
    """What the files lose; None where it is not asked for. Raises FinalError over a limit."""
    if run.heldout is None:
        return None
    with run.times.stage("measuring"):
        measured = measure(run.prepared.model, run.output.content, run.heldout, run.device)
    config = run.config
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
    return measured


def _describe(run: _Run, written: _Written, measured: Measured | None) -> None:
    """Write what goes beside the weights; nothing in it depends on when, where or how long."""
    config, model = run.config, run.prepared.model
    form, library = config.checkpoint_format, written.library
    base_model = EMBEDDED_NAME
    if config.model_path is not None:
        base_model = shown_name(config.model_path).partition("@")[0]
    heldout_sha256 = None
    if run.heldout is not None:
        heldout_sha256 = hashlib.sha256(run.heldout.numpy().tobytes()).hexdigest()
    facts = model_card.CardFacts(
        method=config.method,
        scheme=config.scheme,
        format=form,
        base_model=base_model,
        on_hub=config.model_path is not None and "/" in base_model,
        command=" ".join(map(shell_word, config.command())),
        base_card=model.side_files.card,
        source_bytes=model.file_bytes,
        quantized_bytes=sum(file.stat().st_size for file in run.output.content.glob("*.safetensors")),
        architecture=type(model.skeleton).__name__,
        repeats_head=config.format == form.name or model.tied_head is None,
        backend=config.backend,
        library=None if library is None else library.title,
        library_versions=None if library is None else written.versions,
        quality=config.quality,
        damping=run.prepared.solver.damping,
        vllm_refusal=config.vllm_refusal,
        windows=run.windows,
        calibration_data=shown_text(config.calibration.data),
        own_calibration_text=config.embedded and config.calibration.data == str(EMBEDDED_CALIBRATION),
        seed=config.calibration.seed,
        eval_data=shown_text(config.eval_data),
        heldout_sha256=heldout_sha256,
        on_calibration_text=config.eval_data == config.calibration.data,
        layers=written.reports,
        measured=measured,
    )
    for name, content in model_card.card_files(facts).items():
        run.output.write(name, content)


def _rows(
    run: _Run, written: _Written, measured: Measured | None, worked: float, total: float
) -> list[tuple[str, str]]:
    """The summary."""
    before = run.prepared.model.file_bytes
    rows = [
        ("written", str(run.config.target)),
        ("size", f"{before / 2**20:,.1f} MiB -> {written.tensor_bytes / 2**20:,.1f} MiB"),
        ("calibration", str(run.windows)),
        ("time", f"{duration(total)}, of which quantization {duration(worked)}"),
    ]
    if written.library is not None:
        rows.append(("by", ", ".join(f"{name} {version}" for name, version in written.versions.items())))
    else:
        worst = max(written.reports, key=lambda r: r.error)
        slowest = max(written.reports, key=lambda r: r.seconds)
        rows.append(("slowest layer", f"{slowest.name}: {slowest.seconds:.2f} s"))
        rows.append(("worst layer", f"{worst.name}: relative output error {worst.error:.2e}"))
    stages = ", ".join(f"{name} {s:.1f} s" for name, s in run.times.seconds.items() if s >= 0.05)
    rows.append(("stages", stages))
    fallbacks = sum(r.fallback is not None for r in written.reports)
    if fallbacks:
        rows.append(("fallback", f"{fallbacks} layers rounded to nearest, see quantization_report.json"))
    if written.device_bytes:
        rows.append(("device memory", f"{written.device_bytes / 2**30:.2f} GiB at most"))
    if measured is not None:
        rows += [
            ("perplexity", f"{measured.perplexity_source:.3f} -> {measured.perplexity_quantized:.3f}"),
            ("KL divergence", f"{measured.kl:.5f} nats a token over {measured.tokens:,} tokens"),
            ("same next token", f"{100 * measured.agreement:.1f} %"),
        ]
    if run.config.vllm_refusal is not None:
        rows.append(("vLLM", "does not serve this combination"))
    return rows
