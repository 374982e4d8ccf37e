"""How vLLM is to serve a model: whether it can, and with which arguments `vllm serve` is called.

Applies the rules of the other modules to a model and the user's arguments. Knows nothing of how vLLM is installed or
started.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_quantize.serving.quantized_checkpoint import Checkpoint, quantized_linears, read_checkpoint
from llm_quantize.serving.refusal import Refusal
from llm_quantize.serving.settings_rules import (
    METHOD_ALIASES,
    METHODS,
    check_settings,
    has_one_group_per_row,
)
from llm_quantize.serving.shape_rules import (
    check_cpu_widths,
    check_fused_linears,
    check_group_counts,
    check_group_indices,
    split_over_ranks,
)
from llm_quantize.serving.vllm_arguments import VllmArguments, parse_arguments

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
QUANTIZATION_OPTION = ("--quantization", "-q")
# Options with which a user chooses how vLLM compiles the model.
COMPILATION_OPTIONS = (
    "--enforce-eager",
    "--no-enforce-eager",
    "-O",
    "--optimization-level",
    "--compilation-config",
    "-cc",
)


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
    notes: list[str] = []
    # vLLM's parser also takes the beginning of an option's name for the option.
    if any(arguments.option_name(word).startswith("--api-k") for word in arguments.words):
        raise Refusal(
            "a key on the command line shows in every process list: drop --api-key and set the environment "
            "variable VLLM_API_KEY"
        )
    path = Path(model)
    is_local = path.is_dir()
    if is_local:
        if not (path / "config.json").is_file():
            raise Refusal(f"{model} has no config.json: give the directory of a model")
        check_checkpoint(read_checkpoint(path), arguments, device, notes)
    elif path.exists():
        raise Refusal(f"{model} is not a directory: give the directory that holds config.json")
    elif "://" in model or (HUB_ID.fullmatch(model) and ".." not in model and "--" not in model):
        notes.append(f"there is no directory {model} here: passing it on as a model to download, unexamined")
    else:
        raise Refusal(f"there is no directory {model}, and it is no hub id: check the path")
    if not arguments.has("--host", "--uds"):
        arguments.words += ["--host", "127.0.0.1"]
    if device == "cpu" and not arguments.has_prefix(*COMPILATION_OPTIONS):
        arguments.words.append("--enforce-eager")
    # vLLM would take a name with a dash in front for an option.
    return ServingPlan(f"./{model}" if model.startswith("-") else model, arguments.words, is_local, notes)


def check_checkpoint(checkpoint: Checkpoint, arguments: VllmArguments, device: str, notes: list[str]) -> None:
    """Refuse a checkpoint that vLLM would refuse, or serve wrongly, with these `arguments` on `device`.

    Sets `--quantization` in `arguments` to the checkpoint's method and appends to `notes` what the user should know.
    Raises `Refusal`.
    """
    if checkpoint.quantization is None:
        requested = arguments.last_value(*QUANTIZATION_OPTION)
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
        notes.append(f"the checkpoint is quantized as {method}, which is left to vLLM to judge")
        return
    set_method(method, file_name, arguments, device, notes)
    if (arguments.last_value("--dtype") or "").lower() in ("float32", "float"):
        raise Refusal(
            "vLLM runs quantized weights in float16 or bfloat16, never float32: change or drop --dtype"
        )
    try:
        bits = check_settings(settings, method, device, notes)
        if bits is not None and checkpoint.tensors:
            check_linears(checkpoint, settings, method, bits, arguments, device)
        elif bits is not None:
            notes.append("the weights are not in safetensors files: their shapes are left to vLLM to judge")
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, OSError) as error:
        raise Refusal(f"the quantization settings in {file_name} make no sense ({error})") from error


def set_method(method: str, file_name: str, arguments: VllmArguments, device: str, notes: list[str]) -> None:
    """Set `--quantization` in `arguments` to the checkpoint's `method`, since vLLM refuses another name.

    `file_name` is the file that names the method. Appends to `notes` what was changed. Raises `Refusal` where the
    user requests a method other than those of `METHODS`. Source: `ModelConfig._verify_quantization` in vLLM's
    `config/model.py`.
    """
    requested = arguments.last_value(*QUANTIZATION_OPTION)
    if requested is None:
        if file_name != "config.json":
            arguments.set_value(QUANTIZATION_OPTION, method)
            notes.append(
                f"config.json names no quantization, {file_name} does: --quantization {method} added"
            )
        return
    if requested == method or (device != "cpu" and requested in METHOD_ALIASES[method]):
        return
    if requested not in METHODS and requested not in METHOD_ALIASES[method]:
        raise Refusal(f"the checkpoint is quantized as {method}, not {requested}: leave --quantization out")
    arguments.set_value(QUANTIZATION_OPTION, method)
    notes.append(
        f"the checkpoint's method is {method}: passing --quantization {method} in place of {requested}"
    )


def check_linears(
    checkpoint: Checkpoint,
    settings: dict[str, Any],
    method: str,
    bits: int,
    arguments: VllmArguments,
    device: str,
) -> None:
    """Refuse a checkpoint whose linears have shapes or group indices that vLLM refuses, or would misread.

    `settings` are its quantization settings; `method` and `bits` are what they name. Raises `Refusal`; for settings
    of the wrong type what Python raises.
    """
    linears = list(quantized_linears(method, bits, checkpoint.tensors))
    if method == "gptq":
        check_group_indices(settings, linears)
    # A dynamic rule may give some linears another group size; compressed-tensors names one in each config group.
    if method != "compressed-tensors" and not settings.get("dynamic"):
        check_group_counts(int(settings.get("q_group_size") or settings["group_size"]), linears)
    check_fused_linears(linears, checkpoint.tensors)
    ranks = tensor_parallel_size(arguments)
    if ranks > 1:
        replicate_scales = method != "awq" and has_one_group_per_row(settings)
        linears = split_over_ranks(linears, ranks, checkpoint.config, replicate_scales)
    if device == "cpu":
        check_cpu_widths(linears)


def tensor_parallel_size(arguments: VllmArguments) -> int:
    """Return the number of tensor-parallel ranks; 1 where `arguments` name none, or no number."""
    value = arguments.last_value("--tensor-parallel-size", "-tp")
    return int(value) if value is not None and value.isdigit() else 1
