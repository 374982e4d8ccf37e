"""Opens the model and asks everything that can be asked of it before any long work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llm_quantize.backends import registry
from llm_quantize.calibration.tokenizer_packages import naming_packages
from llm_quantize.calibration.windows import check_window_length
from llm_quantize.config import QuantizeConfig
from llm_quantize.console import Console
from llm_quantize.device import Device
from llm_quantize.errors import InputError
from llm_quantize.io.atomic_directory import check_target
from llm_quantize.io.embedded_files import EMBEDDED_MODEL
from llm_quantize.io.hub import resolve_model
from llm_quantize.model.awq_mappings import find_mappings
from llm_quantize.model.linear_choice import FEW, choose_linears
from llm_quantize.model.pickled_weights import convert_pickles
from llm_quantize.model.skeleton import LinearLayer
from llm_quantize.model.source import SourceModel
from llm_quantize.model.weight_files import Scratch
from llm_quantize.solver.awq import AWQSolver
from llm_quantize.solver.base import Solver
from llm_quantize.solver.gptq import GPTQSolver
from llm_quantize.solver.quality import quality_preset
from llm_quantize.types import WHOLE_ROW, QuantScheme

# Group sizes that readers have kernels for: they are advised where the one that is asked for does not fit.
FITTING_GROUPS = (128, 64, 32, 16)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is known before the text is read. scratch: holds a converted copy of pickled weights."""

    model: SourceModel
    solver: Solver
    store_dtype: torch.dtype
    scratch: Scratch | None


def prepare(
    config: QuantizeConfig,
    device: Device,
    console: Console,
    on_config: Callable[[Any], None] = lambda _: None,
) -> Prepared:
    """Open the source and check it. Raises InputError, before any long work.

    on_config: is given the model's config, before the seconds that building the model takes.
    """
    directory, scratch = _model_directory(config, console)
    with naming_packages(directory):
        model = SourceModel.open(
            directory,
            weights=None if scratch is None else scratch.path,
            trust_remote_code=config.trust_remote_code,
            on_config=on_config,
            warn=console.warn,
        )
    if (line := model.side_files.left_out_line) is not None:
        console.warn(line)
    store_dtype = stored_dtype(model.dtype)
    solver = make_solver(config, store_dtype)
    _warn_of_weights(model, console)
    _choose_linears(config, model, solver.scheme, console)
    if config.native:
        if solver.uses_mappings:
            find_mappings(model.modules[0], model.config)  # refuses an unknown architecture now
    else:
        _check_library(config, model, console)
    _check_target(config, model)
    _check_window_length(config, model)
    return Prepared(model, solver, store_dtype, scratch)


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which float tensors of a model in `dtype` are saved: BF16 stays, since FP16 overflows; FP32 becomes FP16."""
    return torch.float16 if dtype == torch.float32 else dtype


def make_solver(
    config: QuantizeConfig, store_dtype: torch.dtype, *, most_sweeps: int | None = None
) -> Solver:
    """The solver that the method asks for, with all its settings.

    most_sweeps: of coordinate descent, where one is enough to see every kernel run.
    """
    half = (torch.float16,)
    scheme = QuantScheme(
        config.bits,
        config.group_size,
        config.symmetric,
        zero_min=config.checkpoint_format.zero_min,
        scale_dtypes=(torch.bfloat16, *half) if store_dtype == torch.bfloat16 else half,
    )
    preset = quality_preset(config.quality, config.bits)
    if most_sweeps is not None:
        preset = replace(preset, sweeps=min(preset.sweeps, most_sweeps))
    if config.method == "awq":
        return AWQSolver(scheme, preset)
    return GPTQSolver(
        scheme,
        preset,
        config.damping,
        act_order=config.desc_act,
        dynamic_groups=config.dynamic_groups,
    )


def _model_directory(config: QuantizeConfig, console: Console) -> tuple[Path, Scratch | None]:
    """The directory of the model, fetched where it has to be, and pickled weights converted."""
    if config.model_path is None:
        return EMBEDDED_MODEL, None
    directory = resolve_model(
        config.model_path,
        trust_remote_code=config.trust_remote_code,
        allow_pickle=config.allow_pickle,
        log=console.note,
    )
    if config.allow_pickle and not any(directory.glob("*.safetensors")):
        scratch = Scratch()
        convert_pickles(directory, scratch.path)
        return directory, scratch
    return directory, None


def _warn_of_weights(model: SourceModel, console: Console) -> None:
    """Say what of the files is read otherwise than it looks."""
    unexpected = model.weights.unexpected()
    if unexpected:
        shown = ", ".join(unexpected[:3]) + (", …" if len(unexpected) > 3 else "")
        console.warn(
            f"{len(unexpected)} tensors of the weights belong to nothing in {type(model.skeleton).__name__} and are "
            f"copied as they are: {shown}"
        )
    if model.untied_head is not None:
        console.warn(
            f"{model.untied_head} differs from the embedding to which config.json ties it: both are kept, and the "
            "result says tie_word_embeddings false, as transformers reads the model"
        )


def _choose_linears(
    config: QuantizeConfig, model: SourceModel, scheme: QuantScheme, console: Console
) -> None:
    """Settle which linears are quantized, and say which are not. Raises InputError."""
    form = config.checkpoint_format
    fitting = _fitting_group(model)

    def misfit(linear: LinearLayer) -> str | None:
        return form.misfit(scheme, linear.name, linear.out_features, linear.in_features, fitting=fitting)

    left = choose_linears(model, misfit)
    if left and not config.native:
        name = left[0].linear.name
        raise InputError(misfit(left[0].linear) or f"{name} is never called, and {config.backend} needs it")
    by_path: dict[tuple[str, str], list[str]] = {}
    for each in left:
        by_path.setdefault((each.linear.path, each.why), []).append(each.linear.name)
    for (path, why), names in by_path.items():
        console.warn(f"{path} stays as it is in {len(names)} of {len(model.blocks)} blocks: {why}")


def _fitting_group(model: SourceModel) -> int:
    """The largest power of two, of the usual ones, that divides the width of nearly all linears; else a whole row."""
    widths: Counter[int] = Counter()
    for linear in model.all_linears():
        widths[linear.in_features] += linear.weights
    total = widths.total()
    for size in FITTING_GROUPS:
        if sum(count for width, count in widths.items() if width % size) <= FEW * total:
            return size
    return WHOLE_ROW


def _check_library(config: QuantizeConfig, model: SourceModel, console: Console) -> None:
    library = registry.LIBRARIES[config.backend]
    outputs = {linear.name: linear.out_features for linear in model.linears(0)}
    registry.check_model(config.backend, model.config.model_type, outputs)
    if library.float16 and model.dtype != torch.float16:
        name = str(model.dtype).removeprefix("torch.")
        console.warn(f"{library.title} works in float16: weights in {name} are converted, and may overflow")


def _check_target(config: QuantizeConfig, model: SourceModel) -> None:
    """Refuse a target that cannot be published, or a disk without room for it."""
    weights = sum(linear.weights for linear in model.all_linears())
    others = model.file_bytes - weights * model.dtype.itemsize
    needed = int(weights * (config.bits + 0.5) / 8) + max(others, 0) + model.side_files.total_bytes
    check_target(config.target, config.may_replace, needed, model.directory)


def _check_window_length(config: QuantizeConfig, model: SourceModel) -> None:
    positions = getattr(model.text_config, "max_position_embeddings", None)
    check_window_length("--calib_seq_len", config.calibration.seq_len, model.tokenizer, positions)
