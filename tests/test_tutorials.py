"""The tutorials: their commands and their code print what the pages show."""

import doctest
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.pages import assert_shown, commands, write_files
from typer.testing import CliRunner

from memstudy.cli.main import app

ROOT = Path(__file__).parents[1]
TUTORIALS = ROOT / "docs" / "tutorials"
ASKED = "does_not_fit", "card", "attention"
STUDY = "study"


def read(name):
    return (TUTORIALS / f"{name}.rst").read_text("utf-8")


def answer(command):
    """What a command prints in a terminal of 100 columns."""
    program, *arguments = shlex.split(command)
    assert program == "memstudy"
    result = CliRunner(env={"COLUMNS": "100"}).invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("name", [*ASKED, STUDY])
def test_a_page_is_in_the_contents_and_shows_commands(name):
    assert f"   tutorials/{name}\n" in (ROOT / "docs" / "index.rst").read_text("utf-8")
    assert commands(read(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ASKED)
def test_commands_print_what_the_page_shows(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files(read(name), tmp_path)
    assert_shown(read(name), answer)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["does_not_fit", "attention"])
def test_code_prints_what_the_page_shows(name):
    examples = doctest.DocTestParser().get_doctest(read(name), {}, name, name, 0)
    assert examples.examples
    said = []
    failed, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(examples, out=said.append)
    assert not failed, "".join(said)


@pytest.mark.slow
def test_a_study_is_repeated_as_the_page_shows(tmp_path):
    """In a copy of the repository: a study writes below its root."""
    if shutil.which("latexmk") is None:
        pytest.skip("no TeX here: apt-get install latexmk texlive-latex-recommended lmodern")
    for part in ("memstudy", "notebooks", "params", "report", "results"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", "build"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    write_files(read(STUDY), tmp_path)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "COLUMNS": "100"}

    def run(command):
        program, *arguments = shlex.split(command)
        assert program == "memstudy"
        call = [sys.executable, "-m", "memstudy.cli", *arguments]
        done = subprocess.run(call, cwd=tmp_path, env=environment, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert_shown(read(STUDY), run)


def test_an_output_that_differs_is_found():
    page = ".. code-block:: console\n\n   $ memstudy a \\\n     b\n   one\n   ...\n   three\n\n   $ memstudy c\n"
    assert commands(page) == [("memstudy a   b", "one\n...\nthree"), ("memstudy c", "")]
    assert_shown(page, lambda command: "one\n2\n2\nthree  \n" if "a" in command.split() else "")
    with pytest.raises(AssertionError, match=re.escape("$ memstudy c")):
        assert_shown(page, lambda command: "one\n2\nthree")
