"""Test what the check before serving makes of a checkpoint: its tensors, its settings, the modules that stay float.

Each refusal is tried on a model that is served without the one change that the test makes.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from fake_checkpoints import FakeCheckpoint, WholeModel, whole_model, write_safetensors, zeros
from llm_quantize.serving import architectures, model_rules
from llm_quantize.serving.cli import main
from llm_quantize.serving.model_rules import FAMILIES as KNOWN_FAMILIES
from llm_quantize.serving.plan import ServingPlan, plan_serving
from llm_quantize.serving.quantized_checkpoint import read_checkpoint
from llm_quantize.serving.refusal import Refusal
from models import FAMILIES, write
from reference import write_rtn_checkpoint

METHODS = ("awq", "gptq", "compressed-tensors")


def plan(model: WholeModel, directory: Path, *words: str, device: str = "cuda") -> ServingPlan:
    return plan_serving(device, str(model.write(directory)), words)


def refusal(model: WholeModel, directory: Path, *words: str, device: str = "cuda") -> str:
    """Return the line with which the model is refused."""
    with pytest.raises(Refusal) as error:
        plan(model, directory, *words, device=device)
    line = str(error.value)
    assert "\n" not in line
    return line


def module_of(tensor: str) -> str:
    return tensor.rpartition(".")[0]


# --- whole models


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("device", ["cuda", "cpu", "other"])
def test_whole_model_is_served_without_a_note(method: str, device: str, tmp_path: Path) -> None:
    assert plan(whole_model(method), tmp_path, device=device).notes == []


LIBRARIES: dict[str, tuple[str, dict[str, Any]]] = {
    "AutoAWQ 0.2.9": (
        "awq",
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 128,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": None,
        },
    ),
    "AutoGPTQ 0.7.1": (
        "gptq",
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 128,
            "damp_percent": 0.01,
            "desc_act": False,
            "static_groups": True,
            "sym": True,
            "true_sequential": True,
            "model_name_or_path": None,
            "model_file_base_name": None,
        },
    ),
    "GPTQModel 7": (
        "gptq",
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 128,
            "desc_act": False,
            "dynamic": {r"-:.*\.visual\..*": {}, r"-:.*mtp.*": {}},
            "lm_head": False,
            "sym": True,
            "pack_dtype": "int32",
            "checkpoint_format": "gptq",
            "meta": {"quantizer": ["gptqmodel:7.7.0"], "damp_percent": 0.05, "act_group_aware": True},
        },
    ),
    "llm-compressor 0.12": (
        "compressed-tensors",
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {
                "group_0": {
                    "format": "pack-quantized",
                    "input_activations": None,
                    "output_activations": None,
                    "targets": ["Linear"],
                    "weights": {
                        "actorder": "static",
                        "block_structure": None,
                        "dynamic": False,
                        "group_size": 128,
                        "num_bits": 4,
                        "observer": "minmax",
                        "observer_kwargs": {},
                        "strategy": "group",
                        "symmetric": True,
                        "type": "int",
                    },
                }
            },
            "global_compression_ratio": None,
            "ignore": ["lm_head", "re:.*mlp.gate$"],
            "kv_cache_scheme": None,
            "quantization_status": "compressed",
            "sparsity_config": {},
            "transform_config": {},
            "version": "0.20.0",
        },
    ),
}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_settings_of_the_libraries_are_served(library: str, device: str, tmp_path: Path) -> None:
    method, settings = LIBRARIES[library]
    model = whole_model(method)
    model.config["quantization_config"] = settings
    assert plan(model, tmp_path, device=device).notes == []


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_of_all_families_are_served(family: str, tmp_path: Path) -> None:
    """Config and names as transformers writes them."""
    write(tmp_path / "model", FAMILIES[family]())
    for method in METHODS:
        write_rtn_checkpoint(tmp_path / "model", tmp_path / method, method, 4, 32, method != "awq")
        assert plan_serving("cuda", str(tmp_path / method), []).notes == []
        found = read_checkpoint(tmp_path / method)
        # The check is of this very family, where it has one: a norm that is gone is missed.
        if found.config["model_type"] in KNOWN_FAMILIES:
            tensors = load_file(tmp_path / method / "model.safetensors")
            norm = next(name for name in tensors if name.endswith("1.post_attention_layernorm.weight"))
            del tensors[norm]
            save_file(tensors, tmp_path / method / "model.safetensors", metadata={"format": "pt"})
            with pytest.raises(Refusal, match=f"{norm} is missing"):
                plan_serving("cuda", str(tmp_path / method), [])


@pytest.mark.parametrize("model_type", KNOWN_FAMILIES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_tensors_of_a_family_are_those_of_transformers(model_type: str, with_bias: bool) -> None:
    """Each tensor of a block is checked, in the size that transformers builds."""
    family = KNOWN_FAMILIES[model_type]
    sizes = {
        "hidden_size": 96,
        "intermediate_size": 160,
        "vocab_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        **({} if model_type in model_rules.HEAD_IS_HIDDEN_OVER_HEADS else {"head_dim": 32}),
        **dict.fromkeys(family.biased_by_key, with_bias),
    }
    config = AutoConfig.for_model(model_type, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    assert type(model).__name__ == family.architecture
    names = model_rules.known_sizes({**config.to_dict(), "model_type": model_type})
    biased = set(family.biased).union(*(family.biased_by_key.values() if with_bias else ()))
    expected: dict[str, tuple[int, ...]] = {}
    for path, dimensions in family.linears.items():
        expected[f"{path}.weight"] = tuple(names[d] for d in dimensions)
        if path in biased:
            expected[f"{path}.bias"] = (names[dimensions[0]],)
    expected.update({f"{path}.weight": (names[width],) for path, width in family.norms.items()})
    block = model.get_submodule("model.layers.0")
    assert {name: tuple(tensor.shape) for name, tensor in block.named_parameters()} == expected


# vLLM reads none of these of a served file: groups in order have no use for indices, symmetric zero points are known.
UNREAD = {"awq": (), "gptq": ("g_idx", "qzeros"), "compressed-tensors": ("weight_shape",)}


@pytest.mark.parametrize("method", METHODS)
def test_each_missing_tensor_is_refused_by_its_name(method: str, tmp_path: Path) -> None:
    for name in whole_model(method).tensors:
        model = whole_model(method)
        del model.tensors[name]
        if name.endswith(UNREAD[method]) and UNREAD[method]:
            assert plan(model, tmp_path).notes == []
        else:
            line = refusal(model, tmp_path)
            assert module_of(name) in line, name
            assert "copy or download the checkpoint again" in line


@pytest.mark.parametrize("method", METHODS)
def test_each_missing_linear_and_block_is_refused_by_its_name(method: str, tmp_path: Path) -> None:
    names = set(whole_model(method).tensors)
    for gone in (*{module_of(name) for name in names}, "model.layers.0", "model.layers.1"):
        model = whole_model(method)
        for name in names:
            if name.startswith(f"{gone}."):
                del model.tensors[name]
        assert gone in refusal(model, tmp_path)


def test_block_beyond_the_count_is_refused(tmp_path: Path) -> None:
    model = whole_model(blocks=3)
    model.config["num_hidden_layers"] = 2
    assert "model.layers.2 is beyond the 2 layers" in refusal(model, tmp_path)


def test_blocks_of_an_unknown_family_are_counted(tmp_path: Path) -> None:
    model = whole_model(blocks=3)
    model.config.update(architectures=["OlmoForCausalLM"], model_type="olmo", num_hidden_layers=4)
    assert "model.layers.3 is missing of the 4 layers" in refusal(model, tmp_path)
    model.config["num_hidden_layers"] = 3
    assert plan(model, tmp_path).notes == []


def test_tied_head_may_be_missing(tmp_path: Path) -> None:
    model = whole_model()
    del model.tensors["lm_head.weight"]
    assert "lm_head is missing" in refusal(model, tmp_path)
    model.config["tie_word_embeddings"] = True
    assert plan(model, tmp_path).notes == []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("key", "value", "tensor"),
    [
        ("hidden_size", 512, "model.layers.0.self_attn.q_proj"),
        ("intermediate_size", 256, "model.layers.0.mlp.gate_proj"),
        ("vocab_size", 65, "model.embed_tokens"),
        ("num_attention_heads", 8, "model.layers.0.self_attn.q_proj"),
        ("num_key_value_heads", 4, "model.layers.0.self_attn.k_proj"),
        ("head_dim", 32, "model.layers.0.self_attn.q_proj"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    method: str, key: str, value: int, tensor: str, tmp_path: Path
) -> None:
    model = whole_model(method)
    model.config[key] = value
    line = refusal(model, tmp_path)
    assert line.startswith(f"{tensor}.weight is ")
    assert "config.json does not belong to these weights" in line


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim"])
@pytest.mark.parametrize("value", ["256", 256.0, -256, True, [256]])
def test_sizes_that_are_none_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    model = whole_model()
    model.config[key] = value
    assert f"config.json has a {key} that is no whole number" in refusal(model, tmp_path)


def test_absurd_counts_take_no_time(tmp_path: Path) -> None:
    model = whole_model()
    for value in (10**30, 10**900):
        model.config["num_hidden_layers"] = value
        assert "model.layers.2 is missing of the 1000" in refusal(model, tmp_path)


def test_widths_that_contradict_the_model_are_refused(tmp_path: Path) -> None:
    model = whole_model("gptq")
    name = "model.layers.1.mlp.down_proj"
    model.tensors[f"{name}.qweight"] = zeros("I32", 384 // 8, 256)
    model.tensors[f"{name}.scales"] = zeros("F16", 3, 256)
    model.tensors[f"{name}.qzeros"] = zeros("I32", 3, 32)
    model.tensors[f"{name}.g_idx"] = ("I32", (384,), struct.pack("<384i", *(i // 128 for i in range(384))))
    assert f"{name}.weight is 256 × 384 where the sizes in config.json make 256 × 512" in refusal(
        model, tmp_path
    )


CONTRADICTIONS: dict[str, tuple[str, str, tuple[str, tuple[int, ...], bytes]]] = {
    "scales of another width": ("awq", "scales", zeros("F16", 2, 128)),
    "zero points of another width": ("awq", "qzeros", zeros("I32", 2, 16)),
    "integers as floats": ("awq", "qweight", zeros("F32", 256, 32)),
    "one dimension": ("gptq", "qweight", zeros("I32", 8192)),
    "no scale": ("gptq", "scales", zeros("F16", 0, 256)),
    "short indices": ("gptq", "g_idx", zeros("I32", 128)),
    "scales of other rows": ("compressed-tensors", "weight_scale", zeros("F16", 128, 2)),
    "another shape": ("compressed-tensors", "weight_shape", ("I64", (2,), struct.pack("<2q", 256, 512))),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_tensors_that_contradict_each_other_are_refused(case: str, tmp_path: Path) -> None:
    method, part, tensor = CONTRADICTIONS[case]
    model = whole_model(method)
    name = f"model.layers.1.self_attn.q_proj.{part}"
    assert name in model.tensors
    model.tensors[name] = tensor
    assert name in refusal(model, tmp_path)


# --- architectures


def test_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    model = whole_model()
    model.config["architectures"] = ["NoSuchThingForCausalLM"]
    assert "the architecture NoSuchThingForCausalLM, which neither" in refusal(model, tmp_path)
    assert plan(model, tmp_path, "--model-impl", "auto").notes == []  # a vLLM of tomorrow
    model.config["auto_map"] = {"AutoModelForCausalLM": "modeling.NoSuchThingForCausalLM"}
    assert plan(model, tmp_path).notes == []
    del model.config["auto_map"]
    model.config["architectures"] = ["Llama\nForCausalLM\x1b[2J"]
    assert "\x1b" not in refusal(model, tmp_path)
    model.config["architectures"] = "LlamaForCausalLM"
    assert "is no list of names" in refusal(model, tmp_path)


def test_architectures_of_transformers_are_known() -> None:
    from transformers.models.auto import modeling_auto

    known = architectures.known_architectures()
    for mapping in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    ):
        names = {
            name for value in mapping.values() for name in ([value] if isinstance(value, str) else value)
        }
        assert len(names) > 50
        assert {name for name in names if architectures.ENDING.sub("", name) not in known} == set()
    # Classes that vLLM alone has, and ones that nobody has.
    assert {"ChatGLM", "QWen", "Internlm2"} - known == {"Internlm2"}
    assert len(known) < 2000


# --- settings


@pytest.mark.parametrize("method", ["awq", "gptq"])
@pytest.mark.parametrize("key", ["bits", "group_size"])
@pytest.mark.parametrize("value", [4.7, 4.0, "4", "four", True, [4], {}])
def test_numbers_that_are_none_are_refused(method: str, key: str, value: Any, tmp_path: Path) -> None:
    model = whole_model(method)
    model.settings[key] = value
    line = refusal(model, tmp_path)
    assert f"the {method} settings have '{key}' {value!r}, which is no whole number" in line


@pytest.mark.parametrize("value", [4.7, "four", True, [4]])
def test_bits_of_a_config_group_that_are_none_are_refused(value: Any, tmp_path: Path) -> None:
    model = whole_model("compressed-tensors")
    model.settings["config_groups"]["group_0"]["weights"]["num_bits"] = value
    assert f"have 'num_bits' {value!r}, which is no whole number" in refusal(model, tmp_path)
    model.settings["config_groups"]["group_0"]["weights"]["num_bits"] = "4"  # as the library takes it
    assert plan(model, tmp_path).notes == []


@pytest.mark.parametrize("value", ["yes", 2, 1.5, [True]])
def test_symmetry_that_is_none_is_refused(value: Any, tmp_path: Path) -> None:
    model = whole_model("gptq")
    model.settings["sym"] = value
    assert f"'sym' {value!r}, which is neither true nor false" in refusal(model, tmp_path)


def nested(key: str, model_type: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda config: {"model_type": model_type, key: config}


PLACES: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str | None]] = {
    "text_config": (nested("text_config", "gemma3"), None),
    "llm_config": (nested("llm_config", "internvl_chat"), None),
    "language_config of a model that vLLM knows it of": (nested("language_config", "deepseek_vl_v2"), None),
    "language_config": (nested("language_config", "janus"), "language_config.quantization_config"),
    "deeper": (
        lambda config: {"model_type": "x", "thinker_config": {"text_config": config}},
        "thinker_config.text_config.quantization_config",
    ),
    "compression_config": (
        lambda config: {
            **config,
            "quantization_config": None,
            "compression_config": config["quantization_config"],
        },
        None,
    ),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", METHODS)
def test_settings_are_found_wherever_they_are(place: str, method: str, tmp_path: Path) -> None:
    change, path = PLACES[place]
    model = whole_model(method)
    model.config = change({k: v for k, v in model.config.items() if k != "architectures"})
    if path is None:
        found = plan(model, tmp_path, "-q", "awq" if method != "awq" else "gptq")
        assert found.arguments[:2] == ["-q", method]
    else:
        line = refusal(model, tmp_path)
        assert f"holds its quantization settings as {path}, where vLLM does not look" in line
        (tmp_path / "model.safetensors").rename(tmp_path / "model.bin")
        with pytest.raises(Refusal, match="where vLLM does not look"):
            plan_serving("cuda", str(tmp_path), [])


def test_integers_without_settings_are_refused(tmp_path: Path) -> None:
    for method in METHODS:
        model = whole_model(method)
        del model.config["quantization_config"]
        line = refusal(model, tmp_path / method)
        assert "is quantized and config.json has no quantization_config" in line


# --- files


def test_unrelated_broken_files_do_not_matter(tmp_path: Path) -> None:
    model = whole_model("awq").write(tmp_path / "m")
    (model / "notes.json").write_text("{")
    (model / "quantize_config.json").write_text("{")
    (model / "training_args.bin").write_bytes(b"\0")
    (model / ".hidden.safetensors").write_bytes(b"\0")
    (model / "link").symlink_to("/nowhere")
    (model / "old").mkdir()
    (model / "old" / "model.safetensors").write_bytes(b"\0")
    assert plan_serving("cuda", str(model), []).notes == []


def with_index(model: WholeModel, directory: Path) -> Path:
    """Write the model in two shards with an index."""
    model.write(directory)
    (directory / "model.safetensors").unlink()
    names = list(model.tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in files.items():
        write_safetensors(directory / file, {name: model.tensors[name] for name in held})
    index = {"weight_map": {name: file for file, held in files.items() for name in held}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def test_broken_file_that_the_index_does_not_name(tmp_path: Path) -> None:
    """vLLM reads its header only where it finds by dtypes what is float."""
    awq = with_index(whole_model("awq"), tmp_path / "awq")
    gptq = with_index(whole_model("gptq"), tmp_path / "gptq")
    for model in (awq, gptq):
        assert plan_serving("cuda", str(model), []).notes == []
        (model / "other.safetensors").write_bytes(b"no such thing")
    assert plan_serving("cuda", str(awq), []).notes == []
    with pytest.raises(Refusal, match=r"other.safetensors is not a whole .*: move it away"):
        plan_serving("cuda", str(gptq), [])
    write_safetensors(gptq / "other.safetensors", {"x": zeros("F16", 4)})
    with (gptq / "other.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 1)  # vLLM reads none of its tensors
    assert plan_serving("cuda", str(gptq), []).notes == []


def test_consolidated_weights_beside_quantized_ones_are_refused(tmp_path: Path) -> None:
    model = with_index(whole_model("awq"), tmp_path)
    (model / "original").mkdir()
    write_safetensors(model / "original" / "consolidated.00.safetensors", {"x": zeros("F16", 4)})
    with pytest.raises(Refusal, match=r"consolidated\*.safetensors, which vLLM would load in place"):
        plan_serving("cuda", str(model), [])
    assert plan_serving("cuda", str(model), ["--load-format", "safetensors"]).notes == []


def test_what_the_system_does_not_let_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    long = "x" * 5000
    assert main(["cuda", long]) == 2
    assert "x cannot be read (File name too long): check the path" in capfd.readouterr().err
    model = whole_model().write(tmp_path)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("llm_quantize.serving.quantized_checkpoint.read_tensors", refuse)
    assert main(["cuda", str(model)]) == 2
    out, err = capfd.readouterr()
    assert (out, err) == (
        "",
        f"run_vllm.sh: {str(model)[:200]} cannot be read (Permission denied): check the path and its permissions\n",
    )


# --- headers


def write_header(directory: Path, header: str) -> Path:
    whole_model("awq").write(directory)
    data = header.encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(data)) + data + bytes(64))
    return directory


def entry(shape: str, dtype: str = "F16", offsets: str = "[0, 64]") -> str:
    return f'{{"x": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": {offsets}}}}}'


NINES = "9" * 4000
HEADERS = {
    "2,000 numbers of 4,000 digits": entry("[" + ", ".join([NINES] * 2000) + "]"),
    "2,000 numbers of 900 digits": entry("[" + ", ".join([NINES[:900]] * 2000) + "]"),
    "100,000 small numbers": entry("[" + ", ".join(["7"] * 100_000) + "]"),
    "many numbers of an unknown dtype": entry("[" + ", ".join(["127"] * 50_000) + "]", dtype="F4"),
    "one number of 10 million digits": entry("[" + "9" * 10_000_000 + "]"),
    "long offsets": entry("[32]", offsets=f"[0, {NINES}]"),
    "long exponent": entry("[1e999999999]"),
    "deep nesting": "[" * 2_000_000,
    "deep objects": '{"x": ' * 500_000,
    "no object": "[]",
    "entries that are none": '{"x": 7}',
    "numbers with a sign": entry("[-4, -8]"),
    "true": entry("[true, 32]"),
    "many entries": "{" + ", ".join(f'"x{i}": 0' for i in range(200_000)) + "}",
}


@pytest.mark.parametrize("case", HEADERS)
def test_absurd_headers_are_refused_quickly(
    case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = write_header(tmp_path, HEADERS[case])
    started = time.process_time()
    assert main(["cuda", str(model)]) == 2
    assert time.process_time() - started < 3
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("run_vllm.sh: ")
    assert "is not a whole safetensors file" in err
    assert err.count("\n") == 1
    assert len(err) < 1000


def test_zero_size_beside_a_huge_one_is_a_tensor(tmp_path: Path) -> None:
    """As for the safetensors library, which counts its elements."""
    model = whole_model("awq")
    model.tensors["extra"] = ("F16", (0, 10**12), b"")
    assert plan(model, tmp_path).notes == []


# --- arguments


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        (["-qgptq"], ["-qawq"]),
        (["-q=gptq"], ["-q=awq"]),
        (["--quant", "gptq"], ["--quantization", "awq"]),
        (["--quant=gptq"], ["--quantization=awq"]),
        (["--quantizatio", "awq"], ["--quantization", "awq"]),
        (["-q", "gptq", "--quantization=gptq"], ["-q", "awq", "--quantization=awq"]),
        (["--served-model-name", "gptq"], ["--served-model-name", "gptq"]),
    ],
)
def test_every_spelling_of_the_method_is_seen(given: list[str], passed: list[str], tmp_path: Path) -> None:
    found = plan(whole_model("awq"), tmp_path, *given)
    assert found.arguments == [*passed, "--host", "127.0.0.1"]


@pytest.mark.parametrize("given", [["-qfp8"], ["--quant", "fp8"], ["-q=fp8"], ["-q", "awq", "-qfp8"]])
def test_another_method_is_refused_in_every_spelling(given: list[str], tmp_path: Path) -> None:
    assert "quantized as awq, not fp8" in refusal(whole_model("awq"), tmp_path, *given)


@pytest.mark.parametrize("dtype", ["float32", "float", "fp32", "FP32", "f32", "double"])
@pytest.mark.parametrize("form", [["--dtype", "{}"], ["--dtype={}"], ["--dty", "{}"]])
def test_other_precisions_are_refused(dtype: str, form: list[str], tmp_path: Path) -> None:
    words = [word.format(dtype) for word in form]
    line = refusal(whole_model(), tmp_path, *words)
    assert f"--dtype {dtype}: vLLM runs quantized weights in float16 or bfloat16" in line


@pytest.mark.parametrize("dtype", ["auto", "half", "float16", "bfloat16"])
def test_half_precision_is_passed_on(dtype: str, tmp_path: Path) -> None:
    assert plan(whole_model(), tmp_path, "--dtype", dtype).arguments[:2] == ["--dtype", dtype]


def test_other_files_than_those_checked_are_said(tmp_path: Path) -> None:
    model = FakeCheckpoint(bits=8).write(tmp_path / "m")
    for words in (["--load-format", "dummy"], ["--hf-config-path", "x"], ["--config-format=mistral"]):
        found = plan_serving("cuda", str(model), words)
        assert [note for note in found.notes if "passing the model on unexamined" in note]
    with pytest.raises(Refusal, match="awq files of 4 bits"):
        plan_serving("cuda", str(model), ["--load-format", "auto"])


def test_another_model_is_refused(tmp_path: Path) -> None:
    for words in (["--model", "other"], ["--model=other"], ["--mode", "other"]):
        assert "--model would serve another model" in refusal(whole_model(), tmp_path, *words)
    assert plan(whole_model(), tmp_path, "--model-impl", "vllm").notes == []


# --- tensor-parallel ranks


def test_group_sizes_that_would_serve_are_named(tmp_path: Path) -> None:
    model = whole_model("gptq")  # rows of o_proj: 256 in groups of 128
    line = refusal(model, tmp_path, "-tp", "4")
    assert line.endswith(
        "choose another --tensor-parallel-size (1 or 2), or quantize the model again with --group_size 64 or 32"
    )
    assert plan(whole_model("gptq", group_size=64), tmp_path, "-tp", "4").notes == []
    assert plan(whole_model("gptq", group_size=32), tmp_path, "-tp", "4").notes == []
    line = refusal(whole_model("gptq", group_size=128), tmp_path, "-tp", "3")
    assert line.endswith("choose another --tensor-parallel-size (1 or 2)"), "no group size makes three parts"


def test_whole_rows_of_awq_name_group_sizes(tmp_path: Path) -> None:
    line = refusal(whole_model("awq", group_size=-1), tmp_path, "-tp", "2")
    assert line.endswith("with --group_size 128, 64 or 32")
    for group_size in (128, 64, 32):
        assert plan(whole_model("awq", group_size=group_size), tmp_path, "-tp", "2").notes == []


@pytest.mark.parametrize("value", ["0", "-1", "two", "²", "9" * 5000, "", "1.0"])
def test_ranks_that_are_none_are_left_to_vllm(value: str, tmp_path: Path) -> None:
    assert plan(whole_model(), tmp_path, f"-tp={value}").arguments[0] == f"-tp={value}"


@pytest.mark.parametrize("value", ["+3", " 3", "03"])
def test_ranks_are_read_as_python_reads_integers(value: str, tmp_path: Path) -> None:
    assert "do not divide into 3 parts" in refusal(whole_model(), tmp_path, "-tp", value)


def test_whole_experts_are_not_split(tmp_path: Path) -> None:
    def model() -> WholeModel:
        found = whole_model("gptq")
        found.config.update(architectures=["MixtralForCausalLM"], model_type="mixtral")
        one = FakeCheckpoint(method="gptq", shapes={"w2": (256, 384)}).tensors()
        moved = {n.replace("model.layers.0.", "model.layers.1.moe.experts.0."): t for n, t in one.items()}
        found.tensors.update(moved)
        return found

    line = refusal(model(), tmp_path, "-tp", "2")
    assert "experts.0.w2 has 384 inputs in groups of 128, which do not divide into 2 parts" in line
    assert "--group_size 64 or 32" in line
    assert plan(model(), tmp_path, "-tp", "2", "--enable-expert-parallel").notes == []
