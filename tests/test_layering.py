"""Who may import whom: the layers of the package, read from its source."""

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "memstudy"
ANY = None  # no rule

# layer: (layers of memstudy it may import, third-party packages it may import)
LAYERS = {
    "__init__": (set(), set()),
    "attention": (set(), {"torch", "flash_attn"}),
    "profiler": (set(), {"accelerate", "torch", "transformers", "pydantic", "yaml"}),
    "techniques": ({"attention", "projections"}, ANY),
    "place_value": (set(), set()),
    "machine": (set(), {"torch"}),
    "quick_imports": (ANY, {"bitsandbytes", "torch"}),
    "data": ({"machine", "place_value"}, ANY),
    "pairs": ({"data"}, {"sacrebleu", "rouge_score"}),
    "models": ({"attention", "convert"}, ANY),
    "reformer": ({"attention", "models"}, {"torch", "transformers"}),
    "encoder_decoder": ({"attention", "models"}, {"torch", "transformers"}),
    "projections": ({"attention"}, {"torch", "transformers"}),
    "dispatch": ({"attention", "projections"}, {"torch", "transformers"}),
    "convert": ({"attention", "dispatch", "projections"}, {"torch", "transformers", "safetensors"}),
    "peers": ({"attention"}, ANY),
    "configs": ({"attention", "machine", "models", "peers", "techniques"}, ANY),
    "reformer_configs": ({"configs", "reformer"}, ANY),
    "seq2seq_configs": ({"attention", "configs", "encoder_decoder"}, ANY),
    "pretrained": (set(), {"huggingface_hub"}),
    "hub_configs": ({"attention", "configs", "convert", "pretrained"}, ANY),
    "prediction_configs": (
        {"configs", "hub_configs", "profiler", "published", "reformer_configs", "seq2seq_configs"},
        ANY,
    ),
    "layers": ({"configs", "profiler"}, {"torch", "transformers"}),
    "inference": ({"hub_configs", "layers", "profiler", "techniques"}, {"psutil", "torch", "transformers"}),
    "lever_trainer": ({"configs"}, {"torch", "transformers"}),
    "glue": ({"data"}, ANY),
    "finetuning": ({"data", "glue", "hub_configs", "lever_trainer", "pretrained", "techniques"}, ANY),
    "seq2seq": (
        {
            "data",
            "encoder_decoder",
            "layers",
            "lever_trainer",
            "profiler",
            "pairs",
            "place_value",
            "seq2seq_configs",
            "techniques",
        },
        ANY,
    ),
    "step": (
        {"attention", "configs", "hub_configs", "inference", "lever_trainer", "profiler", "techniques"},
        {"transformers"},
    ),
    "published": ({"hub_configs", "profiler", "prediction_configs"}, ANY),
    "significance": (set(), {"numpy", "scipy"}),
    "trainers": (
        {
            "attention",
            "configs",
            "data",
            "finetuning",
            "glue",
            "hub_configs",
            "inference",
            "layers",
            "lever_trainer",
            "profiler",
            "pairs",
            "prediction_configs",
            "published",
            "reformer_configs",
            "seq2seq",
            "seq2seq_configs",
            "step",
            "techniques",
        },
        ANY,
    ),
    "parameters": (set(), {"nbformat", "yaml"}),
    "fresh": ({"quick_imports", "trainers", "cli"}, set()),
    "runs": ({"fresh", "machine"}, set()),
    "study": ({"machine", "runs", "parameters"}, {"pandas", "matplotlib", "seaborn", "tqdm"}),
    "synthesis": ({"study"}, {"pandas", "matplotlib"}),
    "advice": ({"hub_configs", "machine", "parameters", "runs", "techniques"}, set()),
    "bad_input": (set(), {"typer", "pydantic"}),
    "forecast": (
        {"advice", "attention", "bad_input", "hub_configs", "profiler", "quick_imports", "step", "techniques"},
        {"rich", "typer"},
    ),
    "jobs": (
        {
            "attention",
            "configs",
            "layers",
            "profiler",
            "parameters",
            "prediction_configs",
            "runs",
            "step",
            "trainers",
        },
        {"nbclient", "papermill"},
    ),
    "cli": (ANY, ANY),
    "qa": (ANY, ANY),
    "notebooks": (
        {
            "advice",
            "attention",
            "convert",
            "data",
            "glue",
            "profiler",
            "published",
            "significance",
            "study",
            "techniques",
            "trainers",
        },
        ANY,
    ),
}


def layer_of(module: str) -> str:
    """Return the layer of a dotted name; what is no submodule belongs to the package itself."""
    name = [*module.split("."), "__init__"][1]
    return name if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file() else "__init__"


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


def violations(layer: str, modules: set[str]) -> list[str]:
    """Return the imports among `modules` that `layer` is not allowed, sorted."""
    inside, outside = LAYERS[layer]
    refused = []
    for module in modules:
        top = module.split(".")[0]
        if top == "memstudy":
            allowed = inside is ANY or layer_of(module) in {layer, "__init__", *inside}
        else:
            allowed = outside is ANY or top in outside or top in sys.stdlib_module_names
        if not allowed:
            refused.append(module)
    return sorted(refused)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_its_own_layer_and_those_below(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    layer = parts[1]
    assert layer in LAYERS, f"{path.name} has no layer: give it a line in LAYERS"
    modules = imported_modules(ast.parse(path.read_text("utf-8")), ".".join(parts[:-1]))
    assert violations(layer, modules) == []


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.name)
def test_a_notebook_imports_only_the_public_layers(path):
    cells = json.loads(path.read_text("utf-8"))["cells"]
    code = [line for cell in cells if cell["cell_type"] == "code" for line in cell["source"]]
    source = "\n".join(line.rstrip("\n") for line in code if not line.startswith(("%", "!")))
    assert violations("notebooks", imported_modules(ast.parse(source), "")) == []


@pytest.mark.parametrize(
    ("package", "source", "modules"),
    [
        ("memstudy.profiler", "from .roles import Roles", {"memstudy.profiler.roles.Roles"}),
        ("memstudy.profiler", "from .. import trainers", {"memstudy.kinds"}),
        ("memstudy", "from . import runs", {"memstudy.records"}),
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


def test_rows_tables_and_figures_need_no_torch():
    code = "import sys, memstudy.records, memstudy.study; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("test_*.py")), ids=lambda path: path.name)
def test_no_test_module_imports_another(path):
    assert not any(module.startswith("test_") for module in imported_modules(ast.parse(path.read_text("utf-8")), ""))
