"""Test names in texts of other languages: their own readers give the name back, and nothing else happens."""

from __future__ import annotations

import ast
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from llm_quantize.io.escaping import markdown_code, markdown_text, python_literal, shell_word, yaml_value

NAMES = [
    "plain",
    "Qwen2.5-7B_it",
    'quo"ted',
    "quo'ted",
    "both\"'",
    'end\\"); import os; ("',
    "line\nends\r\n# Heading",
    "\u2028separator\u2029",
    "\x1b]0;title\x07\x1b[31m",
    "\x00\x7f\x85",
    "$(touch x) `touch x` ${HOME} !x",
    "--option",
    "~",
    "---",
    "- a: b # c",
    "{a}, [b]: &c *d !e %f",
    "true",
    "0123",
    "[text](javascript:x)",
    "![](http://x)",
    "<script>alert(1)</script>",
    "&lt;",
    "a|b",
    "``` ```",
    "`",
    " ends with blanks ",
    "\u00e9\u4e2d\U0001f600",
    "bytes \udcff\udc80 that are no UTF-8",
]


@pytest.mark.parametrize("name", NAMES)
def test_python(name: str) -> None:
    source = python_literal(name)
    assert ast.literal_eval(source) == name
    assert source.isprintable()
    source.encode()


@pytest.mark.parametrize("name", [name for name in NAMES if "\0" not in name])
def test_shell(name: str, tmp_path: Path) -> None:
    word = shell_word(name)
    assert word.isprintable()
    word.encode()
    done = subprocess.run(
        ["bash", "-c", f"printf %s ./{word}"], cwd=tmp_path, capture_output=True, check=True
    )
    assert done.stdout == os.fsencode(f"./{name}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_yaml(name: str) -> None:
    text = f"---\nkey: {yaml_value(name)}\nlist: {yaml_value([name, 'b'])}\n---\n"
    assert text.count("\n") == 4
    assert all(c.isprintable() for c in text.replace("\n", ""))
    if any("\ud800" <= c <= "\udfff" for c in name):
        text.encode()  # YAML has no such characters: their escape is what stands there
        return
    assert next(yaml.safe_load_all(text)) == {"key": name, "list": [name, "b"]}


def test_plain_yaml_is_as_json_has_it() -> None:
    assert yaml_value("Qwen/Qwen2.5-7B") == '"Qwen/Qwen2.5-7B"'
    assert yaml_value(["awq", "4-bit"]) == '["awq", "4-bit"]'
    assert yaml_value("x" * 500) == f'"{"x" * 500}"'


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen2.5-7B_it", "Qwen2.5-7B_it"),
        ("a\n# Heading", "a # Heading"),
        ("[a](b)", r"\[a\](b)"),
        ("![a](b)", r"!\[a\](b)"),
        ("<b>&amp;</b>", r"\<b\>\&amp;\</b\>"),
        ("*a* `b` ~c~ d|e", r"\*a\* \`b\` \~c\~ d\|e"),
        ("\x1b[31m", r"?\[31m"),
        ("\\", "\\\\"),
    ],
)
def test_markdown(name: str, expected: str) -> None:
    assert markdown_text(name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", "`plain`"),
        ("a`b", "``a`b``"),
        ("`a``b", "``` `a``b ```"),
        ("a\nb", "`a b`"),
        ("<b>", "`<b>`"),
    ],
)
def test_markdown_code(name: str, expected: str) -> None:
    assert markdown_code(name) == expected
