"""What lies beside the weights: tokenizer, generation config, templates, code, licence."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Self

from llm_quantize.errors import InputError
from llm_quantize.io.untrusted import LARGEST_JSON, paths_of_this_machine, read_limited, without_paths
from llm_quantize.model.weight_files import WEIGHT_SUFFIXES, Scratch


class SideFiles:
    """The side files of a model's directory, as they may be published: without paths of this machine.

    A context manager: the copies that `list` makes are removed at its end.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._cleaned: Scratch | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleaned = None

    def list(self) -> list[Path]:
        """Every file of the directory but weights, config.json and hidden files.

        Pickles stay behind, too, since they can hold code. A JSON file that names paths of this machine (trainers and
        tokenizers write theirs) is replaced by a copy that does not.
        """
        found = []
        for path in sorted(self._directory.iterdir()):
            if (
                path.suffix in WEIGHT_SUFFIXES
                or path.name.endswith(".index.json")
                or path.name.startswith(".")
            ):
                continue
            if path.name == "config.json" or not path.is_file():
                continue
            found.append(self._without_paths(path) if path.suffix == ".json" else path)
        return found

    def _without_paths(self, path: Path) -> Path:
        paths = paths_of_this_machine(self._directory)
        try:
            data = read_limited(path, LARGEST_JSON)
            if not any(each.encode() in data for each in paths):
                return path
            cleaned = without_paths(json.loads(data), paths)
        except (OSError, ValueError, RecursionError, InputError):
            return path  # no JSON after all, or none that anybody reads
        if self._cleaned is None:
            self._cleaned = Scratch()
        copy = self._cleaned.path / path.name
        copy.write_text(json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return copy
