"""The libraries that can do the quantizing in place of this project: what each can do. Facts alone, nothing heavy.

From the libraries' own sources at the versions named; `backends/` holds the script that runs each, with its pins.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llm_quantize.errors import InputError

if TYPE_CHECKING:
    from llm_quantize.config import Layout, Method, QuantizeConfig

NATIVE = "native"

# Model types that AutoAWQ 0.2.9 and AutoGPTQ 0.7.1 list, but for mixtures of experts and models of more than text,
# which this program does not open, and those that AutoAWQ gives a scaled activation, which its own code alone reads.
# Both are archived: no other type will come.
_BOTH = {"Yi", "baichuan", "gemma", "llama", "mistral", "opt", "qwen", "qwen2"}
_AUTOAWQ = {
    "aquila",
    "cohere",
    "exaone",
    "gemma2",
    "minicpm",
    "minicpm3",
    "phi3",
    "qwen3",
    "stablelm",
    *_BOTH,
}
_AUTOGPTQ = {
    "RefinedWeb",
    "RefinedWebModel",
    "bloom",
    "codegen",
    "deci",
    "falcon",
    "gpt2",
    "gpt_bigcode",
    "gpt_neox",
}
_AUTOGPTQ |= {"gptj", "internlm", "longllama", "moss", "stablelm_epoch", "xverse", *_BOTH}
_GPTQMODEL_GROUPS = {"awq": (-1, 32, 64, 128), "gptq": (-1, 32, 64, 128, 256, 512, 1024)}


@dataclass(frozen=True, slots=True)
class Library:
    """One library. `bits` by method; `groups` by method, where it does not take every one; `symmetric`: the grids it
    has for AWQ; `families`: model types, where it lists them and is no longer changed;
    `unreadable`: those whose file no other program reads; `old_reader`: its transformers
    is version 4; `float16`: it loads weights in that, whatever they are; `widths`: what outputs must be a multiple of;
    `marks_order`: static groups in activation order are marked `desc_act` in its files."""

    name: str
    version: str
    distribution: str
    script: str
    bits: dict[str, tuple[int, ...]]
    groups: dict[str, tuple[int, ...]] = field(default_factory=dict)
    symmetric: tuple[bool, ...] = (False, True)
    families: frozenset[str] | None = None
    unreadable: frozenset[str] = frozenset()
    old_reader: bool = False
    float16: bool = False
    widths: int = 1
    marks_order: bool = False
    layout: Layout | None = None

    def writes(self, method: Method) -> Layout:
        """The layout of its files: `layout`, or else the one that has the method's name."""
        return self.layout or method

    @property
    def title(self) -> str:
        """Name and version."""
        return f"{self.name} {self.version}"


LIBRARIES: dict[str, Library] = {
    "autoawq": Library(
        "AutoAWQ",
        "0.2.9",
        "autoawq",
        "run_autoawq.py",
        {"awq": (4,)},
        symmetric=(False,),
        families=frozenset(_AUTOAWQ),
        old_reader=True,
        float16=True,
        widths=64,
    ),
    "auto-gptq": Library(
        "AutoGPTQ",
        "0.7.1",
        "auto-gptq",
        "run_autogptq.py",
        {"gptq": (2, 3, 4, 8)},
        families=frozenset(_AUTOGPTQ),
        old_reader=True,
        float16=True,
        widths=32,
        marks_order=True,
    ),
    "optimum": Library(
        "Optimum", "2.3.0", "optimum", "run_optimum.py", {"gptq": (2, 3, 4, 8)}, groups=_GPTQMODEL_GROUPS
    ),
    "gptqmodel": Library(
        "GPTQModel",
        "7.7.0",
        "gptqmodel",
        "run_gptqmodel.py",
        {"awq": (4,), "gptq": (2, 3, 4, 8)},
        groups=_GPTQMODEL_GROUPS,
        unreadable=frozenset({"phi3"}),  # written with gate_up_proj taken apart
    ),
}


def choices(method: str) -> tuple[str, ...]:
    """What `--backend` takes for a method."""
    return (NATIVE, *(key for key, library in LIBRARIES.items() if method in library.bits))


def check(config: QuantizeConfig) -> None:
    """Refuses what the library that `config.backend` names cannot do. Raises InputError, one line with the remedy.

    What it has no counterpart for is refused too, where it was asked for: nothing is left out in silence.
    """
    if config.backend not in choices(config.method):
        taken = ", ".join(choices(config.method))
        raise InputError(f"--backend {config.backend}: {config.method.upper()} takes {taken}")
    if config.backend == NATIVE:
        return
    library = LIBRARIES[config.backend]
    leave = "leave it out, or take --backend native"
    if config.bits not in library.bits[config.method]:
        held = ", ".join(map(str, library.bits[config.method]))
        raise InputError(
            f"--bits {config.bits}: {library.title} writes {config.method.upper()} at {held} bits; "
            "take --backend native"
        )
    groups = library.groups.get(config.method)
    if groups is not None and config.group_size not in groups:
        listed = ", ".join(map(str, groups))
        raise InputError(f"--group_size {config.group_size}: {library.title} takes {listed}")
    if config.backend == "autoawq" and config.group_size == -1:
        raise InputError(f"--group_size -1: {library.title} takes groups alone, such as 128")
    if config.method == "awq" and config.symmetric not in library.symmetric:
        raise InputError(f"--zero_point false: {library.title} cannot write a symmetric grid; {leave}")
    if config.layout not in ("auto", library.writes(config.method)):
        raise InputError(
            f"--format {config.layout}: {library.title} writes {library.writes(config.method)}; {leave}"
        )
    if config.quality != "default":
        raise InputError(
            f"--quality {config.quality}: the search of {library.title} has no such choice; {leave}"
        )
    if config.max_memory is not None:
        raise InputError(f"--max_memory: {library.title} cannot be kept under a limit; {leave}")
    if config.method == "gptq" and not 0 < config.damp_percent < 1:
        raise InputError(
            f"--damp_percent {config.damp_percent:g}: {library.title} takes more than 0 and less than 1"
        )


def check_model(backend: str, model_type: str, outputs: dict[str, int]) -> None:
    """The same for a model: its type, and how many outputs each linear has, by name. Raises InputError."""
    library = LIBRARIES[backend]
    unlisted = library.families is not None and model_type not in library.families
    if unlisted or model_type in library.unreadable:
        raise InputError(f"{library.title} does not take models of type {model_type}: take --backend native")
    for name, width in outputs.items():
        if width % library.widths:
            raise InputError(
                f"{name} has {width} outputs, and {library.title} needs a multiple of {library.widths}: "
                "take --backend native"
            )


def not_served(config: QuantizeConfig) -> str | None:
    """Why vLLM refuses what the library writes where it would take this project's file; one line."""
    if config.backend == NATIVE or config.method != "gptq" or config.group_size == -1 or not config.desc_act:
        return None
    library = LIBRARIES[config.backend]
    if library.marks_order:
        return (
            f"{library.title} marks activation order in its files as vLLM 0.30 and later refuse it in groups: "
            "take --desc_act false to serve it there"
        )
    return None
