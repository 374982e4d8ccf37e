"""The user's arguments for `vllm serve`, read as vLLM's parser reads them, and the file that `--config` names.

Knows how vLLM spells options, and nothing of checkpoints. Source: `FlexibleArgumentParser` in vLLM's
`utils/argparse_utils.py`, which is Python's argparse with more: underscores count as dashes, `--option.key value` sets
a key of an option's JSON, and the words of a `--config FILE` stand before the user's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# The options that matter here, each with the short form that vLLM gives it.
HOST = "--host"
UDS = "--uds"
MODEL = "--model"
API_KEY = "--api-key"
QUANTIZATION = "--quantization"
DTYPE = "--dtype"
TENSOR_PARALLEL_SIZE = "--tensor-parallel-size"
EXPERT_PARALLEL = "--enable-expert-parallel"
LOAD_FORMAT = "--load-format"
CONFIG_FORMAT = "--config-format"
CONFIG = "--config"
HF_OVERRIDES = "--hf-overrides"
HF_CONFIG_PATH = "--hf-config-path"
MODEL_IMPLEMENTATION = "--model-impl"
# Options with which a user chooses how vLLM compiles the model.
COMPILATION = ("--enforce-eager", "--no-enforce-eager", "--optimization-level", "--compilation-config")
SHORT_FORMS = {
    "-q": QUANTIZATION,
    "-tp": TENSOR_PARALLEL_SIZE,
    "-ep": EXPERT_PARALLEL,
    "-O": "--optimization-level",
    "-cc": "--compilation-config",
}
OPTIONS = (
    *(HOST, UDS, MODEL, API_KEY, QUANTIZATION, DTYPE, TENSOR_PARALLEL_SIZE, EXPERT_PARALLEL, LOAD_FORMAT),
    *(CONFIG_FORMAT, CONFIG, HF_OVERRIDES, HF_CONFIG_PATH, *COMPILATION),
    MODEL_IMPLEMENTATION,
    "--quantization-config",  # named here since it is none of the others, which it begins with
)
MAX_CONFIG_FILE_BYTES = 1 << 20


@dataclass(frozen=True)
class GivenOption:
    """An option among the words: its full name, and the positions of its word and of its value in a word of its own.

    `value` is None where vLLM would miss one; `value_index` is None where the value is part of the option's word, as
    in `--name=value`, or there is none.
    """

    name: str
    index: int
    value: str | None
    value_index: int | None


@dataclass
class VllmArguments:
    """The arguments that follow the model.

    `words` go to vLLM as they are, but for options that are set here. `config_file` maps full option names to their
    values in the file that `--config` names; as in vLLM, `words` win over the file. It is None for a file that cannot
    be understood here, which is left to vLLM.
    """

    words: list[str]
    config_file: dict[str, str] | None = field(default_factory=dict)

    def given(self, *names: str) -> list[GivenOption]:
        """Return where one of the options `names` is given in `words`, in their order."""
        return [option for option in given_options(self.words) if option.name in names]

    def last_word(self, name: str) -> str | None:
        """Return the last value of option `name` in `words`, whatever the config file says; None without any."""
        values = [option.value for option in self.given(name) if option.value is not None]
        return values[-1] if values else None

    def last_value(self, name: str) -> str | None:
        """Return the value with which vLLM takes option `name`: the last one in `words`, else the config file's."""
        value = self.last_word(name)
        return value if value is not None else (self.config_file or {}).get(name)

    def has(self, *names: str) -> bool:
        """Tell whether one of the options `names` is given, in `words` or in the config file."""
        return bool(self.given(*names)) or any(name in (self.config_file or {}) for name in names)

    def set_value(self, name: str, value: str) -> None:
        """Set option `name` in `words` to `value` wherever it is given there; append it where it is not."""
        found = self.given(name)
        if not found:
            self.append(name, value)
        for option in found:
            word = self.words[option.index]
            if option.value_index is not None:
                self.words[option.value_index] = value
            elif "=" in word:
                self.words[option.index] = f"{word.split('=', 1)[0]}={value}"
            elif option.value is not None:  # `-qgptq`
                self.words[option.index] = word[: len(word) - len(option.value)] + value

    def spell_out(self, name: str) -> None:
        """Give option `name` its full name where it is abbreviated.

        Some versions of vLLM refuse an abbreviation that others take, since they have more options that begin so.
        """
        for option in self.given(name):
            word, sign, value = self.words[option.index].partition("=")
            if word.startswith("--") and word.replace("_", "-") != name:
                self.words[option.index] = name + sign + value

    def append(self, *words: str) -> None:
        """Append `words` where vLLM reads them as options, which a word `--` ends."""
        end = self.words.index("--") if "--" in self.words else len(self.words)
        self.words[end:end] = words


