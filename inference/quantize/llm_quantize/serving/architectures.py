"""Which model classes vLLM can build, by the name in config.json.

The names are in `architectures.txt`; vLLM looks for a class in its own registry and then in transformers. Source:
`_ModelRegistry.inspect_model_cls` in vLLM's `model_executor/models/registry.py`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from llm_quantize.serving.refusal import Refusal

NAMES = Path(__file__).with_name("architectures.txt")
# vLLM takes a class for several tasks, so that the ending does not tell whether it has one.
ENDING = re.compile(r"(?<=.)(?:For[A-Z]\w*|LMHeadModel|DoubleHeadsModel|Model)$")


def check_architecture(config: dict[str, Any]) -> None:
    """Refuse a model's `config` that names only classes that neither vLLM nor transformers has. Raises `Refusal`.

    A config without names is left to vLLM, and one with code of its own (`auto_map`).
    """
    named = config.get("architectures")
    if not named or config.get("auto_map"):
        return
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise Refusal(
            "architectures in config.json is no list of names: copy or download the checkpoint again"
        )
    known = known_architectures()
    if not any(ENDING.sub("", name) in known for name in named):
        raise Refusal(
            f"config.json names the architecture {named[0][:80]}, which neither vLLM nor transformers has: correct it, "
            "or add --model-impl auto where your vLLM has it"
        )


def known_architectures() -> frozenset[str]:
    """Return the names of all known classes without their endings."""
    lines = NAMES.read_text(encoding="ascii").splitlines()
    return frozenset(name for line in lines if not line.startswith("#") for name in line.split())
