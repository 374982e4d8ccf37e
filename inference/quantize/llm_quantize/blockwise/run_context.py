"""What one run has to know before the first block: the source, where and in what it computes, how it rounds."""

from __future__ import annotations

import importlib.metadata
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from llm_quantize.backends import registry, session
from llm_quantize.blockwise.block_solution import LayerReport, SolveOptions, effort
from llm_quantize.calibration.windows import longest_window
from llm_quantize.config import EMBEDDED_MODEL, QuantizeConfig
from llm_quantize.console import Console
from llm_quantize.errors import InputError
from llm_quantize.evaluation.perplexity import pick_device
from llm_quantize.formats import packing
from llm_quantize.io.atomic_directory import check_target
from llm_quantize.io.hub import resolve_model
from llm_quantize.model.awq_mappings import find_mappings
from llm_quantize.model.source import Scratch, Source, convert_pickles

AWQ_DAMPING = 0.05  # of the mean diagonal; measured on held-out text


@dataclass(slots=True)
class RunContext:
    """Everything that is known before the first block, and what is learnt on the way: times and layers."""

    config: QuantizeConfig
    console: Console
    source: Source
    device: torch.device
    compute: torch.dtype
    store: torch.dtype
    options: SolveOptions
    scratch: Scratch | None  # a converted copy of pickled weights
    stages: dict[str, float] = field(default_factory=dict)
    reports: list[LayerReport] = field(default_factory=list)
    library: session.Session | None = None  # None: this program does the work
    outcome: session.Outcome | None = None  # of the library's work
    _inside: float | None = None  # seconds of the stages inside the one that runs; None where none does

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
        """Adds the time inside to `stages`, less that of the stages inside it.

        Device work belongs to the outermost stage that started it, or to the one inside that waited for it.
        """
        self.stages.setdefault(name, 0.0)  # in the order in which they begin
        outer, self._inside, start = self._inside, 0.0, time.perf_counter()
        try:
            yield
            if self.device.type == "cuda" and outer is None:
                torch.cuda.synchronize(self.device)
        finally:
            seconds = time.perf_counter() - start
            self.stages[name] += seconds - self._inside
            self._inside = None if outer is None else outer + seconds


def prepare(
    config: QuantizeConfig, console: Console, checked: Callable[[torch.device, Any], None] = lambda *_: None
) -> RunContext:
    """Opens the source and asks everything that can be asked of it now. Errors: `InputError`, before any long work.

    checked: is given the device and the model's config, before the seconds that building the model takes.
    """
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
        scratch = Scratch()
        directory = convert_pickles(directory, scratch.path)
    source = Source.open(
        directory, trust_remote_code=config.trust_remote_code, checked=partial(checked, device)
    )
    layout = config.file_layout
    parameters = 0
    for index in range(len(source.blocks)):
        for linear in source.linears(index):
            packing.check_shape(
                layout, config.bits, config.group_size, linear.name, linear.out_features, linear.in_features
            )
            parameters += linear.out_features * linear.in_features
    if config.backend != registry.NATIVE:
        _check_library(config, source, console)
    elif config.method == "awq":
        find_mappings(source.modules[0], source.config)  # refuses an unknown architecture now
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
    options = solve_options(config, source.dtype)
    return RunContext(
        config,
        console,
        source,
        device,
        torch.float32 if device.type == "cpu" else source.dtype,
        options.store,
        options,
        scratch,
    )


def solve_options(config: QuantizeConfig, dtype: torch.dtype) -> SolveOptions:
    """How linears are rounded that lie in the source as `dtype`."""
    store = torch.float16 if dtype == torch.float32 else dtype
    return SolveOptions(
        bits=config.bits,
        group_size=config.group_size,
        symmetric=config.symmetric,
        act_order=config.method == "awq" or config.desc_act,
        dynamic_groups=config.dynamic_groups,
        damping=AWQ_DAMPING if config.method == "awq" else config.damp_percent,
        effort=effort(config.quality, config.bits),
        zero_min=1 if config.file_layout == "gptq" else 0,
        scale_dtypes=(torch.bfloat16, torch.float16) if store == torch.bfloat16 else (torch.float16,),
        store=store,
    )


def _check_library(config: QuantizeConfig, source: Source, console: Console) -> None:
    library = registry.LIBRARIES[config.backend]
    widths = {linear.name: linear.out_features for linear in source.linears(0)}
    registry.check_model(config.backend, source.config.model_type, widths)
    if library.float16 and source.dtype != torch.float16:
        name = str(source.dtype).removeprefix("torch.")
        console.warn(f"{library.title} works in float16: weights in {name} are converted, and may overflow")
