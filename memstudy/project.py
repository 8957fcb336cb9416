"""A study's parameters: the notebook's tagged cell says which there are, ``params/<scale>/<stem>.yaml`` sets them."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
SMOKE = "smoke"  # a notebook's own defaults: a minute, offline


def notebook_parameters(stem: str) -> dict[str, object]:
    """The defaults in the parameters cell of ``notebooks/<stem>.ipynb``, by name.

    Raises
    ------
    ValueError
        When there is no such notebook, or no cell of it is tagged ``parameters``.
    """
    path = ROOT / "notebooks" / f"{stem}.ipynb"
    if not path.exists():
        raise ValueError(f"unknown study {stem!r}; known: {', '.join(studies())}")
    # Not by nbformat, whose check of the whole notebook takes two seconds to import.
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            assigned = (s for s in ast.parse("".join(cell["source"])).body if isinstance(s, ast.AnnAssign))
            return {s.target.id: ast.literal_eval(s.value) for s in assigned}
    raise ValueError(f"{path.name}: no cell is tagged 'parameters'")


def studies() -> list[str]:
    """The stems of all studies: the notebooks that there are."""
    return sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


def scales(stem: str) -> list[str]:
    """The scales at which study ``stem`` can be run: those with a file of parameters, and its notebook's defaults."""
    return [*sorted(path.parent.name for path in (ROOT / "params").glob(f"*/{stem}.yaml")), SMOKE]


def read_parameters(stem: str, scale: str) -> dict[str, object]:
    """The parameters that ``params/<scale>/<stem>.yaml`` sets, checked against the notebook's; at ``smoke`` scale none.

    Raises
    ------
    ValueError
        When the file is missing or is not a YAML mapping, for a key that the notebook does not have, and
        for a value of another type than the default's.
    """
    defaults = notebook_parameters(stem)
    if scale == SMOKE:
        return {}
    path = ROOT / "params" / scale / f"{stem}.yaml"
    if scale not in scales(stem):
        raise ValueError(f"study {stem} has no scale {scale!r}; there are: {', '.join(scales(stem))}")
    return check_parameters(path.read_bytes(), defaults, where=f"{scale}/{path.name}")


def check_parameters(text: str | bytes, defaults: dict[str, object], *, where: str) -> dict[str, object]:
    """The mapping in the YAML ``text``, each key and type checked against ``defaults``; see `read_parameters`."""
    try:
        given = yaml.safe_load(text)
    except Exception as error:  # PyYAML raises KeyError, AttributeError and others, too, for ill-formed scalars
        raise ValueError(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    if given is None:  # an empty file, or only comments
        return {}
    if not isinstance(given, dict):
        raise ValueError(f"{where}: a mapping of parameters is needed, got {type(given).__name__}")
    for name, value in given.items():
        if name not in defaults:
            raise ValueError(f"{where}: unknown key {name!r}; known: {', '.join(defaults)}")
        wanted = type(defaults[name])
        chosen = defaults[name] == "auto" and type(value) is list
        if not (type(value) is wanted or (wanted is float and type(value) is int) or chosen):
            raise ValueError(
                f"{where}: {name}={value!r} is of type {type(value).__name__}, {wanted.__name__} is needed"
            )
    return given
