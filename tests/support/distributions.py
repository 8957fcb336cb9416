"""What the project declares that it needs, and environments made of installed distributions."""

import importlib.metadata
import tomllib
import venv
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]


def declared(*extras: str) -> list[Requirement]:
    """Return the project's dependencies, with those of `extras`."""
    texts = [*PROJECT["dependencies"], *(text for name in extras for text in PROJECT["optional-dependencies"][name])]
    return [requirement for text in texts if (requirement := Requirement(text)).name != "memstudy"]


def closure(requirements: list[Requirement]) -> set[str]:
    """Return the installed distributions that `requirements` need, directly or not, on this platform."""
    found: set[tuple[str, str]] = set()
    left = [(canonicalize_name(each.name), extra) for each in requirements for extra in ("", *each.extras)]
    while left:
        name, extra = left.pop()
        if (name, extra) in found:
            continue
        found.add((name, extra))
        for text in importlib.metadata.requires(name) or []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                left += [(canonicalize_name(needed.name), each) for each in ("", *needed.extras)]
    return {name for name, _ in found}


def environment(folder: Path, names: set[str]) -> Path:
    """Make a virtual environment with the distributions `names` alone, as links to those here; return its Python."""
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    for distribution in map(importlib.metadata.distribution, names):
        for top in {path.parts[0] for path in distribution.files} - {"..", "__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(distribution.locate_file(top))
    return folder / "bin" / "python"
