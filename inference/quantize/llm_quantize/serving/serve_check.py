"""Reads a checkpoint before vLLM does: is it one that vLLM serves, and with which arguments?

`run_vllm.sh` calls it with the device and the user's arguments. It needs the standard library alone and any
Python from 3.8, since it runs before any environment exists. It opens `config.json`, the headers of the
safetensors files and the group indices of GPTQ layers, never the weights.

Its rules are those of vLLM 0.30 to 0.33, read from its sources (`model_executor/layers/quantization/` with
`auto_awq.py`, `auto_gptq.py`, `compressed_tensors/`, `utils/marlin_utils.py`; `model_executor/kernels/linear/
mixed_precision/`; `config/model.py`) and tried on the CPU build. It knows nothing of how vLLM is installed.
"""

from __future__ import annotations

import json
import os
import re
import struct
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# ------------------------------------------------------------------------------------------- what vLLM accepts

METHODS = ("awq", "gptq", "compressed-tensors")
# Other names under which vLLM on a GPU takes a checkpoint of the method. Its CPU build knows the first alone.
ALIASES = {
    "awq": ("awq_marlin", "auto_awq", "marlin", "humming", "moe_wna16"),
    "gptq": ("gptq_marlin", "auto_gptq", "marlin", "humming", "moe_wna16"),
    "compressed-tensors": (),
}
MARLIN_GROUPS = (-1, 32, 64, 128)
GPTQ_BITS = (4, 8)
PACKED_BITS = tuple(range(2, 9))
CPU_BITS = 4
CPU_TILE = 32
AWQ_KERNEL_GROUP = 32

# Layers that tensor parallelism cuts along the input; the others are cut along the output.
ROW_PARALLEL = re.compile(r"\.(o_proj|down_proj|out_proj|c_proj|dense|dense_4h_to_h|wo|w2|fc2|fc_out)$")
COLUMN_PARALLEL = re.compile(
    r"\.([qkv]_proj|qkv_proj|query_key_value|c_attn|Wqkv|gate_proj|up_proj|gate_up_proj|dense_h_to_4h|fc1|fc_in"
    r"|c_fc|w1|w3)$"
)
KEY_VALUE = re.compile(r"\.[kv]_proj$")
# Layers that vLLM joins into one, which then has one scheme.
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

SIDE_FILES = (("quantize_config.json", "gptq"), ("quant_config.json", "awq"))
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


