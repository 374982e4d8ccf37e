"""The option tables of the documentation against `--help`.

A table counts where its header has a cell that says "default", in English or Chinese. A row has the options
in backticks of the first cell that has any. Where the scripts' defaults differ, the cell holds `awq / gptq`.
`none` may be written as a dash. What follows a semicolon in the help's default (the embedded model's) may be
left out.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from option_help import help_defaults

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "README.zh-CN.md", "inference/quantize/AGENTS.md")
DEFAULT = ("default", "默认", "默认值", "缺省", "缺省值")
NONE = {"—", "–", "-", "none", "无"}
# Their defaults are words, to be told in the page's own language.
WORDS = {"model_path", "output_path"}


def option_rows(page: str) -> list[tuple[str, str]]:
    """(option without dashes, default cell) of each row of each option table of a Markdown page."""
    rows: list[tuple[str, str]] = []
    column: int | None = None
    for line in page.splitlines():
        if not line.lstrip().startswith("|"):
            column = None  # the table has ended
            continue
        cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
        if column is None:
            found = [i for i, cell in enumerate(cells) if cell.lower() in DEFAULT]
            column = found[0] if found else -1
        elif column >= 0:
            options = next((o for c in cells if (o := re.findall(r"`--([\w-]+)", c))), [])
            rows += [(o.replace("-", "_"), cells[column] if column < len(cells) else "") for o in options]
    return rows


def expected() -> dict[str, str]:
    """Option -> default of both scripts; `a / b` where AWQ's and GPTQ's differ."""
    awq, gptq = help_defaults("awq"), help_defaults("gptq")
    both = {**awq, **gptq}
    for name in awq.keys() & gptq.keys():
        if awq[name] != gptq[name]:
            both[name] = f"{awq[name]} / {gptq[name]}"
    return both


def disagreements(page: str) -> list[str]:
    """One line for each option that the page's tables lack, invent, or give another default."""
    rows, wanted = option_rows(page), expected()
    wrong = [f"--{name}: in no option table" for name in sorted(wanted.keys() - dict(rows).keys())]
    for name, cell in rows:
        text = cell.replace("`", "").strip()
        if name not in wanted:
            wrong.append(f"--{name}: no such option")
        elif name in WORDS:
            if not text:
                wrong.append(f"--{name}: no default")
        elif wanted[name] == "none":
            if text not in NONE:
                wrong.append(f"--{name}: default '{text}' instead of none")
        elif re.split("[;；]", text)[0].strip() != wanted[name]:
            wrong.append(f"--{name}: default '{text}' instead of '{wanted[name]}'")
    return wrong


@pytest.mark.parametrize("name", PAGES)
def test_option_tables_agree_with_help(name: str) -> None:
    assert disagreements((ROOT / name).read_text("utf-8")) == []


def _page(wanted: dict[str, str]) -> str:
    rows = [f"| `--{name}` | `{value}` | says |" for name, value in wanted.items()]
    return "\n".join(
        ["# Arguments", "", "| argument | 默认值 | meaning |", "|---|---|---|", *rows, "", "end"]
    )


def test_a_right_page_passes() -> None:
    assert expected()["calib_samples"] == "512 / 1024"
    assert disagreements(_page(expected())) == []


def test_wrong_pages_fail() -> None:
    wanted = expected()
    assert len(disagreements("no table")) == len(wanted)
    assert disagreements(_page(wanted | {"bits": "3"})) == ["--bits: default '3' instead of '4'"]
    assert disagreements(_page(wanted | {"max_kl": "1"})) == ["--max_kl: default '1' instead of none"]
    assert disagreements(_page(wanted | {"frob": "1"})) == ["--frob: no such option"]
    assert disagreements(_page({k: v for k, v in wanted.items() if k != "seed"})) == [
        "--seed: in no option table"
    ]
