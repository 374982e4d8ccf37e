"""The run: what is asked -> what is published."""

from __future__ import annotations

import hashlib
import shlex
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_quantize.backends import registry, session
from llm_quantize.blockwise.export import config_json, plan, settings, side_files
from llm_quantize.blockwise.kernel_warmup import KernelWarmup
from llm_quantize.blockwise.loop import ExecutionPlan, choose_storage, quantize_blocks
from llm_quantize.blockwise.resume import KeptStates, first_entry, identity
from llm_quantize.blockwise.run_context import RunContext, prepare, solve_options
from llm_quantize.calibration.windows import Windows, load_windows
from llm_quantize.checkpoint import external
from llm_quantize.checkpoint.writer import CheckpointWriter
from llm_quantize.config import QuantizeConfig
from llm_quantize.console import Console, duration
from llm_quantize.errors import FinalError, InputError
from llm_quantize.evaluation import model_card
from llm_quantize.evaluation.perplexity import Measured, heldout_windows, measure, sample
from llm_quantize.io.atomic_directory import AtomicDirectory
from llm_quantize.io.journal import Journal
from llm_quantize.model import block_forward
from llm_quantize.model.source import Source


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


def quantize(config: QuantizeConfig, console: Console) -> Result:
    """Quantizes, writes, checks, measures. Errors: `InputError` before any long work, `WorkError` after."""
    started = time.perf_counter()
    with AtomicDirectory(config.target, overwrite=config.may_replace) as output_dir, ExitStack() as stack:
        warmup = stack.enter_context(KernelWarmup())
        run = prepare(config, console, partial(_warm_up, warmup, config))
        run.stages["opening"] = time.perf_counter() - started
        if config.backend != registry.NATIVE:
            library = session.Session(registry.LIBRARIES[config.backend], run.device, console)
            run.library = stack.enter_context(library)
        with run.stage("text"):
            windows = load_windows(config.calibration, run.source.tokenizer, log=console.warn)
            console.note(f"calibration: {windows}")
            heldout = None
            if config.eval_data != "off":
                heldout = heldout_windows(config, run.source.tokenizer, log=console.note)
        with run.stage("warming up"):
            warmup.end()
        if run.device.type == "cuda":
            torch.cuda.set_device(run.device)
            torch.zeros((), device=run.device)  # the statistics exist once the device is in use
            torch.cuda.reset_peak_memory_stats(run.device)
        with _kept(output_dir, len(run.source.blocks)):
            write = _write_checkpoint if run.library is None else _have_written
            size = write(run, windows, output_dir)
            memory = run.device_bytes, run.host_bytes
            worked = time.perf_counter() - started
            measured = _measure(run, output_dir, heldout)
            with run.stage("describing"):
                _describe(run, output_dir, windows, heldout, measured)
            with run.stage("publishing"):
                output_dir.publish()
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


def _warm_up(warmup: KernelWarmup, config: QuantizeConfig, device: torch.device, model: Any) -> None:
    """Begins it, for weights as the model's config promises; of another dtype, kernels are compiled in their turn."""
    if config.backend == registry.NATIVE:
        dtype = model.dtype if isinstance(model.dtype, torch.dtype) else torch.bfloat16
        warmup.begin(solve_options(config, dtype), device, scales=config.method == "awq")


@contextmanager
def _kept(output_dir: AtomicDirectory, blocks: int) -> Iterator[None]:
    """A failure says what is kept for the same command; nothing is where that would fail again."""
    try:
        yield
    except FinalError:
        output_dir.keep = False
        raise
    except InputError:
        raise
    except BaseException as error:
        if output_dir.keep:
            done = min(len(Journal(output_dir.work / "journal").entries) - 1, blocks)
            error.add_note(f"{done} of {blocks} blocks are kept, the same command goes on there")
        raise


def _write_checkpoint(run: RunContext, windows: Windows, output_dir: AtomicDirectory) -> int:
    """Everything but what is told of it, complete and read back; how many bytes its tensors have."""
    config = run.config
    run_id = identity(config, run.source, run.device, windows.fingerprint)
    length = windows.tokens.shape[1]
    widest = max(max(x.in_features, x.out_features) for x in run.source.linears(0))
    batch = block_forward.MicroBatch(run.device, length, widest, limit=config.max_memory)
    storage = choose_storage(run, windows.tokens)
    begun = {"windows": batch.windows, "in_order": storage == run.device}
    first = first_entry(output_dir, run_id, begun, restart=config.restart or config.no_resume)
    batch.windows = first["windows"]
    execution = ExecutionPlan(batch, storage, first["in_order"])
    keep = not config.no_resume
    with (
        CheckpointWriter(output_dir, plan(run), first, keep=keep) as writer,
        KeptStates(output_dir, keep) as kept,
    ):
        output_dir.write_json("config.json", config_json(run))
        quantize_blocks(run, windows, writer, kept, execution)
        _copy_side_files(run, output_dir)
        with run.stage("reading back"):
            writer.complete(config.file_layout, config.bits, config.group_size, run.device)
    return writer.tensor_bytes


