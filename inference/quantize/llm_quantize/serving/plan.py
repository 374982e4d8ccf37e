"""How vLLM is to serve a model: whether it can, and with which arguments `vllm serve` is called.

Applies the rules of the other modules to a model and the user's arguments. Knows nothing of how vLLM is installed or
started.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_quantize.serving import vllm_arguments as options
from llm_quantize.serving.architectures import check_architecture
from llm_quantize.serving.checkpoint_files import has_consolidated_weights
from llm_quantize.serving.float_modules import FloatModules, UnreadableRegex, class_of
from llm_quantize.serving.model_rules import check_model
from llm_quantize.serving.module_rules import check_float_modules
from llm_quantize.serving.quantized_checkpoint import (
    WEIGHT_SUFFIXES,
    Checkpoint,
    QuantizationSettings,
    quantized_linears,
    read_checkpoint,
)
from llm_quantize.serving.refusal import Refusal, one_line
from llm_quantize.serving.settings_rules import (
    METHOD_ALIASES,
    METHODS,
    LinearSettings,
    check_settings,
    has_one_group_per_row,
)
from llm_quantize.serving.shape_rules import (
    Split,
    check_cpu_widths,
    check_fused_linears,
    check_group_counts,
    check_group_indices,
    split_over_ranks,
)
from llm_quantize.serving.time_limit import TooSlow, limited_seconds
from llm_quantize.serving.vllm_arguments import VllmArguments, ignored_config_files, parse_arguments

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
MAX_REGEX_SECONDS = 20
LOOPBACK = "127.0.0.1"
HALF_PRECISION = ("auto", "half", "float16", "bfloat16")
# Values with which vLLM reads the files that are examined here.
OWN_CONFIG = ("auto", "hf")
OWN_WEIGHTS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor")
RANKS = re.compile(r"\s*\+?0*([1-9]\d{0,5})\s*")


@dataclass(frozen=True)
class ServingPlan:
    """The model and the arguments for `vllm serve`, whether the model is a local directory, and notes for the user."""

    model: str
    arguments: list[str]
    is_local: bool
    notes: list[str]


def plan_serving(device: str, model: str, words: Sequence[str]) -> ServingPlan:
    """Return how to serve `model`, a directory or a hub id, with the user's further arguments `words`.

    `device` is `cuda`, `cpu` or `other`, an accelerator whose own rules are left to vLLM. A hub id is not examined.
    Raises `Refusal` where vLLM would refuse the model or answer wrongly.
    """
    arguments = parse_arguments(words)
    notes = [f"vLLM ignores {word}: write --config FILE" for word in ignored_config_files(arguments)]
    if arguments.config_file is None:
        notes.append("the file of --config is not understood here: its settings are left to vLLM to judge")
    if arguments.given(options.API_KEY):
        raise Refusal(
            "a key on the command line shows in every process list: drop --api-key and set the environment "
            "variable VLLM_API_KEY"
        )
    if arguments.given(options.MODEL):
        raise Refusal("--model would serve another model than the one that is checked: give the model first")
    path = Path(model)
    is_local = path.is_dir()
    if is_local:
        if not (path / "config.json").is_file():
            raise Refusal(f"{model} has no config.json: give the directory of a model")
        elsewhere = reads_elsewhere(arguments)
        if elsewhere is None:
            check_checkpoint(read_checkpoint(path), arguments, device, notes)
        else:
            notes.append(
                f"{elsewhere} makes vLLM read other files than config.json and the weights beside it: passing the "
                "model on unexamined"
            )
    elif path.exists():
        raise Refusal(f"{model} is not a directory: give the directory that holds config.json")
    elif "://" in model or (HUB_ID.fullmatch(model) and ".." not in model and "--" not in model):
        notes.append(f"there is no directory {model} here: passing it on as a model to download, unexamined")
    else:
        raise Refusal(f"there is no directory {model}, and it is no hub id: check the path")
    if not any(arguments.last_word(name) for name in (options.HOST, options.UDS)):
        arguments.append(options.HOST, LOOPBACK)
    if device == "cpu" and not arguments.has(*options.COMPILATION):
        arguments.append("--enforce-eager")
    # vLLM would take a name with a dash in front for an option.
    return ServingPlan(f"./{model}" if model.startswith("-") else model, arguments.words, is_local, notes)


def reads_elsewhere(arguments: VllmArguments) -> str | None:
    """Return the option with which vLLM reads other files than those examined here, None without any."""
    for name, own in ((options.CONFIG_FORMAT, OWN_CONFIG), (options.LOAD_FORMAT, OWN_WEIGHTS)):
        value = arguments.last_value(name)
        if value is not None and value.lower() not in own:
            return name
    return options.HF_CONFIG_PATH if arguments.has(options.HF_CONFIG_PATH) else None


def check_checkpoint(checkpoint: Checkpoint, arguments: VllmArguments, device: str, notes: list[str]) -> None:
    """Refuse a checkpoint that vLLM would refuse, or serve wrongly, with these `arguments` on `device`.

    Sets `--quantization` in `arguments` to the checkpoint's method and appends to `notes` what the user should know.
    Raises `Refusal`.
    """
    # Overrides change config.json as vLLM reads it, and another implementation may know another architecture.
    if not arguments.has(options.MODEL_IMPLEMENTATION, options.HF_OVERRIDES):
        check_architecture(checkpoint.config)
    if checkpoint.quantization is None:
        requested = arguments.last_value(options.QUANTIZATION)
        if requested in METHODS:
            raise Refusal(
                f"{checkpoint.directory} is not quantized, so --quantization {requested} cannot serve it: quantize "
                "it first, or leave the option out to serve it as it is"
            )
        notes.append("the checkpoint is not quantized: serving it as it is")
        return
    settings, file_name = checkpoint.quantization.values, checkpoint.quantization.file_name
    method = str(settings.get("quant_method") or "").lower()
    if not method:
        raise Refusal(
            f"the quantization settings in {file_name} name no quant_method, which vLLM needs: add it"
        )
    if method not in METHODS:
        notes.append(f"the checkpoint is quantized as {one_line(method)}, which is left to vLLM to judge")
        return
    set_method(method, file_name, arguments, device, notes)
    dtype = arguments.last_value(options.DTYPE)
    if dtype is not None and dtype.lower() not in HALF_PRECISION:
        raise Refusal(
            f"--dtype {dtype}: vLLM runs quantized weights in float16 or bfloat16, never float32: change or drop it"
        )
    try:
        check_settings(settings, method, device, notes)
        if checkpoint.tensors:
            check_tensors(checkpoint, checkpoint.quantization, method, arguments, device, notes)
        else:
            notes.append("the weights are not in safetensors files: their shapes are left to vLLM to judge")
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, OSError) as error:
        raise Refusal(f"the quantization settings in {file_name} make no sense ({error})") from error


def set_method(method: str, file_name: str, arguments: VllmArguments, device: str, notes: list[str]) -> None:
    """Set `--quantization` in `arguments` to the checkpoint's `method`, since vLLM refuses another name.

    `file_name` is the file that names the method. Appends to `notes` what was changed. Raises `Refusal` where the
    user requests a method other than those of `METHODS`. Source: `ModelConfig._verify_quantization` in vLLM's
    `config/model.py`.
    """
    arguments.spell_out(options.QUANTIZATION)
    requested = arguments.last_value(options.QUANTIZATION)
    if requested is None:
        if file_name != "config.json":
            arguments.set_value(options.QUANTIZATION, method)
            notes.append(
                f"config.json names no quantization, {file_name} does: --quantization {method} added"
            )
        return
    if requested == method or (device != "cpu" and requested in METHOD_ALIASES[method]):
        return
    if requested not in METHODS and requested not in METHOD_ALIASES[method]:
        raise Refusal(f"the checkpoint is quantized as {method}, not {requested}: leave --quantization out")
    arguments.set_value(options.QUANTIZATION, method)
    notes.append(
        f"the checkpoint's method is {method}: passing --quantization {method} in place of {requested}"
    )


def check_tensors(
    checkpoint: Checkpoint,
    quantization: QuantizationSettings,
    method: str,
    arguments: VllmArguments,
    device: str,
    notes: list[str],
) -> None:
    """Refuse a checkpoint whose tensors vLLM refuses, would misread, or would not find.

    `method` is the one that the settings in `quantization` name. Appends to `notes` what is left to vLLM. Raises
    `Refusal`; for settings of the wrong type what Python raises.
    """
    settings = quantization.values
    if arguments.last_value(options.LOAD_FORMAT) in (None, "auto"):
        check_consolidated_weights(checkpoint)
    try:
        rules = FloatModules(settings)
        if rules.finds_by_dtype:
            rules = FloatModules(settings, checkpoint.dtypes())
    except UnreadableRegex as error:
        notes.append(f"{error}: which linears are quantized is left to vLLM to judge")
        return
    if rules.has_regexes:
        check_regexes(rules, checkpoint)
    stored = LinearSettings(settings, method, rules)
    linears = list(quantized_linears(method, stored.bits, checkpoint.tensors))
    if method == "gptq":
        check_group_indices(settings, linears)
    check_group_counts(stored.group_size, linears)
    check_fused_linears(linears, checkpoint.tensors)
    check_float_modules(checkpoint, rules, notes)
    if not arguments.has(options.HF_OVERRIDES):
        check_model(checkpoint.config, linears, checkpoint.tensors)
    ranks = tensor_parallel_size(arguments)
    if ranks > 1:
        linears = split_over_ranks(
            Split(
                linears,
                checkpoint.config,
                replicate_scales=method != "awq" and has_one_group_per_row(settings, method),
                whole_experts=arguments.has(options.EXPERT_PARALLEL),
            ),
            ranks,
        )
    if device == "cpu":
        check_cpu_widths(linears)


def check_regexes(rules: FloatModules, checkpoint: Checkpoint) -> None:
    """Refuse settings whose regexes take minutes and more to match the names of the checkpoint."""
    try:
        with limited_seconds(MAX_REGEX_SECONDS):
            for name in {tensor.rpartition(".")[0] for tensor in checkpoint.tensors}:
                rules.is_float(name, class_of(name))
    except TooSlow as error:
        raise Refusal(
            f"the regexes in the quantization settings take longer than {MAX_REGEX_SECONDS} s to match: correct them"
        ) from error


def check_consolidated_weights(checkpoint: Checkpoint) -> None:
    """Refuse quantized weights beside a `consolidated*.safetensors`, which vLLM would load in their place."""
    suffixes = tuple(set(WEIGHT_SUFFIXES.values()))
    files = {tensor.file.name for name, tensor in checkpoint.tensors.items() if name.endswith(suffixes)}
    is_elsewhere = any(not name.startswith("consolidated") for name in files)
    if is_elsewhere and has_consolidated_weights(checkpoint.directory):
        raise Refusal(
            f"{checkpoint.directory} holds a consolidated*.safetensors, which vLLM would load in place of the "
            "quantized weights: move it away, or add --load-format safetensors"
        )


def tensor_parallel_size(arguments: VllmArguments) -> int:
    """Return the number of tensor-parallel ranks; 1 where `arguments` name none, or what vLLM takes for none."""
    match = RANKS.fullmatch(arguments.last_value(options.TENSOR_PARALLEL_SIZE) or "")
    return int(match[1]) if match else 1
