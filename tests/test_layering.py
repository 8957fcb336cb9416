"""Allowed imports, read from the source: a room (a module or package) imports only rooms of the floors below."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "memstudy"
# The lowest floor imports no other room, except `machine`.
FLOORS = [
    {"attention", "data", "figures", "latex", "machine", "profiler", "project", "records"},
    {"huggingface", "launcher", "provenance"},
    {"study", "techniques"},
    {"trainers"},
    {"studies"},
    {"kinds"},
    {"cli", "notebook"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imported_modules(tree: ast.AST, package: str) -> set[str]:
    """Return the dotted names that `tree` imports; relative ones are resolved against `package`."""
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: -node.level + 1 or None] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            modules |= {f"{base}.{alias.name}" for alias in node.names}
    return modules


def rooms_of(modules: set[str]) -> set[str]:
    """Return the rooms among dotted names; other names belong to the package itself."""
    return {
        room for module in modules if (room := [*module.split("."), ""][1]) in FLOOR and module.startswith("memstudy.")
    }


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_from_the_floors_below_alone(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    room = parts[1]
    if room == "__init__":
        return
    modules = imported_modules(ast.parse(path.read_text("utf-8")), ".".join(parts[:-1]))
    others = rooms_of(modules) - {room, "machine"}
    assert {other for other in others if FLOOR[other] >= FLOOR[room]} == set()


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.name)
def test_a_notebook_imports_neither_the_command_line_nor_a_folder_put_on_the_path(path):
    cells = json.loads(path.read_text("utf-8"))["cells"]
    source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert "cli" not in rooms_of(imported_modules(ast.parse(source), ""))
    assert "sys.path" not in source


@pytest.mark.parametrize("path", sorted((PACKAGE / "profiler").rglob("*.py")), ids=lambda path: path.name)
def test_private_names_of_torch_are_bound_in_one_file_of_the_profiler(path):
    modules = imported_modules(ast.parse(path.read_text("utf-8")), "memstudy.profiler")
    private = {name for name in modules if name.startswith("torch.") and "._" in name}
    assert private == set() or path.name == "internals.py"
    assert not re.search(r"\btorch\._\w|\b_C\.", path.read_text("utf-8")) or path.name == "internals.py"


@pytest.mark.parametrize(
    ("package", "source", "modules"),
    [
        ("memstudy.profiler", "from .roles import Roles", {"memstudy.profiler.roles.Roles"}),
        ("memstudy.profiler", "from .. import kinds", {"memstudy.kinds"}),
        ("memstudy", "from . import records", {"memstudy.records"}),
        ("memstudy", "def f():\n    import torch.nn as nn", {"torch.nn"}),
        ("memstudy", "from memstudy.records import read", {"memstudy.records.read"}),
    ],
)
def test_imports_are_found_in_every_form(package, source, modules):
    assert imported_modules(ast.parse(source), package) == modules


def test_every_file_that_is_no_module_is_installed_too():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-data"][
        "memstudy"
    ]
    installed = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    there = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert there == installed


def test_the_profiler_imports_little_besides_torch():
    """The rest of its second of imports is pydantic's, for the catalogue of GPUs."""
    heavy = {"transformers", "accelerate", "datasets", "pandas", "matplotlib", "scipy", "bitsandbytes", "peft"}
    code = f"import sys; from memstudy.profiler import fit, measure, predict; print({heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_rows_tables_and_figures_need_no_torch():
    code = "import sys, memstudy.records, memstudy.study; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("test_*.py")), ids=lambda path: path.name)
def test_no_test_module_imports_another(path):
    assert not any(module.startswith("test_") for module in imported_modules(ast.parse(path.read_text("utf-8")), ""))
