"""The libraries that can do the quantizing in place of this program: what each can do. Facts alone, nothing heavy.

From the libraries' own sources at the versions named. `scripts/` holds the script that runs each, with its pins.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from llm_quantize.errors import InputError
from llm_quantize.types import METHODS, WHOLE_ROW, Method, Quality, QuantScheme

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
_GPTQMODEL_GROUPS: dict[Method, tuple[int, ...]] = {
    "awq": (WHOLE_ROW, 32, 64, 128),
    "gptq": (WHOLE_ROW, 32, 64, 128, 256, 512, 1024),
}


@dataclass(frozen=True, slots=True)
class Library:
    """One library.

    name, version, distribution: of it. script: that runs it. bits: that it writes, by method. groups: sizes that it
    takes, by method, where it does not take every one. symmetric: what it has for AWQ. families: model types, where it
    lists them and no longer changes. unreadable: types whose file no other program reads. old_reader: its transformers
    is version 4. float16: it loads weights in that, whatever they are. output_multiple: of which outputs must be a
    multiple. marks_order: it marks static groups in activation order as `desc_act` in its files. format: of its files,
    where that is not the method's name.
    """

    name: str
    version: str
    distribution: str
    script: str
    bits: dict[Method, tuple[int, ...]]
    groups: dict[Method, tuple[int, ...]] = field(default_factory=dict)
    symmetric: tuple[bool, ...] = (False, True)
    families: frozenset[str] | None = None
    unreadable: frozenset[str] = frozenset()
    old_reader: bool = False
    float16: bool = False
    output_multiple: int = 1
    marks_order: bool = False
    format: str | None = None

    def format_name(self, method: Method) -> str:
        """The format of its files."""
        return self.format or method

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
        output_multiple=64,
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
        output_multiple=32,
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


def choices(method: Method) -> tuple[str, ...]:
    """What `--backend` takes for a method."""
    return (NATIVE, *(key for key, library in LIBRARIES.items() if method in library.bits))


def check_request(
    backend: str,
    method: Method,
    scheme: QuantScheme,
    *,
    format_name: str | None,
    quality: Quality,
    limited_memory: bool,
    damping: float,
) -> None:
    """Refuse what the library cannot do. What it has no counterpart for is refused too, where it was asked for.

    format_name: as given by name, None for `auto`. limited_memory: whether `--max_memory` was given. Raises InputError,
    one line with the remedy.
    """
    title = METHODS[method]
    if backend not in choices(method):
        raise InputError(f"--backend {backend}: {title} takes {', '.join(choices(method))}")
    if backend == NATIVE:
        return
    library = LIBRARIES[backend]
    leave = "leave it out, or take --backend native"
    if scheme.bits not in library.bits[method]:
        held = ", ".join(map(str, library.bits[method]))
        raise InputError(
            f"--bits {scheme.bits}: {library.title} writes {title} at {held} bits; take --backend native"
        )
    groups = library.groups.get(method)
    if groups is not None and scheme.group_size not in groups:
        listed = ", ".join(map(str, groups))
        raise InputError(f"--group_size {scheme.group_size}: {library.title} takes {listed}")
    if backend == "autoawq" and scheme.group_size == WHOLE_ROW:
        raise InputError(f"--group_size -1: {library.title} takes groups alone, such as 128")
    if method == "awq" and scheme.symmetric not in library.symmetric:
        raise InputError(f"--zero_point false: {library.title} cannot write symmetric groups; {leave}")
    if format_name not in (None, library.format_name(method)):
        raise InputError(
            f"--format {format_name}: {library.title} writes {library.format_name(method)}; {leave}"
        )
    if quality != "default":
        raise InputError(f"--quality {quality}: the search of {library.title} has no such choice; {leave}")
    if limited_memory:
        raise InputError(f"--max_memory: {library.title} cannot be kept under a limit; {leave}")
    if method == "gptq" and not 0 < damping < 1:
        raise InputError(f"--damp_percent {damping:g}: {library.title} takes more than 0 and less than 1")


def check_model(backend: str, model_type: str, outputs: dict[str, int]) -> None:
    """Refuse a model that the library cannot do. outputs: of each linear, by name. Raises InputError."""
    library = LIBRARIES[backend]
    unlisted = library.families is not None and model_type not in library.families
    if unlisted or model_type in library.unreadable:
        raise InputError(f"{library.title} does not take models of type {model_type}: take --backend native")
    for name, width in outputs.items():
        if width % library.output_multiple:
            raise InputError(
                f"{name} has {width} outputs, and {library.title} needs a multiple of {library.output_multiple}: "
                "take --backend native"
            )


def vllm_refusal(backend: str, group_size: int) -> str | None:
    """Why vLLM refuses the library's GPTQ files in activation order, in one line; None where it takes them."""
    if backend == NATIVE or group_size == WHOLE_ROW or not LIBRARIES[backend].marks_order:
        return None
    return (
        f"{LIBRARIES[backend].title} marks activation order in its files as vLLM 0.30 and later refuse it in groups: "
        "take --desc_act false to serve it there"
    )
