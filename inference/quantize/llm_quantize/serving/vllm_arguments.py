"""The user's arguments for `vllm serve`, and the file that `--config` names.

Knows how vLLM spells options, and nothing of checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class VllmArguments:
    """The arguments that follow the model.

    `words` go to vLLM as they are, except for the value of `--quantization`. `config_file` maps option names without
    dashes in front to their values in the file that `--config` names; as in vLLM, `words` win over the file.
    """

    words: list[str]
    config_file: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def option_name(word: str) -> str:
        """Return the option that `word` names, with dashes for underscores as in vLLM; "" for a value."""
        if not word.startswith("-"):
            return ""
        return word.split("=", 1)[0].replace("_", "-")

    def last_value(self, *names: str) -> str | None:
        """Return the last value of any of the options `names`, given as `--name value` or `--name=value`.

        Without one in `words` it is that of the config file; None where neither has one.
        """
        found = None
        for i, word in enumerate(self.words):
            if self.option_name(word) in names:
                if "=" in word:
                    found = word.split("=", 1)[1]
                elif i + 1 < len(self.words):
                    found = self.words[i + 1]
        if found is None:
            found = next((self.config_file[n[2:]] for n in names if n[2:] in self.config_file), None)
        return found

    def has(self, *names: str) -> bool:
        """Tell whether one of the options `names` is given, in `words` or in the config file."""
        return any(self.option_name(word) in names for word in self.words) or any(
            n[2:] in self.config_file for n in names
        )

    def has_prefix(self, *prefixes: str) -> bool:
        """Tell whether an option is given whose name starts with one of `prefixes`, such as `-O` of `-O3`."""
        return any(self.option_name(word).startswith(prefixes) for word in self.words) or any(
            f"--{key}".startswith(prefixes) for key in self.config_file
        )

    def set_value(self, names: tuple[str, ...], value: str) -> None:
        """Set every one of the options `names` in `words` to `value`; append the first name where none is there."""
        is_set = False
        for i, word in enumerate(self.words):
            if self.option_name(word) in names:
                if "=" in word:
                    self.words[i] = word.split("=", 1)[0] + "=" + value
                elif i + 1 < len(self.words):
                    self.words[i + 1] = value
                is_set = True
        if not is_set:
            self.words += [names[0], value]


def parse_arguments(words: Sequence[str]) -> VllmArguments:
    """Return `words` as arguments, with the settings of the file that their `--config` names."""
    arguments = VllmArguments(list(words))
    path = arguments.last_value("--config")
    if path is not None:
        arguments.config_file = read_config_file(path)
    return arguments


def read_config_file(path: str) -> dict[str, str]:
    """Return the plain `key: value` lines at the top level of the YAML file `path`, with dashes in the keys.

    The options that matter here have plain values, and the standard library has no YAML parser. A file that cannot
    be read gives no settings: vLLM itself will report what is wrong with it.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    settings = {}
    for line in text.splitlines():
        match = re.match(r"([A-Za-z][\w-]*)\s*:\s*(.*?)\s*(?:\s#.*)?$", line)
        if match:
            settings[match[1].replace("_", "-")] = match[2].strip("'\"")
    return settings
