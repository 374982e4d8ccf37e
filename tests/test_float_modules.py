"""Test which modules a checkpoint's settings call float, by the rules of vLLM and of transformers.

What is expected was read off the readers' sources; for compressed-tensors and transformers it is also computed by their
own functions.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from compressed_tensors.utils.match import is_match
from transformers.quantizers.quantizers_utils import should_convert_module

from llm_quantize.serving.float_in_transformers import FloatInTransformers, is_float_in_transformers
from llm_quantize.serving.float_modules import OUTPUT_HEAD, FloatModules, UnreadableRegex, is_float

BLOCK = "model.layers.0"
Settings = dict[str, Any]


def awq(*entries: str) -> Settings:
    return {"quant_method": "awq", "bits": 4, "modules_to_not_convert": list(entries)}


def gptq(**more: Any) -> Settings:
    return {"quant_method": "gptq", "bits": 4, "group_size": 128, **more}


def packed(ignore: list[str], *targets: str) -> Settings:
    groups = {f"group_{i}": {"targets": [t], "weights": {"num_bits": 4}} for i, t in enumerate(targets)}
    return {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ignore}


# --- vLLM

VLLM: list[tuple[str, Settings, str, bool]] = [
    # (what it shows, settings, module, float)
    ("a substring", awq("gate"), f"{BLOCK}.mlp.gate_proj", True),
    ("the fused layer has the rule of its members", awq("gate"), f"{BLOCK}.mlp.up_proj", True),
    ("a full path", awq(f"{BLOCK}.mlp.gate"), f"{BLOCK}.mlp.down_proj", False),
    ("a full path is a substring of others", awq("model.layers.1"), "model.layers.11.mlp.down_proj", True),
    ("the head", awq("visual"), "lm_head", True),
    ("the head where it is quantized", {**awq("visual"), "lm_head": True}, "lm_head", False),
    ("a head of another name", awq("lm_head"), "score", False),
    ("the experts' own module", awq("mlp.experts"), f"{BLOCK}.mlp.experts.3.up_proj", True),
    ("one expert, which vLLM does not see", awq("experts.3"), f"{BLOCK}.mlp.experts.3.up_proj", False),
    ("the fused name", awq("qkv_proj"), f"{BLOCK}.self_attn.k_proj", True),
    ("no list", {"quant_method": "awq"}, f"{BLOCK}.mlp.gate_proj", False),
    ("in capitals", {"quant_method": "AWQ", "modules_to_not_convert": ["up"]}, "x.up_proj", True),
    ("a rule", gptq(dynamic={r"-:.*\.mlp\.": {}}), f"{BLOCK}.mlp.up_proj", True),
    ("a rule for others", gptq(dynamic={r"-:.*\.mlp\.": {}}), f"{BLOCK}.self_attn.o_proj", False),
    ("a rule is matched from the beginning", gptq(dynamic={r"-:mlp": {}}), f"{BLOCK}.mlp.up_proj", False),
    (
        "the first rule that matches",
        gptq(dynamic={r"+:.*mlp": {"bits": 8}, r"-:.*up_proj": {}}),
        f"{BLOCK}.mlp.up_proj",
        False,
    ),
    ("a rule without a sign", gptq(dynamic={".*up_proj": {"bits": 8}}), f"{BLOCK}.mlp.up_proj", False),
    ("the head of gptq", gptq(), "lm_head", True),
    ("named layers", gptq(modules_in_block_to_quantize=[["mlp.up_proj"]]), f"{BLOCK}.mlp.up_proj", False),
    (
        "other than those",
        gptq(modules_in_block_to_quantize=[["mlp.up_proj"]]),
        f"{BLOCK}.mlp.down_proj",
        True,
    ),
    (
        "experts are quantized unless a rule says otherwise",
        gptq(modules_in_block_to_quantize=["q_proj"]),
        f"{BLOCK}.mlp.experts.0.up_proj",
        False,
    ),
    ("a name", packed(["a.b"], "Linear"), "a.b", True),
    ("a name below", packed(["a.b"], "Linear"), "a.b.c", False),
    ("a regex from the beginning", packed(["re:.*visual"], "Linear"), "model.visual.blocks.0.fc1", True),
    ("a regex of the middle", packed(["re:visual"], "Linear"), "model.visual.blocks.0.fc1", False),
    ("no target", packed([], r"re:.*mlp\..*"), f"{BLOCK}.self_attn.o_proj", True),
    ("a target", packed([], r"re:.*mlp\..*"), f"{BLOCK}.mlp.up_proj", False),
    ("a member that is ignored", packed([f"{BLOCK}.mlp.up_proj"], "Linear"), f"{BLOCK}.mlp.up_proj", True),
    ("without groups", packed([]), f"{BLOCK}.mlp.up_proj", True),
]


@pytest.mark.parametrize(("shows", "settings", "name", "expected"), VLLM, ids=[row[0] for row in VLLM])
def test_what_vllm_builds_as_float(shows: str, settings: Settings, name: str, expected: bool) -> None:
    assert is_float(name, settings) is expected


def test_class_of_the_head_is_no_linear_in_vllm() -> None:
    assert is_float("lm_head", packed([], "Linear"), class_name=OUTPUT_HEAD)
    assert not is_float("lm_head", packed([], "Linear", "re:.*lm_head"), class_name=OUTPUT_HEAD)


DTYPES = {
    f"{BLOCK}.mlp.down_proj.qweight": "I32",
    f"{BLOCK}.mlp.down_proj.scales": "F16",
    f"{BLOCK}.self_attn.o_proj.weight": "BF16",
    "model.layers.10.self_attn.o_proj.qweight": "I32",
    "model.visual.blocks.0.fc1.weight": "F32",
}


@pytest.mark.parametrize("settings", [awq(), {"quant_method": "awq"}, gptq()])
def test_what_is_found_by_dtypes(settings: Settings) -> None:
    rules = FloatModules(settings, DTYPES)
    assert rules.finds_by_dtype
    assert rules.is_float(f"{BLOCK}.self_attn.o_proj")
    assert rules.is_float("model.visual.blocks.0.fc1")
    assert not rules.is_float(f"{BLOCK}.mlp.down_proj")
    assert not rules.is_float("model.layers.10.self_attn.o_proj")


def test_a_list_turns_the_search_by_dtypes_off() -> None:
    rules = FloatModules(awq("lm_head"), DTYPES)
    assert not rules.finds_by_dtype
    assert not rules.is_float("model.visual.blocks.0.fc1")


def test_settings_of_single_linears() -> None:
    rules = FloatModules(gptq(dynamic={r"+:.*qkv_proj": {"bits": 8}, r"+:.*down_proj": {"group_size": 64}}))
    assert rules.settings_of(f"{BLOCK}.self_attn.k_proj")["bits"] == 8
    assert rules.settings_of(f"{BLOCK}.mlp.down_proj")["group_size"] == 64
    assert rules.settings_of(f"{BLOCK}.mlp.up_proj")["bits"] == 4


BAD: list[Settings] = [
    {"quant_method": "fp8"},
    {},
    {"quant_method": "awq", "modules_to_not_convert": "lm_head"},
    {"quant_method": "awq", "modules_to_not_convert": [7]},
    gptq(dynamic=[]) | {"dynamic": ["x"]},
    gptq(dynamic={"+:x": 7}),
    gptq(modules_in_block_to_quantize=[[7]]),
    packed(["a"]) | {"config_groups": ["x"]},
    packed(["a"]) | {"config_groups": {"g": {"weights": {}}}},
    packed([{}], "Linear"),  # type: ignore[list-item]
]


@pytest.mark.parametrize("settings", BAD)
def test_settings_of_another_form_are_told(settings: Settings) -> None:
    with pytest.raises(ValueError, match=r"."):
        is_float("a.b", settings)


@pytest.mark.parametrize("regex", ["(", "[", "*", "(?P<x", "a{99999999999}"])
def test_regexes_that_are_none_are_told(regex: str) -> None:
    for settings in (gptq(dynamic={f"-:{regex}": {}}), packed([f"re:{regex}"], "Linear")):
        with pytest.raises(UnreadableRegex, match="cannot be read"):
            is_float("a.b", settings)


# --- transformers

TRANSFORMERS: list[tuple[str, Settings, str, bool]] = [
    ("up to a dot", awq("model.layers.1"), "model.layers.11.mlp.up_proj", False),
    ("below", awq("model.layers.1"), "model.layers.1.mlp.up_proj", True),
    ("not in the middle", awq("mlp"), f"{BLOCK}.mlp.up_proj", False),
    ("the end", awq("fc1"), f"{BLOCK}.fc1", True),
    ("no fused name", awq("gate_proj"), f"{BLOCK}.mlp.up_proj", False),
    ("the head", awq(), "lm_head", True),
    ("in a block", gptq(), f"{BLOCK}.mlp.up_proj", False),
    ("outside", gptq(), "model.visual.blocks.0.fc1", True),
    ("rules are not read", gptq(dynamic={"-:.*": {}}), f"{BLOCK}.mlp.up_proj", False),
    ("named", gptq(modules_in_block_to_quantize=[["mlp.up_proj"]]), f"{BLOCK}.mlp.up_proj", False),
    ("not named", gptq(modules_in_block_to_quantize=[["mlp.up_proj"]]), f"{BLOCK}.mlp.down_proj", True),
    ("another block", gptq(block_name_to_quantize="model.text.layers"), f"{BLOCK}.mlp.up_proj", True),
    ("a class", packed(["Linear"], "re:.*"), f"{BLOCK}.mlp.up_proj", True),
    ("a regex", packed(["re:.*mlp"], "Linear"), f"{BLOCK}.mlp.up_proj", True),
    ("the head as a linear", packed([], "Linear"), "lm_head", False),
]


@pytest.mark.parametrize(
    ("shows", "settings", "name", "expected"), TRANSFORMERS, ids=[row[0] for row in TRANSFORMERS]
)
def test_what_transformers_builds_as_float(shows: str, settings: Settings, name: str, expected: bool) -> None:
    assert is_float_in_transformers(name, settings) is expected


PIECES = (
    "model",
    "layers",
    "0",
    "1",
    "11",
    "mlp",
    "visual",
    "gate",
    "gate_proj",
    "up_proj",
    "fc1",
    "lm_heads",
)


def names_and_entries(seed: int) -> tuple[list[str], list[str]]:
    draw = random.Random(seed)
    names = [".".join(draw.choices(PIECES, k=draw.randint(1, 5))) for _ in range(60)]
    entries = [*draw.sample(names, 4), draw.choice(PIECES), *draw.sample(PIECES, 2)]
    entries += [f"{draw.choice(PIECES)}.*", "model.layers.[01]", f".*{draw.choice(PIECES)}"]
    return names, draw.sample(entries, draw.randint(0, 5))


@pytest.mark.parametrize("seed", range(30))
def test_awq_as_transformers_itself_decides(seed: int) -> None:
    names, entries = names_and_entries(seed)
    rules = FloatInTransformers(awq(*entries))
    assert [rules.is_float(name) for name in names] == [not should_convert_module(n, entries) for n in names]


@pytest.mark.parametrize("seed", range(30))
def test_compressed_tensors_as_its_library_decides(seed: int) -> None:
    names, ignored = names_and_entries(seed)
    _, targets = names_and_entries(seed + 1000)
    marked = [
        [e if set("*[").isdisjoint(e) else f"re:{e}" for e in entries] for entries in (ignored, targets)
    ]
    settings = packed(marked[0], *marked[1], *(["Linear"] if seed % 2 else []))
    linear = torch.nn.Linear(1, 1)
    wanted = [group["targets"][0] for group in settings["config_groups"].values()]
    expected = [not is_match(name, linear, wanted, marked[0]) for name in names]
    rules = FloatInTransformers(settings)
    assert [rules.is_float(name) for name in names] == expected
    # vLLM agrees, but for the layers that it fuses.
    plain = [name for name in names if name.rpartition(".")[2] not in ("gate_proj", "up_proj")]
    vllm = FloatModules(settings)
    assert [vllm.is_float(name) for name in plain] == [rules.is_float(name) for name in plain]
