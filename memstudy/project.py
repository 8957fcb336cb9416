"""A study's parameters: the notebook's tagged cell declares them, ``params/<scale>/<stem>.yaml`` sets them."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import yaml

from memstudy.machine import IN_REPOSITORY, ROOT

SMOKE = "smoke"  # the scale of a notebook's own defaults: a minute, offline
SYNTHESIS = "synthesis"  # the notebook over all studies


def notebook_parameters(stem: str) -> dict[str, object]:
    """The defaults in the parameters cell of ``notebooks/<stem>.ipynb``, by name.

    Raises
    ------
    ValueError
        If the notebook is missing, or none of its cells is tagged ``parameters``.
    """
    return {name: default for name, (_, default) in _parameters_cell(stem).items()}


def _parameters_cell(stem: str) -> dict[str, tuple[ast.expr, object]]:
    """Annotation and default of each parameter."""
    path = ROOT / "notebooks" / f"{stem}.ipynb"
    if not path.exists():
        raise ValueError(f"unknown study {stem!r}; known: {', '.join(studies())}")
    # Without nbformat: importing its validator takes two seconds.
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            return parameters_in("".join(cell["source"]))
    raise ValueError(f"{path.name}: no cell is tagged 'parameters'")


def parameters_in(source: str) -> dict[str, tuple[ast.expr, object]]:
    """Annotation and default of each parameter in ``source``, the text of a parameters cell."""
    assigned = (statement for statement in ast.parse(source).body if isinstance(statement, ast.AnnAssign))
    return {s.target.id: (s.annotation, ast.literal_eval(s.value)) for s in assigned}


def studies() -> list[str]:
    """The stems of all studies: every notebook except the synthesis over them.

    Raises
    ------
    ValueError
        When the package was installed without its repository.
    """
    if not IN_REPOSITORY:
        raise ValueError(
            f"studies are notebooks in memstudy's repository, and {Path(__file__).parent} was installed without them: "
            "clone the repository, call make there, and use its .venv/bin/memstudy"
        )
    return sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb") if path.stem != SYNTHESIS)


def scales(stem: str) -> list[str]:
    """The scales of study ``stem``: those with a parameters file, and ``smoke``, the notebook's defaults."""
    return [*sorted(path.parent.name for path in (ROOT / "params").glob(f"*/{stem}.yaml")), SMOKE]


def read_parameters(stem: str, scale: str) -> dict[str, object]:
    """The parameters set by ``params/<scale>/<stem>.yaml``, checked against the notebook's; none at ``smoke`` scale.

    Raises
    ------
    ValueError
        If the file is missing or is not a YAML mapping, for a key that the notebook does not have, and for a value
        whose type differs from the default's.
    """
    cell = _parameters_cell(stem)
    if scale == SMOKE:
        return {}
    path = ROOT / "params" / scale / f"{stem}.yaml"
    if scale not in scales(stem):
        raise ValueError(f"study {stem} has no scale {scale!r}; there are: {', '.join(scales(stem))}")
    return check_parameters(path.read_bytes(), cell, where=f"{scale}/{path.name}")


def check_parameters(text: str | bytes, cell: dict[str, tuple[ast.expr, object]], *, where: str) -> dict[str, object]:
    """The mapping in the YAML ``text``, checked against a parameters cell; see `read_parameters`.

    A mapping annotated ``dict`` may only have its default's keys; one annotated ``dict[str, ...]`` may have any keys.
    Values of the mapping and elements of lists must have types found in the default.
    """
    try:
        given = yaml.safe_load(text)
    except Exception as error:  # for ill-formed scalars, PyYAML also raises KeyError, AttributeError and others
        raise ValueError(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    if given is None:  # an empty file, or only comments
        return {}
    if not isinstance(given, dict):
        raise ValueError(f"{where}: a mapping of parameters is needed, got {type(given).__name__}")
    for name, value in given.items():
        if name not in cell:
            raise ValueError(f"{where}: unknown key {name!r}; known: {', '.join(cell)}")
        annotation, default = cell[name]
        if not (default == "auto" and type(value) is list):
            _check(value, [default], annotation, where, name)
    return given


def _check(value: object, like: list, annotation: ast.expr, where: str, name: str) -> None:
    """Raise ``ValueError`` unless ``value`` has type and keys of one of ``like``; an empty ``like`` allows anything."""
    kinds = {type(other) for other in like}
    if kinds and not (type(value) in kinds or (float in kinds and type(value) is int)):
        wanted = " or ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(f"{where}: {name}={value!r} is of type {type(value).__name__}, {wanted} is needed")
    like = [other for other in like if type(other) is type(value)]
    of_any_key = isinstance(annotation, ast.Subscript)
    inner = annotation.slice if of_any_key else annotation
    inner = inner.elts[-1] if isinstance(inner, ast.Tuple) else inner
    if type(value) is list:
        for number, element in enumerate(value):
            _check(element, [one for other in like for one in other], inner, where, f"{name}[{number}]")
    elif type(value) is dict:
        known = list(dict.fromkeys(key for other in like for key in other))
        for key, element in value.items():
            if known and not of_any_key and key not in known:
                raise ValueError(f"{where}: unknown key {key!r} in {name}; known: {', '.join(map(str, known))}")
            same = [other[key] for other in like if not of_any_key and key in other]
            _check(element, same or [one for other in like for one in other.values()], inner, where, f"{name}[{key!r}]")
