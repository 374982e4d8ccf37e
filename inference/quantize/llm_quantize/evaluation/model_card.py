"""What is told of a published checkpoint, beside its weights: model card, report, and a plot of the layers' errors.

Nothing here tells when, where or on which machine it was made: the same run gives the same bytes. A hub id is named
in full, a local path by its last component. The source's own README.md is kept as BASE_README.md, unchanged.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_quantize.backends import registry
from llm_quantize.blockwise.block_solution import LayerReport
from llm_quantize.calibration.windows import Windows
from llm_quantize.config import EMBEDDED_CALIBRATION, EMBEDDED_HELDOUT, EMBEDDED_NAME, VERSION, QuantizeConfig
from llm_quantize.evaluation.perplexity import Measured

CARD = "README.md"
BASE_CARD = "BASE_README.md"
REPORT = "quantization_report.json"
PLOT = "quantization_error.png"
OWN = (CARD, BASE_CARD, REPORT, PLOT)  # never copied from a source

WORST = 8  # layers in the card's table
KINDS = 16  # lines that a plot holds before they stop being told apart
LICENSE_KEYS = ("license", "license_name", "license_link", "language")
NAMES = {"awq": "AWQ", "gptq": "GPTQ"}
HELD = {
    "awq": "AutoAWQ's layout (`gemm`)",
    "gptq": "AutoGPTQ's layout (`gptq`)",
    "compressed-tensors": "compressed-tensors (`pack-quantized`)",
}


@dataclass(frozen=True, slots=True)
class Facts:
    """All that is told. `directory`: the source's; `*_bytes` of the files of weights; `heldout_sha256` of the tokens
    measured on; `layers` in the order in which they were quantized; `damping` that was asked for; `library`: versions
    of a library that did the work and tells nothing of layers, None where this program did."""

    config: QuantizeConfig
    directory: Path
    source_bytes: int
    quantized_bytes: int
    architecture: str
    tied: bool
    windows: Windows
    heldout_sha256: str | None
    damping: float
    layers: list[LayerReport]
    measured: Measured | None
    library: dict[str, str] | None = None


def files(facts: Facts) -> dict[str, bytes]:
    """Those of `OWN` that there are, by name."""
    report = _report(facts)
    found = {REPORT: (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode()}
    base = facts.directory / CARD
    if base.is_file():
        found[BASE_CARD] = base.read_bytes()
    picture = plot(facts.layers) if facts.layers else None
    if picture is not None:
        found[PLOT] = picture
    text = "".join(_card(facts, report, BASE_CARD in found, picture is not None))
    return found | {CARD: text.encode()}


# -- names that may be told


def shown(place: str) -> str:
    """A model or data set as others may see it: a hub id as it is, a local path by its last component.

    A path into the hub's cache becomes the id and revision that it holds.
    """
    path = Path(place).expanduser()
    if not path.exists():
        return place
    path = path.absolute()
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return f"{path.parent.parent.name[8:].replace('--', '/')}@{path.name}"
    return path.name or path.resolve().name or "model"


def base_model(config: QuantizeConfig) -> str:
    """The source without a revision."""
    return EMBEDDED_NAME if config.model_path is None else shown(config.model_path).partition("@")[0]


def title(config: QuantizeConfig) -> str:
    """What the checkpoint is called; the directory that it is published in has no part in it."""
    return f"{base_model(config).rpartition('/')[2]}-{config.method}-{config.bits}bit"


def command(config: QuantizeConfig) -> str:
    """The command that makes this checkpoint again: every option that the result depends on."""
    words = ["python", f"inference/quantize/{config.method}_quantize.py"]

    def option(name: str, value: object) -> None:
        text = str(value).lower() if isinstance(value, bool) else str(value)
        words.extend((f"--{name}", text))

    if config.model_path is not None:
        option("model_path", shown(config.model_path))
    option("bits", config.bits)
    option("group_size", config.group_size)
    if config.method == "awq":
        option("zero_point", config.zero_point)
    else:
        for name in ("desc_act", "act_order_groups", "damp_percent", "sym"):
            option(name, getattr(config, name))
    option("format", config.layout)  # as given: asking for gptq by name also stores a tied head twice
    if config.backend == registry.NATIVE:
        option("quality", config.quality)
    else:
        option("backend", config.backend)
    calibration = config.calibration
    if not (config.embedded and calibration.data == str(EMBEDDED_CALIBRATION)):
        option("calib_data", _data(calibration.data))
    option("calib_samples", calibration.samples)
    option("calib_seq_len", calibration.seq_len)
    if calibration.column is not None:
        option("calib_column", calibration.column)
    option("seed", calibration.seed)
    option("eval_data", _data(config.eval_data))
    if config.eval_data != "off":
        option("eval_samples", config.eval_samples)
    for name in ("trust_remote_code", "allow_pickle"):
        if getattr(config, name):
            option(name, True)
    return " ".join(word if word.startswith("--") else shlex.quote(word) for word in words)


def _data(place: str) -> str:
    for own in (EMBEDDED_CALIBRATION, EMBEDDED_HELDOUT):
        if place == str(own):
            return f"inference/quantize/embedded/{own.name}"
    return shown(place)


# -- the report


def _report(facts: Facts) -> dict[str, Any]:
    config, calibration, measured = facts.config, facts.config.calibration, facts.measured
    report: dict[str, Any] = {
        "base_model": base_model(config),
        "architecture": facts.architecture,
        "method": config.method,
        "bits": config.bits,
        "group_size": config.group_size,
        "symmetric": config.symmetric,
        "format": config.file_layout,
        "backend": config.backend,
        "quality": config.quality if facts.library is None else None,
        "damping": facts.damping if facts.library is None or config.method == "gptq" else None,
        "command": command(config),
        "versions": _versions(facts),
        "calibration": {
            "data": _data(calibration.data),
            "windows": facts.windows.tokens.shape[0],
            "window_tokens": facts.windows.tokens.shape[1],
            "tokens": facts.windows.tokens.numel(),
            "documents": facts.windows.documents,
            "seed": calibration.seed,
            "sha256": facts.windows.fingerprint,
        },
        "bytes": {"source": facts.source_bytes, "quantized": facts.quantized_bytes},
        "measured": None,
        "warnings": list(_warnings(facts)),
        "layers": [layer(each) for each in facts.layers],
    }
    if measured is not None:
        report["measured"] = {
            "data": _data(config.eval_data),
            "sha256": facts.heldout_sha256,
            **asdict(measured),
        }
    return report


def layer(report: LayerReport) -> dict[str, Any]:
    """One layer as the report tells it: all but the time, which no two runs share."""
    told = asdict(report)
    del told["seconds"]
    return told


def _versions(facts: Facts) -> dict[str, str]:
    if facts.library is not None:
        return {"llm-quantize": VERSION, **facts.library}
    needed = ["torch", "transformers"]
    if facts.config.file_layout == "compressed-tensors":
        needed.append("compressed-tensors")
    return {"llm-quantize": VERSION, **{name: importlib.metadata.version(name) for name in needed}}


def _by(config: QuantizeConfig) -> str | None:
    """The library that did the work, with its version."""
    return None if config.backend == registry.NATIVE else registry.LIBRARIES[config.backend].title


def _warnings(facts: Facts) -> Iterator[str]:
    config, layers = facts.config, facts.layers
    for each in layers:
        if each.fallback is not None:
            yield f"{each.name}: {each.fallback}"
        elif each.damping > facts.damping:
            yield f"{each.name}: damping raised to {each.damping:g} before the factorization succeeded"
    dead = [each for each in layers if each.dead]
    if dead:
        most = max(dead, key=lambda each: each.dead)
        yield (
            f"{len(dead)} layers have input channels that calibration never reached; most, {most.dead}, has "
            f"{most.name}"
        )
    found = facts.windows.tokens.shape[0]
    if found < facts.windows.requested:
        yield f"the calibration text gave {found} of {facts.windows.requested} windows"
    refused = config.not_served
    if refused is not None:
        yield refused
    if config.eval_data == config.calibration.data:
        yield "measured on the data that it was calibrated on: on text never seen it may be worse"


# -- the card


def _card(facts: Facts, report: dict[str, Any], kept: bool, plotted: bool) -> Iterator[str]:
    config = facts.config
    name, base = title(config), base_model(config)
    yield "---\n"
    for key, value in _metadata(facts).items():
        yield f"{key}: {json.dumps(value, ensure_ascii=False)}\n"  # JSON is YAML, and needs no escapes of its own
    yield "---\n"
    yield f"# {name}\n\n"
    linked = f"[{base}](https://huggingface.co/{base})" if _is_hub_id(config) else f"`{base}`"
    group = "whole rows" if config.group_size == -1 else f"groups of {config.group_size}"
    kind = "symmetric" if config.symmetric else "asymmetric"
    work = "" if _by(config) is None else f" with {_by(config)}"
    yield (
        f"{linked} ({facts.architecture}) quantized to {config.bits} bits by {NAMES[config.method]}{work}: "
        f"{kind}, {group}, in {HELD[config.file_layout]}.\n"
    )
    if kept:
        yield f"What its authors say of the model is in [{BASE_CARD}]({BASE_CARD}), unchanged.\n"
    yield "\n## Measured\n" + _measured(facts, report)
    yield "\n## Use\n" + _use(facts, name)
    yield "\n## How it was made\n" + _made(facts, report)
    if facts.layers:
        yield "\n## Layers\n" + _layers(facts, plotted)
    if report["warnings"]:
        yield "\n## Warnings\n" + "".join(f"- {line}\n" for line in report["warnings"])


def _is_hub_id(config: QuantizeConfig) -> bool:
    return config.model_path is not None and "/" in base_model(config)


def _metadata(facts: Facts) -> dict[str, Any]:
    config = facts.config
    own = _source_metadata(facts.directory / CARD)
    tags = [config.method, config.file_layout, f"{config.bits}-bit", "quantized"]
    if config.not_served is None:
        tags.append("vllm")
    return {
        "base_model": base_model(config),
        "base_model_relation": "quantized",
        "quantized_by": _by(config) or "llm-quantize",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **{key: own[key] for key in LICENSE_KEYS if _plain(own.get(key))},
        "tags": list(dict.fromkeys(tags)),
    }


def _source_metadata(readme: Path) -> dict[str, Any]:
    """The metadata of the source's card; none where there is no card, or none that can be read."""
    from huggingface_hub import metadata_load

    try:
        return metadata_load(readme) or {}
    except Exception:  # whatever its author wrote there is no reason to lose a checkpoint
        return {}


