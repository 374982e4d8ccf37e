"""What is said of a published checkpoint, beside its weights: model card, report, and a plot of the layers' errors.

Nothing here says when, where or on which machine it was made: the same run gives the same bytes. A hub id is named in
full, a local path by its last part. The source's own README.md is kept as BASE_README.md, unchanged.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from llm_quantize.blockwise.layer_report import LayerReport
from llm_quantize.calibration.windows import Windows
from llm_quantize.evaluation.error_plot import plot_errors
from llm_quantize.evaluation.front_matter import read_front_matter
from llm_quantize.evaluation.perplexity import Measured
from llm_quantize.formats.base import CheckpointFormat
from llm_quantize.io.escaping import markdown_code, markdown_text, shell_word, yaml_value
from llm_quantize.io.json_text import as_json
from llm_quantize.types import METHODS, WHOLE_ROW, Method, QuantScheme
from llm_quantize.version import __version__

CARD = "README.md"
BASE_CARD = "BASE_README.md"
REPORT = "quantization_report.json"
PLOT = "quantization_error.png"
OWN = (CARD, BASE_CARD, REPORT, PLOT)  # never copied from a source

SCHEMA = 2  # of the report
WORST = 8  # layers in the card's table
LICENSE_KEYS = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True, slots=True)
class CardFacts:
    """All that is said of a checkpoint. Names are as others may see them.

    base_model: without its revision. on_hub: whether that is a hub id. command: that makes it again.
    base_card: the beginning of the source's card, which holds its front matter; None where it has none.
    source_bytes, quantized_bytes: of the files of weights. architecture: the model's class.
    repeats_head: whether the file holds a tied output head twice, or the model has none.
    backend, library, library_versions: what did the work; the last two are None where this program did.
    quality, damping: of this program's work. vllm_refusal: why vLLM refuses it.
    windows, calibration_data, seed: the calibration text. own_calibration_text: whether it is the embedded model's own.
    eval_data: the held-out text; `auto` for the one that ships with the program. heldout_sha256: of its tokens.
    on_calibration_text: whether it is the calibration text. layers: in the order in which they were quantized.
    """

    method: Method
    scheme: QuantScheme
    format: CheckpointFormat
    base_model: str
    on_hub: bool
    command: str
    base_card: bytes | None
    source_bytes: int
    quantized_bytes: int
    architecture: str
    repeats_head: bool
    backend: str
    library: str | None
    library_versions: dict[str, str] | None
    quality: str
    damping: float
    vllm_refusal: str | None
    windows: Windows
    calibration_data: str
    own_calibration_text: bool
    seed: int
    eval_data: str
    heldout_sha256: str | None
    on_calibration_text: bool
    layers: list[LayerReport]
    measured: Measured | None

    @property
    def title(self) -> str:
        """What the checkpoint is called; the directory that it is published in has no part in it."""
        return f"{self.base_model.rpartition('/')[2]}-{self.method}-{self.scheme.bits}bit"


def card_files(facts: CardFacts) -> dict[str, bytes]:
    """Those of `OWN` that there are, by name, but for `BASE_CARD`, which is copied with the source's other files."""
    report = _report(facts)
    found = {REPORT: as_json(report).encode()}
    picture = plot_errors(facts.layers) if facts.layers else None
    if picture is not None:
        found[PLOT] = picture
    text = "".join(_card(facts, report, picture is not None))
    return found | {CARD: text.encode()}


# -- the report


def _report(facts: CardFacts) -> dict[str, Any]:
    scheme, native = facts.scheme, facts.library is None
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "base_model": facts.base_model,
        "architecture": facts.architecture,
        "method": facts.method,
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "symmetric": scheme.symmetric,
        "format": facts.format.name,
        "backend": facts.backend,
        "quality": facts.quality if native else None,
        "damping": facts.damping if native or facts.method == "gptq" else None,
        "command": facts.command,
        "versions": _versions(facts),
        "calibration": {
            "data": facts.calibration_data,
            "windows": facts.windows.tokens.shape[0],
            "window_tokens": facts.windows.tokens.shape[1],
            "tokens": facts.windows.tokens.numel(),
            "documents": facts.windows.documents,
            "seed": facts.seed,
            "sha256": facts.windows.fingerprint,
        },
        "bytes": {"source": facts.source_bytes, "quantized": facts.quantized_bytes},
        "measured": None,
        "warnings": list(_warnings(facts)),
        "layers": [layer_row(each) for each in facts.layers],
    }
    if facts.measured is not None:
        report["measured"] = {
            "data": facts.eval_data,
            "sha256": facts.heldout_sha256,
            **asdict(facts.measured),
        }
    return report


def layer_row(report: LayerReport) -> dict[str, Any]:
    """One layer as the report has it: all but the time, which no two runs share."""
    row = asdict(report)
    del row["seconds"]
    return row


def _versions(facts: CardFacts) -> dict[str, str]:
    own = {"llm-quantize": __version__}
    if facts.library_versions is not None:
        return {**own, **facts.library_versions}
    needed = ["torch", "transformers", *facts.format.written_by]
    return {**own, **{name: importlib.metadata.version(name) for name in needed}}


def _warnings(facts: CardFacts) -> Iterator[str]:
    for each in facts.layers:
        if each.fallback is not None:
            yield f"{each.name}: {each.fallback}"
        elif each.damping > facts.damping:
            yield f"{each.name}: damping raised to {each.damping:g} before the factorization succeeded"
    dead = [each for each in facts.layers if each.dead]
    if dead:
        most = max(dead, key=lambda each: each.dead)
        yield (
            f"{len(dead)} layers have input channels that calibration never reached; most, {most.dead}, has "
            f"{most.name}"
        )
    found = facts.windows.tokens.shape[0]
    if found < facts.windows.requested:
        yield f"the calibration text gave {found} of {facts.windows.requested} windows"
    if facts.vllm_refusal is not None:
        yield facts.vllm_refusal
    if facts.on_calibration_text:
        yield "measured on the data that it was calibrated on: on text never seen it may be worse"


