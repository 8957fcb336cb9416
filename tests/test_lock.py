"""The lock file: it pins all direct and indirect dependencies, and the installed versions match it."""

import importlib.metadata
import re
from pathlib import Path

import pytest
import yaml
from packaging.utils import canonicalize_name
from support.distributions import closure, declared

ROOT = Path(__file__).parents[1]
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
}
LATER = {"setuptools", "pip"}  # these make environments and are not pinned


def test_each_line_pins_one_version():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(PINS) == len(lines) > 100


@pytest.mark.parametrize(
    "requirement", declared("study", "test", "techniques", "bench", "cluster"), ids=lambda r: r.name
)
def test_what_is_declared_is_pinned_to_a_version_that_it_allows(requirement):
    assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)])


def test_what_is_installed_for_the_tests_is_what_is_pinned():
    needed = closure(declared("study", "test", "cluster"))
    assert len(needed) > 100
    here = {name: importlib.metadata.version(name) for name in needed}
    assert needed - PINS.keys() <= LATER
    # "2.13.0+cpu" is version 2.13.0, built for CPUs.
    off = {name: v for name, v in here.items() if name not in LATER and v.partition("+")[0] != PINS[name]}
    assert off == {}


def test_predicting_needs_nothing_of_the_studies():
    there = closure(declared())
    assert not there & {"jupyterlab", "snakemake", "flask", "sacrebleu", "pandas", "scipy", "matplotlib", "datasets"}


def test_conda_gets_the_same_pytorch():
    (pip,) = (
        each["pip"]
        for each in yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
        if isinstance(each, dict)
    )
    assert "--constraint constraints.txt" in pip
    assert [text for text in pip if text.startswith("torch")] == [f"torch=={PINS['torch']}"]