def _plain(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(x, str) for x in value))


def _measured(facts: Facts, report: dict[str, Any]) -> str:
    sizes = report["bytes"]
    rows = [("weights, MiB", f"{sizes['source'] / 2**20:,.1f}", f"{sizes['quantized'] / 2**20:,.1f}")]
    found = facts.measured
    if found is None:
        said = "\nPerplexity and divergence were not measured (`--eval_data off`).\n"
    else:
        rows.append(("perplexity", f"{found.perplexity_source:.3f}", f"{found.perplexity_quantized:.3f}"))
        rows.append(("KL divergence to the source, nats a token", "0", f"{found.kl:.5f}"))
        rows.append(("same likeliest token", "100 %", f"{100 * found.agreement:.2f} %"))
        data = facts.config.eval_data
        text = "the short neutral text that ships with llm-quantize" if data == "auto" else f"`{_data(data)}`"
        said = f"\nOver {found.tokens:,} tokens of {text}, computed from the files of this checkpoint.\n"
    return (
        "| | source | this |\n|---|---|---|\n" + "".join(f"| {a} | {b} | {c} |\n" for a, b, c in rows) + said
    )


def _use(facts: Facts, name: str) -> str:
    config, parts = facts.config, []
    refused = config.not_served
    if refused is None:
        flag = "" if config.file_layout == "compressed-tensors" else f" --quantization {config.file_layout}"
        parts.append(
            f"```\n./run_vllm.sh ./{shlex.quote(name)}{flag}\n```\n"
            "serves it with vLLM (the script comes with llm-quantize; `vllm serve` takes it too).\n"
        )
    else:
        parts.append("vLLM does not serve it: see the warnings below.\n")
    needs = {"awq": "gptqmodel", "gptq": "gptqmodel and optimum"}.get(config.file_layout, config.file_layout)
    asymmetric = config.file_layout == "compressed-tensors" and not config.symmetric
    extra = ", CompressedTensorsConfig" if asymmetric else ""
    argument = ", quantization_config=CompressedTensorsConfig(dequantize=True)" if asymmetric else ""
    lines = [
        f"# transformers, with {needs}",
        f"from transformers import AutoModelForCausalLM{extra}",
        f'model = AutoModelForCausalLM.from_pretrained("./{name}", device_map="auto"{argument})',
    ]
    if config.file_layout == "awq":
        lines += [
            "# AutoAWQ",
            "from awq import AutoAWQForCausalLM",
            f'model = AutoAWQForCausalLM.from_quantized("./{name}", fuse_layers=False)',
        ]
    elif config.file_layout == "gptq" and (config.layout == "gptq" or not facts.tied):
        lines += [
            "# AutoGPTQ",
            "from auto_gptq import AutoGPTQForCausalLM",
            f'model = AutoGPTQForCausalLM.from_quantized("./{name}", device="cuda:0")',
        ]
    parts.append("```python\n" + "\n".join(lines) + "\n```\n")
    return "".join(parts)


