"""The texts of the program's errors, read out of its sources. `…` stands for what varies in a text."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "inference" / "quantize" / "llm_quantize"
SCRIPT = ROOT / "run_vllm.sh"
ERRORS = {"InputError", "WorkError", "FinalError", "Refusal", "TooLarge", "ArgumentTypeError"}
HOLE = "…"


def raised_texts() -> list[str]:
    """Every text that an error is made with, and every one with which `run_vllm.sh` fails.

    A text without words of its own, such as another error's text repeated, is left out.
    """
    trees = _trees()
    errors = ERRORS | {name for tree in trees for name in _subclasses(tree)}
    found = [
        _text(call.args[0])
        for tree in trees
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and call.args and _name(call.func) in errors
    ]
    shell = SCRIPT.read_text(encoding="utf-8")
    found += [_shell_text(text) for text in re.findall(r'\bfail\s+\d\s+(?:\\\s+)?"([^"]+)"', shell)]
    return [text for text in found if re.search(r"[a-z]{2}", text)]


def all_texts() -> list[str]:
    """Every string of the sources, with `…` for what varies."""
    found = [_text(node) for tree in _trees() for node in ast.walk(tree) if _is_text(node)]
    shell = SCRIPT.read_text(encoding="utf-8")
    return found + [_shell_text(text) for text in re.findall(r'"([^"]+)"', shell)]


def _trees() -> list[ast.Module]:
    return [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))]


def _subclasses(tree: ast.Module) -> Iterator[str]:
    """Classes that derive from one of `ERRORS`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(_name(base) in ERRORS for base in node.bases):
            yield node.name


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _text(node: ast.AST) -> str:
    """The text that an expression makes, as far as the source has it."""
    return re.sub(f"{HOLE}+", HOLE, " ".join("".join(_parts(node)).split()))


def _parts(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        for value in node.values:
            yield from _parts(value)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        yield from _parts(node.left)
        yield from _parts(node.right)
    else:
        yield HOLE


def _shell_text(text: str) -> str:
    return re.sub(r"\$(\{[^}]*\}|\([^)]*\)|\w+)", HOLE, text)
