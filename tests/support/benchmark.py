"""The scripts of ``benchmarks/``, which is not a package, as modules."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def load(name: str):
    """Return ``benchmarks/<name>.py`` as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