# Bytes of an element; other types are left to vLLM to judge.
BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
BYTES.update({"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8})
LARGEST_HEADER = 100 << 20  # the format's own limit
LARGEST_JSON = 64 << 20


class Refusal(Exception):
    """vLLM would not serve this, or would answer wrongly: one line, what is wrong and what to do."""

    def __str__(self) -> str:
        return printable(super().__str__())


# --------------------------------------------------------------------------------------------- the command line


@dataclass
class Arguments:
    """The user's `vllm serve` arguments after the model, which pass through as they are but for a method's name.

    `defaults` are the top-level settings of a `--config` file, over which the arguments win.
    """

    words: list[str]
    defaults: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def name(word: str) -> str:
        """The option that `word` names, dashes for underscores as vLLM has it; empty for a value."""
        if not word.startswith("-"):
            return ""
        return word.split("=", 1)[0].replace("_", "-")

    def value(self, *names: str) -> str | None:
        """The last value given to any of `names`, as `--name value` or `--name=value`."""
        found = None
        for i, word in enumerate(self.words):
            if self.name(word) in names:
                if "=" in word:
                    found = word.split("=", 1)[1]
                elif i + 1 < len(self.words):
                    found = self.words[i + 1]
        if found is None:
            found = next((self.defaults[n[2:]] for n in names if n[2:] in self.defaults), None)
        return found

    def has(self, *names: str) -> bool:
        return any(self.name(word) in names for word in self.words) or any(
            n[2:] in self.defaults for n in names
        )

    def has_prefix(self, *prefixes: str) -> bool:
        return any(self.name(word).startswith(prefixes) for word in self.words) or any(
            f"--{key}".startswith(prefixes) for key in self.defaults
        )

    def replace(self, names: tuple[str, ...], value: str) -> None:
        """Gives `value` wherever one of `names` is set; adds the first where none is."""
        done = False
        for i, word in enumerate(self.words):
            if self.name(word) in names:
                if "=" in word:
                    self.words[i] = word.split("=", 1)[0] + "=" + value
                elif i + 1 < len(self.words):
                    self.words[i + 1] = value
                done = True
        if not done:
            self.words += [names[0], value]


def config_file_settings(path: str) -> dict[str, str]:
    """The plain top-level `key: value` lines of a YAML file: all that matters here, without a YAML parser."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}  # vLLM says what is wrong with it
    settings = {}
    for line in text.splitlines():
        match = re.match(r"([A-Za-z][\w-]*)\s*:\s*(.*?)\s*(?:\s#.*)?$", line)
        if match:
            settings[match[1].replace("_", "-")] = match[2].strip("'\"")
    return settings


def parse_arguments(words: Sequence[str]) -> Arguments:
    arguments = Arguments(list(words))
    config = arguments.value("--config")
    if config is not None:
        arguments.defaults = config_file_settings(config)
    return arguments


# ------------------------------------------------------------------------------------------------ the checkpoint


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: `start` and `end` are byte offsets in `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Layer:
    """A quantized linear layer: `width` inputs, `out` outputs, `groups` groups along the input."""

    name: str
    out: int
    width: int
    groups: int
    g_idx: Tensor | None = None


def stays_inside(path: Path) -> bool:
    """Whether a checkpoint's file is a regular file of its own directory, or of its repository in a hub cache."""
    home, real = path.parent.resolve(), path.resolve()
    roots = [home]
    if home.parent.name == "snapshots":
        roots.append(home.parent.parent / "blobs")
    return real.is_file() and any(root in real.parents for root in roots)


def read_json(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file() or path.stat().st_size > LARGEST_JSON:
            raise ValueError("it is no file, or far too large")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Refusal(f"{path} cannot be read ({error}): copy or download the checkpoint again") from error
    if not isinstance(value, dict):
        raise Refusal(f"{path} does not hold a JSON object: copy or download the checkpoint again")
    return value


def find_quantization(directory: Path, config: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """The quantization settings and the file that holds them, looked for where vLLM looks."""
    text = config.get("text_config")
    for place in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if isinstance(place.get(key), dict):
                return place[key], "config.json"
    for name, method in SIDE_FILES:
        if (directory / name).is_file():
            return {"quant_method": method, **read_json(directory / name)}, name
    return None, ""


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file: an 8-byte length, a JSON header, then the bytes it points into.

    They must fill those bytes one after another, each as large as its shape says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > min(size - 8, LARGEST_HEADER):
                raise ValueError("it is cut short")
            header = json.loads(file.read(length))
        tensors = {}
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                shape = tuple(entry["shape"])
                if not all(type(n) is int and n >= 0 for n in (start, end, *shape)):
                    raise ValueError("it has sizes that are none")
                count = 1
                for n in shape:
                    count *= n
                if entry["dtype"] in BYTES and count * BYTES[entry["dtype"]] != end - start:
                    raise ValueError("its sizes contradict each other")
                tensors[name] = Tensor(path, entry["dtype"], shape, 8 + length + start, 8 + length + end)
        at = 8 + length
        for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.end)):
            if tensor.start != at or tensor.end < at:
                raise ValueError("its tensors overlap or leave holes")
            at = tensor.end
        if at != size:
            raise ValueError("it is cut short" if at > size else "its tensors end before it does")
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        struct.error,
    ) as error:
        raise Refusal(
            f"{path} is not a whole safetensors file ({error}): copy or download the checkpoint again"
        ) from error
    return tensors


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint's safetensors files; empty where the weights are in another format."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        named = list(weight_map.values()) if isinstance(weight_map, dict) else []
        for shard in named:
            if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise Refusal(f"{index} names a shard that is no file beside it: {shard!r}")
        shards = sorted(set(named))
        for shard in shards:
            if "\0" in shard or not (directory / shard).is_file():
                raise Refusal(f"{directory / shard} is missing: copy or download the checkpoint again")
    else:
        shards = sorted(path.name for path in directory.glob("*.safetensors"))
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        if not stays_inside(directory / shard):
            raise Refusal(f"{shard} in {directory} is a link that leads out of it: put a copy in its place")
        tensors.update(read_header(directory / shard))
    if not tensors and not any(next(directory.glob(f"*.{kind}"), None) for kind in ("bin", "pt", "gguf")):
        raise Refusal(f"{directory} holds no weights (*.safetensors): give a model's directory")
    return tensors


def read_integers(tensor: Tensor) -> array[int]:
    """The values of an int32 or int64 tensor, read from its bytes alone."""
    if tensor.dtype not in ("I32", "I64"):
        raise ValueError(f"indices of type {tensor.dtype}")
    values = array({"I32": "i", "I64": "q"}[tensor.dtype])
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        values.frombytes(file.read(tensor.end - tensor.start))
    if sys.byteorder == "big":
        values.byteswap()
    return values


def quantized_layers(method: str, bits: int, tensors: dict[str, Tensor]) -> Iterator[Layer]:
    """The quantized linears of a checkpoint; experts are left out, since vLLM joins them by rules of their own."""
    mark = ".weight_packed" if method == "compressed-tensors" else ".qweight"
    for key, tensor in tensors.items():
        if not key.endswith(mark) or ".experts." in key or len(tensor.shape) != 2:
            continue
        name = key[: -len(mark)]
        rows, columns = tensor.shape
        scales = tensors.get(name + (".weight_scale" if method == "compressed-tensors" else ".scales"))
        if scales is None or not scales.shape or 0 in scales.shape:
            raise Refusal(f"{name} has no scales: the checkpoint is damaged")
        if method == "awq":
            yield Layer(name, columns * 32 // bits, rows, scales.shape[0])
        elif method == "gptq":
            yield Layer(name, columns, rows * 32 // bits, scales.shape[0], tensors.get(f"{name}.g_idx"))
        else:
            shape = tensors.get(f"{name}.weight_shape")
            width = read_integers(shape)[1] if shape is not None else columns * 32 // bits
            yield Layer(name, rows, width, scales.shape[1] if len(scales.shape) > 1 else 1)


# ----------------------------------------------------------------------------------------------------- the rules

REQUANTIZE_GPTQ = (
    "quantize it again with gptq_quantize.py --format auto, which picks a layout that vLLM serves"
)
REQUANTIZE_AWQ = "quantize it again with awq_quantize.py --format auto, which picks a layout that vLLM serves"


def setting(quantization: dict[str, Any], method: str, *keys: str) -> Any:
    """A setting without which vLLM does not start."""
    for key in keys:
        if quantization.get(key) is not None:
            return quantization[key]
    raise Refusal(f"the {method} settings name no '{keys[-1]}', which vLLM needs: add it to config.json")


def check_bits_on_cpu(bits: int, device: str) -> None:
    if device == "cpu" and bits != CPU_BITS:
        raise Refusal(
            f"vLLM on a CPU serves 4-bit weights alone and these have {bits}: serve them on an NVIDIA GPU"
        )


def check_awq(quantization: dict[str, Any], device: str, notes: list[str]) -> int:
    """Refuses what vLLM's AutoAWQConfig and its kernels refuse; the number of bits."""
    bits = int(setting(quantization, "awq", "w_bit", "bits"))
    group = int(setting(quantization, "awq", "q_group_size", "group_size"))
    setting(quantization, "awq", "zero_point")
    version = str(quantization.get("version") or quantization.get("checkpoint_format") or "gemm").lower()
    if bits != 4:
        raise Refusal(f"vLLM reads awq files of 4 bits alone and this one has {bits}: {REQUANTIZE_AWQ}")
    if version != "gemm":
        raise Refusal(
            f"this awq file is laid out as '{version}' and vLLM reads 'gemm' alone: {REQUANTIZE_AWQ}"
        )
    if device == "cuda" and group not in MARLIN_GROUPS:
        if group % AWQ_KERNEL_GROUP:
            raise Refusal(f"vLLM's awq kernels take groups of 32, 64 or 128, not {group}: {REQUANTIZE_AWQ}")
        notes.append(f"groups of {group} run on vLLM's slow awq kernels, in float16: add --dtype float16")
    return bits


def check_gptq(quantization: dict[str, Any], device: str, notes: list[str]) -> int:
    """Refuses what vLLM's AutoGPTQConfig refuses, for the model and for each `dynamic` rule; the bits."""
    layout = str(quantization.get("checkpoint_format") or quantization.get("format") or "gptq").lower()
    for key in ("bits", "group_size", "desc_act", "sym"):
        setting(quantization, "gptq", key)
    dynamic = quantization.get("dynamic")
    cases = [quantization]
    for pattern, rule in (dynamic if isinstance(dynamic, dict) else {}).items():
        if isinstance(rule, dict) and not pattern.startswith("-:"):
            cases.append({**quantization, **rule})
    for case in cases:
        bits, symmetric, group = int(case["bits"]), bool(case["sym"]), int(case["group_size"])
        if bits not in GPTQ_BITS:
            raise Refusal(f"vLLM reads gptq files of 4 and 8 bits and this one has {bits}: {REQUANTIZE_GPTQ}")
        if not symmetric:
            raise Refusal(
                f"vLLM reads symmetric gptq files alone and this one has sym false: {REQUANTIZE_GPTQ}"
            )
        if group not in MARLIN_GROUPS:
            raise Refusal(f"vLLM takes gptq groups of 32, 64, 128 or -1, not {group}: {REQUANTIZE_GPTQ}")
        check_bits_on_cpu(bits, device)
    if layout == "gptq_v2":
        # The two differ in the zero points, which vLLM does not look at in a symmetric file.
        notes.append("the file is gptq_v2; vLLM takes it as gptq, which gives the same for symmetric weights")
    elif layout != "gptq":
        raise Refusal(f"vLLM does not read gptq files laid out as '{layout}': {REQUANTIZE_GPTQ}")
    return int(quantization["bits"])


def check_packed(quantization: dict[str, Any], device: str) -> int | None:
    """Refuses pack-quantized weights that vLLM refuses; the bits, or None where the weights are another kind."""
    found = None
    groups = quantization.get("config_groups")
    for group in (groups if isinstance(groups, dict) else {}).values():
        weights = group.get("weights") if isinstance(group, dict) else None
        layout = (group.get("format") if isinstance(group, dict) else None) or quantization.get("format")
        if not isinstance(weights, dict) or layout != "pack-quantized" or group.get("input_activations"):
            continue
        bits = int(setting(weights, "compressed-tensors", "num_bits"))
        if bits not in PACKED_BITS:
            raise Refusal(
                f"vLLM reads packed weights of 2 to 8 bits and these have {bits}: quantize it again"
            )
        if str(weights.get("actorder")).lower() in ("group", "dynamic", "true"):
            raise Refusal(
                "groups follow the activation order (actorder 'group'), which vLLM no longer serves: quantize it "
                "again with static groups"
            )
        check_bits_on_cpu(bits, device)
        found = bits
    return found


def in_order(layer: Layer) -> bool:
    """Whether the layer's group indices are those that every reader assumes: channel // group size."""
    if layer.g_idx is None or layer.groups == 0:
        return True
    group = -(-layer.width // layer.groups)
    values = read_integers(layer.g_idx)
    return values == array(values.typecode, (i // group for i in range(layer.width)))


def check_group_indices(quantization: dict[str, Any], layers: Sequence[Layer]) -> None:
    """vLLM refuses activation-ordered groups where the config admits them, and answers wrongly where it hides them.

    Every layer's indices are read: a few kilobytes each.
    """
    ordered = bool(quantization["desc_act"]) and int(quantization["group_size"]) != -1
    astray = next((layer.name for layer in layers if not in_order(layer)), None)
    again = "quantize it again with gptq_quantize.py --act_order_groups static"
    if ordered and astray is None and any(layer.g_idx is not None for layer in layers):
        raise Refusal(
            "vLLM no longer serves desc_act true with groups; this file's groups are in order all the same: set "
            "desc_act to false in config.json and quantize_config.json"
        )
    if ordered:
        raise Refusal(
            f"vLLM no longer serves groups in activation order (desc_act true with groups): {again}"
        )
    if astray is not None:
        raise Refusal(
            f"{astray} has groups in activation order (g_idx) while the config says desc_act false: vLLM would "
            f"ignore g_idx and answer wrongly; {again}"
        )


def check_group_size(group: int, layers: Iterable[Layer]) -> None:
    """The tensors must hold the groups that the config names, or vLLM fails half way through loading them."""
    for layer in layers:
        expected = 1 if group == -1 else -(-layer.width // group)
        if layer.groups != expected:
            raise Refusal(
                f"{layer.name} has {layer.groups} groups where group_size {group} makes {expected} of its width "
                f"{layer.width}: config.json does not belong to these weights"
            )


def whole_rows(quantization: dict[str, Any]) -> bool:
    """Whether the config says that every row is one group, as against a group as wide as the row."""
    groups = quantization.get("config_groups")
    if isinstance(groups, dict):
        return all(group["weights"].get("strategy") == "channel" for group in groups.values())
    return int(quantization["group_size"]) == -1


def check_joined(layers: Sequence[Layer], tensors: dict[str, Tensor]) -> None:
    """q, k, v and gate, up become one layer each in vLLM: all of them are quantized, or none."""
    quantized = {layer.name for layer in layers}
    for name in quantized:
        prefix, _, leaf = name.rpartition(".")
        for members in JOINED:
            if leaf in members:
                plain = [m for m in members if f"{prefix}.{m}.weight" in tensors]
                if plain:
                    raise Refusal(
                        f"{name} is quantized and {prefix}.{plain[0]} is not, which vLLM joins into one layer: "
                        "quantize the model again"
                    )


def check_cpu_widths(layers: Sequence[Layer]) -> None:
    """vLLM's 4-bit CPU kernel takes multiples of 32 in both directions, of joined layers together."""
    outputs: dict[str, int] = {}
    for layer in layers:
        prefix, _, leaf = layer.name.rpartition(".")
        joined = next(("+".join(members) for members in JOINED if leaf in members), leaf)
        outputs[f"{prefix}.{joined}"] = outputs.get(f"{prefix}.{joined}", 0) + layer.out
        if layer.width % CPU_TILE:
            raise Refusal(
                f"{layer.name} has {layer.width} inputs and vLLM on a CPU takes multiples of {CPU_TILE}: serve it "
                "on an NVIDIA GPU"
            )
    for name, out in outputs.items():
        if out % CPU_TILE:
            raise Refusal(
                f"{name} has {out} outputs and vLLM on a CPU takes multiples of {CPU_TILE}: serve it on an NVIDIA "
                "GPU"
            )


def split(layers: Sequence[Layer], parts: int, config: dict[str, Any], repeat_scales: bool) -> list[Layer]:
    """The part of each layer that one of `parts` tensor-parallel ranks holds; refused where it does not divide.

    `repeat_scales`: a row is one group (group size -1), whose scales every rank keeps.
    """
    remedy = "choose another --tensor-parallel-size"
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    heads, shared = text.get("num_attention_heads"), text.get("num_key_value_heads")
    if isinstance(heads, int) and heads % parts:
        raise Refusal(f"{heads} attention heads do not divide into {parts} parts: {remedy}")
    if isinstance(shared, int) and shared and shared % parts and parts % shared:
        raise Refusal(f"{shared} key-value heads and {parts} parts do not divide: {remedy}")
    shards = []
    for layer in layers:
        out, width = layer.out, layer.width
        if ROW_PARALLEL.search(layer.name):
            group = 1 if repeat_scales else -(-width // layer.groups)
            if width % parts or width // parts % group:
                raise Refusal(
                    f"{layer.name} has {width} inputs in groups of {-(-width // layer.groups)}, which do not "
                    f"divide into {parts} parts of whole groups: {remedy}"
                )
            width //= parts
        elif COLUMN_PARALLEL.search(layer.name):
            ranks = parts
            if KEY_VALUE.search(layer.name) and isinstance(shared, int) and 0 < shared < parts:
                ranks = shared  # fewer key-value heads than ranks are repeated
            if out % ranks or out // ranks % 8:
                raise Refusal(
                    f"{layer.name} has {out} outputs, which do not divide into {ranks} parts of multiples of 8: "
                    f"{remedy}"
                )
            out //= ranks
        shards.append(Layer(layer.name, out, width, layer.groups))
    return shards


# ------------------------------------------------------------------------------------------------------ the plan


@dataclass
class Plan:
    """How to serve: the model as vLLM is to see it, its arguments, and what the user should know."""

    model: str
    words: list[str]
    local: bool
    notes: list[str]


def choose_method(method: str, source: str, arguments: Arguments, device: str, notes: list[str]) -> None:
    """Makes `--quantization` agree with the file, since vLLM refuses another name."""
    names = ("--quantization", "-q")
    asked = arguments.value(*names)
    if asked is None:
        if source != "config.json":
            arguments.replace(names, method)
            notes.append(f"config.json names no quantization, {source} does: --quantization {method} added")
        return
    if asked == method or (device != "cpu" and asked in ALIASES[method]):
        return
    if asked not in METHODS and asked not in ALIASES[method]:
        raise Refusal(f"the checkpoint is quantized as {method}, not {asked}: leave --quantization out")
    arguments.replace(names, method)
    notes.append(f"the checkpoint's method is {method}: passing --quantization {method} in place of {asked}")


def check_checkpoint(
    directory: Path, config: dict[str, Any], arguments: Arguments, device: str, notes: list[str]
) -> None:
    """Refuses a quantized or broken checkpoint that vLLM would refuse, and sets `--quantization`."""
    quantization, source = find_quantization(directory, config)
    asked = arguments.value("--quantization", "-q")
    tensors = read_tensors(directory)
    if source != "config.json" and tensors and not any(name.endswith(".qweight") for name in tensors):
        quantization = None  # a file left over from a quantized sibling
    if quantization is None:
        if asked in METHODS:
            raise Refusal(
                f"{directory} is not quantized, so --quantization {asked} cannot serve it: quantize it first, or "
                "leave the option out to serve it as it is"
            )
        notes.append("the checkpoint is not quantized: serving it as it is")
        return
    method = str(quantization.get("quant_method") or "").lower()
    if not method:
        raise Refusal(f"the quantization settings in {source} name no quant_method, which vLLM needs: add it")
    if method not in METHODS:
        notes.append(f"the checkpoint is quantized as {method}, which is left to vLLM to judge")
        return
    choose_method(method, source, arguments, device, notes)
    if (arguments.value("--dtype") or "").lower() in ("float32", "float"):
        raise Refusal(
            "vLLM runs quantized weights in float16 or bfloat16, never float32: change or drop --dtype"
        )
    try:
        check_settings(config, quantization, method, tensors, arguments, device, notes)
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, OSError) as error:
        raise Refusal(f"the quantization settings in {source} make no sense ({error})") from error


def check_settings(
    config: dict[str, Any],
    quantization: dict[str, Any],
    method: str,
    tensors: dict[str, Tensor],
    arguments: Arguments,
    device: str,
    notes: list[str],
) -> None:
    """Refuses settings and shapes that vLLM would refuse. Settings of the wrong kind raise what they raise."""
    if method == "awq":
        bits: int | None = check_awq(quantization, device, notes)
    elif method == "gptq":
        bits = check_gptq(quantization, device, notes)
    else:
        bits = check_packed(quantization, device)
    if bits is None:
        return
    if not tensors:
        notes.append("the weights are not in safetensors files: their shapes are left to vLLM to judge")
        return
    layers = list(quantized_layers(method, bits, tensors))
    if method == "gptq":
        check_group_indices(quantization, layers)
    if method != "compressed-tensors" and not quantization.get("dynamic"):
        check_group_size(int(quantization.get("q_group_size") or quantization["group_size"]), layers)
    check_joined(layers, tensors)
    parts = arguments.value("--tensor-parallel-size", "-tp")
    if parts is not None and parts.isdigit() and int(parts) > 1:
        repeat_scales = method != "awq" and whole_rows(quantization)
        layers = split(layers, int(parts), config, repeat_scales)
    if device == "cpu":
        check_cpu_widths(layers)


def plan(device: str, model: str, words: Sequence[str]) -> Plan:
    """What to hand to `vllm serve` for `model` and the user's further arguments.

    `device` is `cuda`, `cpu` or `other` (an accelerator whose own rules are left to vLLM). Raises `Refusal`.
    """
    arguments = parse_arguments(words)
    notes: list[str] = []
    if any(arguments.name(word).startswith("--api-k") for word in arguments.words):
        raise Refusal(
            "a key on the command line shows in every process list: drop --api-key and set the environment "
            "variable VLLM_API_KEY"
        )
    path = Path(model)
    local = path.is_dir()
    if local:
        config = path / "config.json"
        if not config.is_file():
            raise Refusal(f"{model} has no config.json: give the directory of a model")
        check_checkpoint(path, read_json(config), arguments, device, notes)
    elif path.exists():
        raise Refusal(f"{model} is not a directory: give the directory that holds config.json")
    elif "://" in model or (HUB_ID.fullmatch(model) and ".." not in model and "--" not in model):
        notes.append(f"there is no directory {model} here: passing it on as a model to download, unexamined")
    else:
        raise Refusal(f"there is no directory {model}, and it is no hub id: check the path")
    if not arguments.has("--host", "--uds"):
        arguments.words += ["--host", "127.0.0.1"]
    if device == "cpu" and not eager_chosen(arguments):
        arguments.words.append("--enforce-eager")
    # A leading dash would make an option of it.
    return Plan(f"./{model}" if model.startswith("-") else model, arguments.words, local, notes)


def eager_chosen(arguments: Arguments) -> bool:
    """Whether the user said how to compile."""
    return arguments.has_prefix(
        "--enforce-eager", "--no-enforce-eager", "-O", "--optimization-level", "--compilation-config", "-cc"
    )


def printable(text: object) -> str:
    """One line that a terminal may show: names in a checkpoint are anybody's, control sequences among them."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))


def main(argv: Sequence[str]) -> int:
    """`argv`: device, model, arguments. Writes the model, `local` or `hub`, and the arguments, NUL after each.

    Exit code 2 with one line on stderr where the checkpoint is refused.
    """
    device, model, *words = argv
    try:
        result = plan(device, model, words)
    except Refusal as refusal:
        print(f"run_vllm.sh: {printable(refusal)}", file=sys.stderr)
        return 2
    for note in result.notes:
        print(f"run_vllm.sh: note: {printable(note)}", file=sys.stderr)
    fields = [result.model, "local" if result.local else "hub", *result.words]
    sys.stdout.buffer.write(b"".join(os.fsencode(item) + b"\0" for item in fields))
    return 0