def _have_written(run: RunContext, windows: Windows, output_dir: AtomicDirectory) -> int:
    """The same by a library: its files as it writes them, complete and read back."""
    config, source, library = run.config, run.source, run.library
    assert library is not None
    # What an interrupted run of this program left is not thrown away unasked; a library leaves nothing to go on from.
    run_id = identity(config, source, run.device, windows.fingerprint) | {"--backend": config.backend}
    first_entry(output_dir, run_id, {}, restart=config.restart or config.no_resume)
    output_dir.clear()
    job = session.Job(
        model=str(library.model(source, trust=config.trust_remote_code)),
        output=str(output_dir.content),
        windows=str(library.windows(windows.tokens)),
        method=config.method,
        bits=config.bits,
        group_size=config.group_size,
        symmetric=config.symmetric,
        act_order=config.act_order_groups if config.method == "gptq" and config.desc_act else "none",
        damping=config.damp_percent,
        dtype="float16" if library.library.float16 else str(run.store).removeprefix("torch."),
        blocks=len(source.blocks),
        device=run.device.type,
        trust_remote_code=config.trust_remote_code,
    )
    with run.console.blocks(len(source.blocks)) as progress:
        run.outcome = library.quantize(job, progress)
    run.stages |= run.outcome.seconds
    with run.stage("reading back"):
        size = external.verify(
            output_dir.content,
            source,
            config.file_layout,
            config.bits,
            config.group_size,
            config.symmetric,
            library.library.title,
            trust=config.trust_remote_code,
        )
    output_dir.make_durable()
    _copy_side_files(run, output_dir)
    return size


def _copy_side_files(run: RunContext, output_dir: AtomicDirectory) -> None:
    files = side_files(run)
    if run.library is not None:  # what it wrote itself stays; what an interrupted run left would be cut off
        files = [path for path in files if not (output_dir.content / path.name).exists()]
    skipped = output_dir.copy(files)
    if skipped:
        run.console.warn(f"links that lead out of the model's directory are left out: {', '.join(skipped)}")


_PROMPT = "This module provides"


def serve_line(config: QuantizeConfig) -> str:
    """The command that serves the result."""
    flag = "" if config.file_layout == "compressed-tensors" else f" --quantization {config.file_layout}"
    return f"./run_vllm.sh {shlex.quote(str(config.target))}{flag}"


# -- the end


def _measure(run: RunContext, output_dir: AtomicDirectory, heldout: Tensor | None) -> Measured | None:
    """What the files lose, None where it is not asked. Errors: `FinalError` over a limit."""
    if heldout is None:
        return None
    with run.stage("measuring"):
        measured = measure(run.source, output_dir.content, heldout, run.device)
    _within(run.config, measured)
    return measured


def _describe(
    run: RunContext,
    output_dir: AtomicDirectory,
    windows: Windows,
    heldout: Tensor | None,
    measured: Measured | None,
) -> None:
    """Writes what goes beside the weights; nothing in it depends on when, where or how long."""
    source = run.source
    if run.config.file_layout == "gptq" and run.library is None:
        output_dir.write_json("quantize_config.json", settings(run))
    facts = model_card.Facts(
        config=run.config,
        directory=source.directory,
        source_bytes=_source_bytes(source),
        quantized_bytes=sum(file.stat().st_size for file in output_dir.content.glob("*.safetensors")),
        architecture=type(source.skeleton).__name__,
        tied=source.tied_head is not None,
        windows=windows,
        heldout_sha256=None if heldout is None else hashlib.sha256(heldout.numpy().tobytes()).hexdigest(),
        damping=run.options.damping,
        layers=run.reports,
        measured=measured,
        library=None if run.library is None else run.library.versions,
    )
    for name, content in model_card.files(facts).items():
        output_dir.write(name, content)


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
    run: RunContext, windows: Windows, measured: Measured | None, size: int, worked: float, total: float
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