def _made(facts: Facts, report: dict[str, Any]) -> str:
    calibration = report["calibration"]
    own = facts.config.embedded and facts.config.calibration.data == str(EMBEDDED_CALIBRATION)
    text = "the text that comes with the model" if own else f"`{calibration['data']}`"
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    effort = ""
    if report["damping"] is not None:
        effort = f"- Damping {report['damping']:g} of the second moment's mean diagonal"
        effort += f"; effort `{report['quality']}`.\n" if report["quality"] is not None else ".\n"
    return (
        f"```\n{report['command']}\n```\n"
        f"- Calibration: {calibration['windows']} x {calibration['window_tokens']} = "
        f"{calibration['tokens']:,} tokens from {text}, seed {calibration['seed']}; SHA-256 of the tokens "
        f"`{calibration['sha256']}`.\n"
        f"{effort}- Versions: {versions}.\n"
        f"- All of it{', and every layer' if facts.layers else ''}: [{REPORT}]({REPORT}).\n"
    )


def _layers(facts: Facts, plotted: bool) -> str:
    worst = sorted(facts.layers, key=lambda each: -each.error)[:WORST]
    table = "| worst layers | relative output error |\n|---|---|\n" + "".join(
        f"| `{each.name}` | {each.error:.2e} |\n" for each in worst
    )
    return table + (f"\n![relative output error of every layer]({PLOT})\n" if plotted else "")


# -- the plot


def plot(layers: list[LayerReport]) -> bytes | None:
    """A PNG of the layers' errors by block; None where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    kinds: dict[str, list[tuple[int, float]]] = {}
    for position, each in enumerate(layers):
        parts = each.name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        kind = ".".join(parts[number + 1 :]) if number is not None else each.name
        kinds.setdefault(kind, []).append(
            (int(parts[number]) if number is not None else position, each.error)
        )
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for kind, points in sorted(kinds.items()):
        blocks, errors = zip(*sorted(points), strict=True)
        shown = [max(error, 1e-12) for error in errors]  # a logarithm has no place for zero
        axes.plot(blocks, shown, marker="o", markersize=3, linewidth=1, label=kind)
    axes.set_yscale("log")
    axes.set_xlabel("block")
    axes.set_ylabel("relative squared output error")
    axes.grid(visible=True, which="both", linewidth=0.3)
    if len(kinds) <= KINDS:
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
