"""Test the direction of imports in the package: from the bottom up, and without a circle.

Read from the source, so that imports inside functions and for type checkers count, too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import llm_quantize

PACKAGE = Path(llm_quantize.__file__).parent

# Subpackages and modules from the bottom up: each may import what stands before it, and itself. Last is the package's
# own `__init__`, which offers names of all the others.
ORDER = (
    "version", "types", "errors", "options", "command_line", "console", "device", "timing",
    "io",
    "kernels",
    "solver",
    "model",
    "calibration",
    "formats",  # above the solver, whose quantization parameters they pack
    "checkpoint",
    "blockwise",
    "evaluation",
    "backends",
    "config", "validation", "preparation", "pipeline", "cli",
    "llm_quantize",
)  # fmt: skip
# What stands alone: it imports nothing of the package, and nothing of the package imports it but for `SHARED`.
ALONE = ("serving",)
# The rules by which readers take modules for float, which the quantizer applies to its own results.
SHARED = ("llm_quantize.serving.float_modules", "llm_quantize.serving.float_in_transformers")

Imports = dict[str, set[str]]  # of each module, by full name


def modules_of(package: Path) -> dict[str, Path]:
    """Map the full name of each module of a package to its file."""
    found: dict[str, Path] = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(package: Path) -> Imports:
    """Map each module of a package to the modules of that package that it imports, anywhere in its source."""
    modules = modules_of(package)
    found: Imports = {}
    for name, path in modules.items():
        inside = name if path.name == "__init__.py" else name.rpartition(".")[0]
        named = _named(ast.parse(path.read_text("utf-8")), inside)
        found[name] = {each for each in (_module(words, modules) for words in named) if each and each != name}
    return found


def _named(tree: ast.AST, package: str) -> Iterator[str]:
    """Yield what a module imports, as full names of modules or of names in them. package: that it lies in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def _module(name: str, modules: dict[str, Path]) -> str | None:
    """Return the module that a full name lies in, None for one of another package."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def layer_of(module: str) -> str:
    """Return the subpackage of a module, or the module's own name where it lies in none."""
    return module.split(".")[1] if "." in module else module


def upward_imports(
    imports: Imports, order: tuple[str, ...], alone: tuple[str, ...] = (), shared: tuple[str, ...] = ()
) -> list[str]:
    """List the imports of what stands later in the order, and those from and of what stands alone.

    The modules `shared` stand alone too, but all others may import them.
    """
    wrong = []
    for module, targets in imports.items():
        for target in sorted(targets):
            here, there = layer_of(module), layer_of(target)
            if here == there or (target in shared and here not in alone):
                continue
            if here in alone or there in alone or order.index(here) < order.index(there):
                wrong.append(f"{module} imports {target}")
    return wrong


def find_cycle(imports: Imports) -> list[str]:
    """Return the modules of one circle of imports; empty where there is none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        cycle: list[str] = error.args[1]
        return cycle
    return []


# --- the package


@pytest.fixture(scope="module")
def imports() -> Imports:
    return imports_of(PACKAGE)


def test_every_subpackage_has_a_place(imports: Imports) -> None:
    assert {layer_of(module) for module in imports} == {*ORDER, *ALONE}
    assert len(set(ORDER)) == len(ORDER)


def test_imports_go_down(imports: Imports) -> None:
    assert sum(map(len, imports.values())) > 300
    assert upward_imports(imports, ORDER, ALONE, SHARED) == []
    assert set(SHARED) <= set(imports)


def test_no_circle(imports: Imports) -> None:
    assert find_cycle(imports) == []


def test_scripts_of_libraries_import_nothing_of_the_package(imports: Imports) -> None:
    """They run in other environments."""
    scripts = [name for name in imports if name.startswith("llm_quantize.backends.scripts.")]
    assert len(scripts) > 4
    assert not [name for name in scripts if imports[name]]


# --- the check itself


SOUND = {
    "__init__.py": "",
    "low.py": "import os\n",
    "middle/__init__.py": "",
    "middle/one.py": "from pack.low import x\nfrom pack import low\n",
    "middle/two.py": "from .one import y\nimport pack.low\n",
    "high.py": "from pack.middle import one, two\nimport json\n",
    "apart.py": "",
}


def write_package(root: Path, sources: dict[str, str]) -> Path:
    """Write the sound package `pack` of three layers, some of its files replaced; return its directory."""
    for name, source in (SOUND | sources).items():
        path = root / "pack" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return root / "pack"


LAYERS = ("low", "middle", "high", "pack")
DOWN = {
    "pack": set(),
    "pack.apart": set(),
    "pack.high": {"pack.middle.one", "pack.middle.two"},
    "pack.low": set(),
    "pack.middle": set(),
    "pack.middle.one": {"pack.low"},
    "pack.middle.two": {"pack.low", "pack.middle.one"},
}
FOR_TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pack.{}\n"


def test_a_sound_package_passes(tmp_path: Path) -> None:
    imports = imports_of(write_package(tmp_path, {}))
    assert imports == DOWN
    assert upward_imports(imports, LAYERS, ("apart",)) == []
    assert find_cycle(imports) == []


@pytest.mark.parametrize(
    ("sources", "wrong"),
    [
        ({"low.py": "from pack.high import x\n"}, "pack.low imports pack.high"),
        ({"low.py": "import pack.high\n"}, "pack.low imports pack.high"),
        ({"low.py": "from pack import high\n"}, "pack.low imports pack.high"),
        ({"low.py": "from . import high\n"}, "pack.low imports pack.high"),
        ({"low.py": "def f():\n    from pack.high import x\n"}, "pack.low imports pack.high"),
        ({"low.py": FOR_TYPES.format("high import x")}, "pack.low imports pack.high"),
        ({"low.py": "from pack import __version__\n"}, "pack.low imports pack"),
        ({"middle/one.py": "from .. import high\n"}, "pack.middle.one imports pack.high"),
        ({"middle/__init__.py": "from ..high import x\n"}, "pack.middle imports pack.high"),
        ({"apart.py": "from pack import low\n"}, "pack.apart imports pack.low"),
        ({"high.py": "from pack.apart import x\n"}, "pack.high imports pack.apart"),
    ],
)
def test_an_upward_import_is_found(sources: dict[str, str], wrong: str, tmp_path: Path) -> None:
    imports = imports_of(write_package(tmp_path, sources))
    assert upward_imports(imports, LAYERS, ("apart",)) == [wrong]


def test_a_shared_module_may_be_imported_and_imports_nothing(tmp_path: Path) -> None:
    imports = imports_of(write_package(tmp_path, {"low.py": "from pack.apart import x\n"}))
    assert upward_imports(imports, LAYERS, ("apart",), ("pack.apart",)) == []
    imports = imports_of(write_package(tmp_path, {"low.py": "", "apart.py": "from pack import low\n"}))
    assert upward_imports(imports, LAYERS, ("apart",), ("pack.apart",)) == ["pack.apart imports pack.low"]


@pytest.mark.parametrize("source", ["from .two import x\n", FOR_TYPES.format("middle.two import x")])
def test_a_circle_is_found(source: str, tmp_path: Path) -> None:
    """Within a subpackage, where no order is asked for."""
    imports = imports_of(write_package(tmp_path, {"middle/one.py": source}))
    assert upward_imports(imports, LAYERS) == []
    assert set(find_cycle(imports)) == {"pack.middle.one", "pack.middle.two"}
