"""Names on disk of what the module tree names otherwise."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from llm_quantize.errors import InputError

HEAD_NAMES = ("lm_head", "embed_out")  # of one and the same output head, by version of transformers


class TensorNames:
    """The names under which a checkpoint stores the parameters of a skeleton.

    stored: the names in the checkpoint. probe: a parameter that must be among them.
    Raises InputError where the checkpoint is of another model.
    """

    def __init__(self, skeleton: Any, config: Any, stored: Collection[str], probe: str) -> None:
        self._stored = stored
        self._prefixes = _prefixes(skeleton, stored, probe)
        self._tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
        names = {id(module): name for name, module in skeleton.named_modules()}
        head = skeleton.get_output_embeddings()
        self.head = None if head is None else names[id(head)]  # in the module tree
        self.embedding = names[id(skeleton.get_input_embeddings())]

    def of(self, name: str) -> str:
        """The checkpoint's name for a parameter or module of the skeleton; ties are not looked at."""
        if self._prefixes is None:
            return name
        old, new = self._prefixes
        return new + name[len(old) :] if name.startswith(old) else name

    def of_parameter(self, parameter: str) -> str:
        """The name of the tensor that holds a parameter.

        A tied output head is the input embedding, and transformers renames others while loading (GPT-NeoX). Raises
        InputError for an output head that is nowhere.
        """
        stored = self.of(parameter)
        if stored in self._stored or self.head is None or not parameter.startswith(f"{self.head}."):
            return stored
        leaf = parameter.removeprefix(f"{self.head}.")
        for other in HEAD_NAMES:
            if f"{other}.{leaf}" in self._stored:
                return f"{other}.{leaf}"
        if leaf == "weight" and self._tied:
            return self.of(f"{self.embedding}.weight")
        raise InputError(
            f"the checkpoint has no {parameter}, and its config does not tie it to the embedding"
        )

    @property
    def tied_head(self) -> tuple[str, str] | None:
        """The output head's weight, and the stored tensor to which it is tied; None where it is not."""
        if self.head is None:
            return None
        weight = f"{self.head}.weight"
        tensor = self.of_parameter(weight)
        return (weight, tensor) if tensor == self.of(f"{self.embedding}.weight") else None


def _prefixes(skeleton: Any, stored: Collection[str], probe: str) -> tuple[str, str] | None:
    """The prefix of the base model in the module tree and in the checkpoint, where they differ."""
    if probe in stored:
        return None
    base = f"{getattr(skeleton, 'base_model_prefix', 'model')}."
    tail = probe.removeprefix(base)
    candidates = [name for name in stored if name.endswith(tail)]
    if len(candidates) == 1:
        return base, candidates[0][: -len(tail)]
    raise InputError(f"the weights do not match the config: no tensor {probe} in the checkpoint")
