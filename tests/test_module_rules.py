"""Test that the check before serving refuses files that hold other modules as integers than the settings say."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from fake_checkpoints import FakeCheckpoint, WholeModel, whole_model, zeros
from llm_quantize.serving.plan import plan_serving
from llm_quantize.serving.refusal import Refusal
from llm_quantize.serving.time_limit import TooSlow, limited_seconds


def refusal(model: WholeModel, directory: Path) -> str:
    with pytest.raises(Refusal) as error:
        plan_serving("cuda", str(model.write(directory)), [])
    return str(error.value)


def with_float(method: str, *layers: str) -> WholeModel:
    return whole_model(method, unquantized=layers)


def test_float_linear_that_awq_does_not_name(tmp_path: Path) -> None:
    model = with_float("awq", "mlp.down_proj")
    line = refusal(model, tmp_path)
    assert (
        "model.layers.0.mlp.down_proj is float in the files and the quantization settings do not say so"
        in line
    )
    model.settings["modules_to_not_convert"].append("mlp.down_proj")
    assert plan_serving("cuda", str(model.write(tmp_path)), []).notes == []
    del model.settings["modules_to_not_convert"]  # vLLM's own detection
    assert plan_serving("cuda", str(model.write(tmp_path)), []).notes == []


def test_float_linear_that_gptq_finds_by_itself(tmp_path: Path) -> None:
    model = with_float("gptq", "mlp.down_proj")
    assert plan_serving("cuda", str(model.write(tmp_path)), []).notes == []
    model.settings["modules_in_block_to_quantize"] = [["mlp.down_proj", "mlp.up_proj", "mlp.gate_proj"]]
    assert (
        "self_attn.q_proj is quantized in the files and the quantization settings call it float"
        in refusal(model, tmp_path)
    )


def test_float_linear_that_compressed_tensors_does_not_ignore(tmp_path: Path) -> None:
    model = with_float("compressed-tensors", "mlp.down_proj")
    assert "model.layers.0.mlp.down_proj is float in the files" in refusal(model, tmp_path)
    model.settings["ignore"] = ["lm_head", "model.layers.0.mlp.down_proj"]
    assert "model.layers.1.mlp.down_proj is float in the files" in refusal(model, tmp_path)
    model.settings["ignore"] = [r"re:.*\.down_proj", "lm_head"]
    assert plan_serving("cuda", str(model.write(tmp_path)), []).notes == []
    model.settings["ignore"] = ["lm_head"]
    model.settings["config_groups"]["group_0"]["targets"] = [r"re:.*self_attn.*", r"re:.*(gate|up)_proj"]
    assert plan_serving("cuda", str(model.write(tmp_path)), []).notes == []


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        ("awq", "modules_to_not_convert", ["lm_head", "gate"]),  # also part of gate_proj
        ("awq", "modules_to_not_convert", ["lm_head", "model.layers.1."]),
        ("gptq", "dynamic", {r"-:.*\.1\.": {}}),
        ("compressed-tensors", "ignore", ["lm_head", "re:model.layers.1.*"]),
        ("compressed-tensors", "ignore", ["lm_head", "model.layers.1.mlp.up_proj"]),
    ],
)
def test_quantized_linear_that_is_called_float(method: str, key: str, value: Any, tmp_path: Path) -> None:
    model = whole_model(method)
    assert plan_serving("cuda", str(model.write(tmp_path)), []).notes == []
    model.settings[key] = value
    line = refusal(model, tmp_path)
    assert "is quantized in the files and the quantization settings call it float" in line
    assert f"correct {key} in config.json" in line


def test_vision_tower_that_vllm_builds_by_the_settings(tmp_path: Path) -> None:
    tower = "model.visual.blocks.0.mlp.up_proj"

    def model(method: str) -> WholeModel:
        found = whole_model(method)
        quantization = found.config.pop("quantization_config")
        text = {key: value for key, value in found.config.items() if key != "architectures"}
        found.config = {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "text_config": text,
            "quantization_config": quantization,
        }
        found.tensors[f"{tower}.weight"] = zeros("F16", 64, 64)
        return found

    for method, key, entry in (
        ("awq", "modules_to_not_convert", "visual"),
        ("compressed-tensors", "ignore", "re:.*visual.*"),
    ):
        one = model(method)
        assert f"{tower} is float in the files" in refusal(one, tmp_path)
        one.settings[key].append(entry)
        assert plan_serving("cuda", str(one.write(tmp_path)), []).notes == []
    assert plan_serving("cuda", str(model("gptq").write(tmp_path)), []).notes == []


def test_layers_that_vllm_builds_as_float_need_no_rule(tmp_path: Path) -> None:
    model = whole_model("compressed-tensors")
    for name in ("model.layers.0.mlp.gate", "model.layers.0.mlp.shared_expert_gate"):
        model.tensors[f"{name}.weight"] = zeros("F16", 4, 256)
    model.tensors["mtp.layers.0.mlp.down_proj.weight"] = zeros("F16", 256, 512)
    assert plan_serving("cuda", str(model.write(tmp_path)), []).notes == []


def test_quantized_layers_that_vllm_does_not_load_may_be_called_float(tmp_path: Path) -> None:
    model = whole_model("gptq")
    one = FakeCheckpoint(method="gptq", shapes={"mlp.down_proj": (256, 512)}).tensors()
    model.tensors.update({name.replace("model.layers.0.", "mtp.layers.0."): t for name, t in one.items()})
    model.settings["dynamic"] = {"-:.*mtp.*": {}}
    assert plan_serving("cuda", str(model.write(tmp_path)), []).notes == []


def test_float_linear_elsewhere_is_a_note(tmp_path: Path) -> None:
    model = whole_model("awq")
    model.tensors["audio.layers.0.fc1.weight"] = zeros("F16", 64, 64)
    (note,) = plan_serving("cuda", str(model.write(tmp_path)), []).notes
    assert "audio.layers.0.fc1 is float and the quantization settings do not say so" in note


def test_unreadable_regex_is_left_to_vllm(tmp_path: Path) -> None:
    """vLLM's own library of regexes reads some that Python's does not."""
    model = whole_model("gptq")
    model.settings["dynamic"] = {r"-:\p{L}+nothing": {}}
    (note,) = plan_serving("cuda", str(model.write(tmp_path)), []).notes
    assert "which linears are quantized is left to vLLM to judge" in note


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors"])
def test_regexes_that_take_centuries_are_refused(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_quantize.serving.plan.MAX_REGEX_SECONDS", 0.2)
    model = whole_model(method)
    regex = r"([a-z_.0-9]+)+!"
    if method == "gptq":
        model.settings["dynamic"] = {f"-:{regex}": {}}
    else:
        model.settings["ignore"] = ["lm_head", f"re:{regex}"]
    started = time.process_time()
    assert "take longer than 0.2 s to match" in refusal(model, tmp_path)
    assert time.process_time() - started < 3


def test_a_timer_goes_on_after_a_limit() -> None:
    rang: list[int] = []
    handler = signal.signal(signal.SIGALRM, lambda number, frame: rang.append(number))
    timer = signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with limited_seconds(5):
            time.sleep(0.05)
        assert rang == []
        with pytest.raises(TooSlow), limited_seconds(0.01):
            time.sleep(5)
        time.sleep(0.4)
        assert rang == [signal.SIGALRM]
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)


def test_bits_by_rule(tmp_path: Path) -> None:
    """Two widths in one file, each told by a rule."""
    model = whole_model("gptq")
    eight = FakeCheckpoint(method="gptq", bits=8, shapes={"mlp.down_proj": (256, 512)}).tensors()
    model.tensors.update(eight)
    assert "model.layers.0.mlp.down_proj" in refusal(model, tmp_path)
    model.settings["dynamic"] = {r"+:model\.layers\.0\.mlp\.down_proj": {"bits": 8}}
    assert plan_serving("cuda", str(model.write(tmp_path)), []).notes == []
    with pytest.raises(Refusal, match="4-bit weights alone and these have 8"):
        plan_serving("cpu", str(tmp_path), [])
