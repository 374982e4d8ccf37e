#!/usr/bin/env python3
"""Write docs/options.md from the options that the two scripts declare.

python tools/options_page.py            writes the page
python tools/options_page.py --check    exit code 1 where the page is stale
"""

from __future__ import annotations

import sys
from dataclasses import Field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "inference" / "quantize"))

from llm_quantize import cli
from llm_quantize.options import Option, for_method
from llm_quantize.types import METHODS, Method

PAGE = Path(__file__).resolve().parents[1] / "docs" / "options.md"
HEAD = """\
# Options

`awq_quantize.py` and `gptq_quantize.py` share most options; "script" says which of them has an option. Where their
defaults differ, AWQ's comes first. `uv run python inference/quantize/awq_quantize.py --help` prints the same.

"""
TAIL = """
- Dashes do for underscores: `--model-path` is `--model_path`.
- Booleans take `true`, `false`, `1`, `0`, `yes` or `no`. Alone, such as `--overwrite`, they mean true.
- Exit codes: 0 done, 2 bad usage or input, 1 failure in the work, 130 interrupted ([resume.md](resume.md)).
- `LLM_QUANTIZE_DEBUG=1` in the environment prints the traceback of an error.

`evaluate.py` and `run_vllm.sh` have options of their own: [quality.md](quality.md#measure), [serving.md](serving.md).

This page is generated. To change it, change the options in `llm_quantize/config.py` or
`llm_quantize/calibration/windows.py`, then run `uv run python tools/options_page.py`.
"""


def page() -> str:
    """The text of the page."""
    found: dict[str, dict[Method, tuple[Field[Any], Option]]] = {}
    for method in METHODS:
        for _, field, option in cli.command_options(method):
            found.setdefault(cli.flag_of(field, option), {})[method] = (field, option)
    lines = ["| option | script | default | what it does |", "|---|---|---|---|"]
    for flag in _order():
        by_method = found[flag]
        script = "both" if len(by_method) == len(METHODS) else METHODS[next(iter(by_method))]
        cells = (f"`--{flag}`", script, _default(by_method), _meaning(by_method))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return HEAD + "\n".join(lines) + "\n" + TAIL


def _order() -> list[str]:
    """All options in the order of the help; one that a later script adds follows its neighbour there."""
    flags: list[str] = []
    for method in METHODS:
        at = -1
        for _, field, option in cli.command_options(method):
            flag = cli.flag_of(field, option)
            if flag in flags:
                at = flags.index(flag)
            else:
                at += 1
                flags.insert(at, flag)
    return flags


def _default(by_method: dict[Method, tuple[Field[Any], Option]]) -> str:
    """The default, in backticks where it can be typed; what differs between the methods as `awq / gptq`."""
    values, remarks = [], []
    for method, (field, option) in by_method.items():
        value, _, remark = cli.default_of(method, field, option).partition("; ")
        values.append(value.replace(f"-{method}-", "-<method>-"))
        remarks.append(remark)
    value = " / ".join(dict.fromkeys(values))
    if value == "none":
        return "—"
    shown = value if value.startswith("the ") else f"`{value}`"
    return "; ".join(part for part in (shown, *dict.fromkeys(remarks)) if part)


def _meaning(by_method: dict[Method, tuple[Field[Any], Option]]) -> str:
    """The values that the option takes, where they are listed, and its help."""
    values = {method: _values(option, method) for method, (_, option) in by_method.items()}
    helps = {method: for_method(option.help, method) for method, (_, option) in by_method.items()}
    listed, text = _by_method(values), _by_method(helps)
    return f"{listed}. {text[0].upper()}{text[1:]}" if listed else text


def _by_method(texts: dict[Method, str]) -> str:
    """The text, or each method's where they differ."""
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"{METHODS[method]}: {text}" for method, text in texts.items())


def _values(option: Option, method: Method) -> str:
    choices = for_method(option.choices, method) or ()
    if not choices and isinstance(option.metavar, dict):
        choices = option.metavar[method].split("|")
    return ", ".join(f"`{each}`" for each in choices)


def main(argv: list[str]) -> int:
    """Write or check the page; returns the exit code."""
    if argv not in ([], ["--check"]):
        print("usage: python tools/options_page.py [--check]", file=sys.stderr)
        return 2
    text = page()
    if not argv:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print("docs/options.md is stale: run `uv run python tools/options_page.py`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