# -- the card


def _card(facts: CardFacts, report: dict[str, Any], plotted: bool) -> Iterator[str]:
    scheme, base = facts.scheme, facts.base_model
    yield "---\n"
    for key, value in _metadata(facts).items():
        yield f"{key}: {yaml_value(value)}\n"
    yield "---\n"
    yield f"# {markdown_text(facts.title)}\n\n"
    linked = f"[{base}](https://huggingface.co/{base})" if facts.on_hub else markdown_code(base)
    group = "whole rows" if scheme.group_size == WHOLE_ROW else f"groups of {scheme.group_size}"
    kind = "symmetric" if scheme.symmetric else "asymmetric"
    work = "" if facts.library is None else f" with {facts.library}"
    yield (
        f"{linked} ({markdown_text(facts.architecture)}) quantized to {scheme.bits} bits by "
        f"{METHODS[facts.method]}{work}: {kind}, {group}, in {facts.format.title}.\n"
    )
    if facts.base_card is not None:
        yield f"What its authors say of the model is in [{BASE_CARD}]({BASE_CARD}), unchanged.\n"
    yield "\n## Measured\n" + _measured(facts, report)
    yield "\n## Use\n" + _use(facts)
    yield "\n## How it was made\n" + _made(facts, report)
    if facts.layers:
        yield "\n## Layers\n" + _layers(facts, plotted)
    if report["warnings"]:
        yield "\n## Warnings\n" + "".join(f"- {markdown_text(line)}\n" for line in report["warnings"])


def _metadata(facts: CardFacts) -> dict[str, Any]:
    own = read_front_matter(facts.base_card or b"", LICENSE_KEYS)
    tags = [facts.method, facts.format.name, f"{facts.scheme.bits}-bit", "quantized"]
    if facts.vllm_refusal is None:
        tags.append("vllm")
    return {
        "base_model": facts.base_model,
        "base_model_relation": "quantized",
        "quantized_by": facts.library or "llm-quantize",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **{key: own[key] for key in LICENSE_KEYS if _plain(own.get(key))},
        "tags": list(dict.fromkeys(tags)),
    }


def _plain(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(x, str) for x in value))


def _measured(facts: CardFacts, report: dict[str, Any]) -> str:
    sizes = report["bytes"]
    rows = [("weights, MiB", f"{sizes['source'] / 2**20:,.1f}", f"{sizes['quantized'] / 2**20:,.1f}")]
    found = facts.measured
    if found is None:
        said = "\nPerplexity and divergence were not measured (`--eval_data off`).\n"
    else:
        rows.append(("perplexity", f"{found.perplexity_source:.3f}", f"{found.perplexity_quantized:.3f}"))
        rows.append(("KL divergence to the source, nats a token", "0", f"{found.kl:.5f}"))
        rows.append(("same likeliest token", "100 %", f"{100 * found.agreement:.2f} %"))
        shipped = facts.eval_data == "auto"
        text = (
            "the short neutral text that ships with llm-quantize"
            if shipped
            else markdown_code(facts.eval_data)
        )
        said = f"\nOver {found.tokens:,} tokens of {text}, computed from the files of this checkpoint.\n"
    return (
        "| | source | this |\n|---|---|---|\n" + "".join(f"| {a} | {b} | {c} |\n" for a, b, c in rows) + said
    )


def _use(facts: CardFacts) -> str:
    parts = []
    if facts.vllm_refusal is None:
        parts.append(
            f"```\n./run_vllm.sh ./{shell_word(facts.title)}{facts.format.serve_flag}\n```\n"
            "serves it with vLLM (the script comes with llm-quantize; `vllm serve` takes it too).\n"
        )
    else:
        parts.append("vLLM does not serve it: see the warnings below.\n")
    lines = facts.format.loading_code(
        f"./{facts.title}", symmetric=facts.scheme.symmetric, whole=facts.repeats_head
    )
    parts.append("```python\n" + "\n".join(lines) + "\n```\n")
    return "".join(parts)


def _made(facts: CardFacts, report: dict[str, Any]) -> str:
    calibration = report["calibration"]
    text = (
        "the text that comes with the model"
        if facts.own_calibration_text
        else markdown_code(calibration["data"])
    )
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    solving = ""
    if report["damping"] is not None:
        solving = f"- Damping {report['damping']:g} of the Hessian's mean diagonal"
        solving += f"; quality `{report['quality']}`.\n" if report["quality"] is not None else ".\n"
    return (
        f"```\n{report['command']}\n```\n"
        f"- Calibration: {calibration['windows']} x {calibration['window_tokens']} = "
        f"{calibration['tokens']:,} tokens from {text}, seed {calibration['seed']}; SHA-256 of the tokens "
        f"`{calibration['sha256']}`.\n"
        f"{solving}- Versions: {versions}.\n"
        f"- All of it{', and every layer' if facts.layers else ''}: [{REPORT}]({REPORT}).\n"
    )


def _layers(facts: CardFacts, plotted: bool) -> str:
    worst = sorted(facts.layers, key=lambda each: -each.error)[:WORST]
    table = "| worst layers | relative output error |\n|---|---|\n" + "".join(
        f"| {_in_table(markdown_code(each.name))} | {each.error:.2e} |\n" for each in worst
    )
    return table + (f"\n![relative output error of every layer]({PLOT})\n" if plotted else "")


def _in_table(text: str) -> str:
    return text.replace("|", "\\|")