def given_options(words: Sequence[str]) -> Iterator[GivenOption]:
    """Yield the options of `OPTIONS` among `words` as vLLM's parser finds them."""
    skipped = -1
    for i, word in enumerate(words):
        if word == "--":
            return
        if i == skipped:
            continue
        found = named_option(word)
        if word == CONFIG:  # vLLM takes the next word for the file's name, whatever it is, and drops both
            skipped = i + 1
        if found is None:
            continue
        name, value = found
        index = None
        if value is None and i + 1 < len(words) and is_value(words[i + 1]):
            value, index = words[i + 1], i + 1
        yield GivenOption(name, i, value, index)


def named_option(word: str) -> tuple[str, str | None] | None:
    """Return the full name of the option that `word` gives, and the value that stands in the same word, if any.

    None where it gives none of `OPTIONS`. An abbreviation that fits several counts as the first of them: what vLLM
    does with it depends on its version, and it refuses it unless it fits one option.
    """
    spelled, sign, rest = word.partition("=")
    value = rest if sign else None
    # `--option.key value` sets a key of the option's JSON.
    spelled = spelled.split(".", 1)[0]
    if word.startswith("--"):
        spelled = spelled.replace("_", "-")
        if spelled in OPTIONS:
            return spelled, value
        found = (
            next((name for name in OPTIONS if name.startswith(spelled)), None) if len(spelled) > 3 else None
        )
        return (found, value) if found is not None else None
    if not word.startswith("-"):
        return None
    if spelled in SHORT_FORMS:
        return SHORT_FORMS[spelled], value
    if spelled == "-t":  # argparse abbreviates short names too
        return TENSOR_PARALLEL_SIZE, value
    # The value may follow the letter at once, as in -qgptq and -O3.
    for short in ("-q", "-O"):
        if word.startswith(short):
            return SHORT_FORMS[short], word[len(short) :]
    return None


def is_value(word: str) -> bool:
    """Tell whether argparse takes `word` for the value of the option before it, and not for the next option."""
    return (
        not word.startswith("-")
        or word == "-"
        or " " in word
        or re.fullmatch(r"-\d+|-\d*\.\d+", word) is not None
    )


def parse_arguments(words: Sequence[str]) -> VllmArguments:
    """Return `words` as arguments, with the settings of the file that vLLM reads as their `--config`.

    vLLM reads the file of `--config FILE` alone: it takes `--config=FILE` without a word and ignores it.
    """
    arguments = VllmArguments(list(words))
    options = arguments.words[: arguments.words.index("--")] if "--" in arguments.words else arguments.words
    if CONFIG in options[:-1]:
        arguments.config_file = read_config_file(options[options.index(CONFIG) + 1])
    return arguments


def ignored_config_files(arguments: VllmArguments) -> list[str]:
    """Return the words `--config=FILE`, which vLLM ignores."""
    return [arguments.words[option.index] for option in arguments.given(CONFIG) if option.value_index is None]


def read_config_file(path: str) -> dict[str, str] | None:
    """Return the settings of the YAML file `path` by full option names; None where it cannot be understood here.

    The standard library has no YAML parser, and the options that matter here have plain values: a file is understood
    where each line is empty, a comment, `key: value` with the value whole on that line, or indented below a key
    without a value. vLLM itself will report what is wrong with a file.
    """
    try:
        file = Path(path)
        if not file.is_file() or file.stat().st_size > MAX_CONFIG_FILE_BYTES:
            return None
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    if any(not c.isprintable() and c not in "\n\t" for c in text):  # YAML ends lines at other characters too
        return None
    settings: dict[str, str] = {}
    is_in_block = False
    for number, line in enumerate(text.split("\n")):
        if not line.strip() or line.lstrip().startswith("#") or (number == 0 and line.rstrip() == "---"):
            continue
        if is_in_block and NESTED_LINE.fullmatch(line):
            continue
        match = TOP_LINE.fullmatch(line)
        if match is None:
            return None
        name = "--" + match["key"]
        found = named_option(name)
        name = found[0] if found is not None else name
        if name in settings:
            return None
        value = match["value"] or ""
        is_in_block = not value
        settings[name] = value[1:-1] if value[:1] in ("'", '"') else value
    return settings


# A YAML value that is whole on its line: quoted, a flat list, or plain.
_VALUE = (
    r"""(?P<value>'[^']*'|"[^"\\]*"|\[[^\[\]{}'"#]*\]"""
    r"""|(?:-(?=\S)|[^\s|>&*!%@`'"\[\]{}#,?:-])(?:[^\s#:]|(?<=\S)#|:(?=\S)|[ \t](?![ \t]*(?:\#|$)))*)"""
)
_END = r"[ \t]*(?:(?<=[ \t])\#.*)?"
TOP_LINE = re.compile(rf"(?P<key>[A-Za-z][\w-]*)[ \t]*:(?:[ \t]+{_VALUE})?{_END}")
NESTED_LINE = re.compile(rf"(?:[ ]+|(?=-))(?:-[ \t]+)*(?:[\w.-]+:(?=\s|$))?[ \t]*(?:{_VALUE})?{_END}")
