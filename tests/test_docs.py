"""The documentation against the program: options, links, commands, error messages."""

from __future__ import annotations

import importlib.util
import itertools
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from error_texts import HOLE, all_texts, raised_texts
from llm_quantize import cli
from option_help import help_defaults

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (".", ".github", "benchmarks", "docs", "inference/quantize", "inference/quantize/embedded/model")
MARKDOWN = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.md"))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------- options
#
# A table of options counts where its header has a cell that says "default", in English or Chinese. A row has the
# options in backticks of the first cell that has any. Where the scripts' defaults differ, the cell holds `awq / gptq`.
# `none` may be written as a dash. What follows a semicolon in the help's default (the embedded model's) may be left
# out.

PAGES = ("docs/options.md", "inference/quantize/AGENTS.md")
DEFAULT = ("default", "默认", "默认值", "缺省", "缺省值")
NONE = {"—", "–", "-", "none", "无"}
# Their defaults are words, to be told in the page's own language.
WORDS = {"model_path", "output_path"}


def option_rows(page: str) -> list[tuple[str, str]]:
    """List (option without dashes, default cell) for each row of each option table of a Markdown page."""
    rows: list[tuple[str, str]] = []
    column: int | None = None
    for line in page.splitlines():
        if not line.lstrip().startswith("|"):
            column = None  # the table has ended
            continue
        cells = table_cells(line)
        if column is None:
            found = [i for i, cell in enumerate(cells) if cell.lower() in DEFAULT]
            column = found[0] if found else -1
        elif column >= 0:
            options = next((o for c in cells if (o := re.findall(r"`--([\w-]+)", c))), [])
            rows += [(o.replace("-", "_"), cells[column] if column < len(cells) else "") for o in options]
    return rows


def table_cells(line: str) -> list[str]:
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


def expected() -> dict[str, str]:
    """Map each option to its default in both scripts; `a / b` where AWQ's and GPTQ's differ."""
    awq, gptq = help_defaults("awq"), help_defaults("gptq")
    both = {**awq, **gptq}
    for name in awq.keys() & gptq.keys():
        if awq[name] != gptq[name]:
            both[name] = f"{awq[name]} / {gptq[name]}"
    return both


def disagreements(page: str) -> list[str]:
    """List a line for each option that the page's tables lack, invent, or give another default."""
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
    assert disagreements(read(name)) == []


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


@pytest.fixture
def options_page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("options_page", ROOT / "tools" / "options_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_options_page_is_as_generated(options_page: ModuleType) -> None:
    assert options_page.main(["--check"]) == 0


def test_a_stale_options_page_is_found_and_written_anew(
    options_page: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(options_page, "PAGE", tmp_path / "options.md")
    assert options_page.main(["--check"]) == 1
    (tmp_path / "options.md").write_text(
        read("docs/options.md").replace("`128`", "`64`", 1), encoding="utf-8"
    )
    assert options_page.main(["--check"]) == 1
    assert capsys.readouterr().err.count("docs/options.md is stale") == 2
    assert options_page.main([]) == 0
    assert options_page.main(["--check"]) == 0
    assert options_page.main(["--frob"]) == 2


# ----------------------------------------------------------------------------------------------------- README


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_readme_is_short(name: str) -> None:
    assert len(read(name).splitlines()) <= 120


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_commands_of_readme_are_understood(name: str) -> None:
    text = read(name).replace("\\\n", " ")
    commands = re.findall(r"inference/quantize/(awq|gptq)_quantize\.py((?: +--?\S+ +[^\s-]\S*)*)", text)
    assert len(commands) >= 3
    for method, words in commands:
        assert cli.parse(method, shlex.split(words)).method == method


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_that_are_named_exist(path: Path) -> None:
    named = re.findall(
        r"(?<![\w/.])(?:inference/quantize|benchmarks|tools|tests|\.ci)/[\w./-]*\w", path.read_text("utf-8")
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


# ------------------------------------------------------------------------------------------------------ links


def heading_anchors(page: str) -> set[str]:
    """The names by which links reach the headings of a page, as GitHub makes them."""
    outside_code = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", outside_code, flags=re.MULTILINE):
        kept = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(kept.strip().replace(" ", "-"))
    return found


def broken_links(page: str, directory: Path) -> list[str]:
    """Relative links of a page in `directory` that lead nowhere."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = directory / name if name else None
        if path is not None and not path.exists():
            broken.append(target)
        elif anchor:
            text = page if path is None else path.read_text(encoding="utf-8")
            if anchor not in heading_anchors(text):
                broken.append(target)
    return broken


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(path: Path) -> None:
    assert broken_links(path.read_text(encoding="utf-8"), path.parent) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# A title: `x`, and y\n", encoding="utf-8")
    page = (
        "[a](there.md) [b](gone.md) [c](there.md#a-title-x-and-y) [d](there.md#b) [e](https://x.y/z) [f](#g)"
    )
    assert broken_links(page, tmp_path) == ["gone.md", "there.md#b", "#g"]


def test_every_page_of_docs_is_linked_from_readme() -> None:
    linked = set(re.findall(r"\]\((docs/[^)#]+)", read("README.md")))
    assert linked == {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}


# ----------------------------------------------------------------------------------------------- architecture


def test_the_tree_of_the_architecture_page_is_there() -> None:
    tree = re.findall(r"^```\n(run_vllm\.sh.*?)^```", read("docs/architecture.md"), re.MULTILINE | re.DOTALL)
    place: list[str] = []  # the folders around a line, by its indentation
    missing = []
    for line in tree[0].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = list(itertools.takewhile(re.compile(r"[\w./]+(\.\w+|/)").fullmatch, line.split()))
        assert names, line
        place[depth:] = [names[-1]]
        paths = ["/".join((*place[:depth], name)) for name in names]
        missing += [path for path in paths if not (ROOT / path).exists()]
    assert missing == []


# --------------------------------------------------------------------------------------------- error messages
#
# docs/troubleshooting.md lists messages in backticks at the start of table rows, with `…` for what varies. A text that
# an error is raised with must be one of them, or begin with an option: such texts name the option and the remedy, and
# the page says so once. A listed message must be a text of the program.


def listed_messages() -> list[str]:
    return re.findall(r"^\| `([^`]+)` \|", read("docs/troubleshooting.md"), flags=re.MULTILINE)


def matches(message: str, text: str) -> bool:
    """Whether a listed message stands for a text of the program."""
    return re.fullmatch(".*".join(map(re.escape, message.split(HOLE))), text) is not None


def is_covered(text: str, messages: list[str]) -> bool:
    return text.startswith("--") or any(matches(message, text) for message in messages)


def test_every_error_is_in_troubleshooting() -> None:
    messages, texts = listed_messages(), raised_texts()
    assert len(texts) > 150
    assert sorted({text for text in texts if not is_covered(text, messages)}) == []


def test_troubleshooting_lists_nothing_that_is_gone() -> None:
    texts = all_texts()
    assert [m for m in listed_messages() if not any(matches(m, text) for text in texts)] == []


def test_a_listed_message_has_a_word_of_its_own() -> None:
    assert [m for m in listed_messages() if not re.search("[A-Za-z]{4}", m)] == []


def test_an_error_that_is_not_listed_is_found() -> None:
    messages = listed_messages()
    assert not is_covered("the moon is down: wait", messages)
    assert not is_covered(f"{HOLE} is down: wait", messages)
    assert is_covered("--bits 5: AWQ takes 4 or 8", messages)
    assert is_covered(f"{HOLE} exists: use --overwrite, or choose another --output_path", messages)
