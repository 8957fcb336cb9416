"""The command line: bad input gives one line on stderr and exit status 2; help teaches; lists match the registries."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from support.command_line import assert_one_line, invoke
from support.tiny_run import tiny_config

from memstudy import records
from memstudy.attention import ATTENTION
from memstudy.data import DATASETS
from memstudy.project import scales, studies
from memstudy.techniques import TECHNIQUES

ROOT = Path(__file__).parents[1]
VALID = tiny_config()


@pytest.fixture
def run(tmp_path):
    """Run `memstudy run` on a JSON value and return the result; no record may be left."""

    def given(value: object):
        path = tmp_path / "run.json"
        path.write_text(json.dumps(value))
        result = invoke("run", path, "--results", tmp_path / "results")
        assert list((tmp_path / "results").glob("*.json")) == []
        return result

    return given


WINDOW = {"variant": "window", "window": 8}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"techniques": ["bf17"]}, ["unknown technique 'bf17'", *TECHNIQUES]),
        ({"techniques": ["accumulation=4"]}, ["accumulation=4 does not divide batch_size=2"]),
        ({"techniques": "bf16"}, ["techniques='bf16'"]),
        ({"attention": {"variant": "hyena"}}, ["unknown attention variant 'hyena'", *ATTENTION]),
        ({"attention": WINDOW | {"size": 8}}, ["attention 'window'", "'size'", "its settings: ", "window"]),
        ({"attention": WINDOW | {"window": 0}}, ["window=0", "a whole number"]),
        ({"attention": WINDOW | {"window": 8.5}}, ["window=8.5", "a whole number"]),
        ({"attention": WINDOW | {"window": "wide"}}, ["window='wide'", "a whole number"]),
        ({"attention": "softmax"}, ["attention='softmax'"]),
        ({"batch_size": -1}, ["batch_size=-1", "greater than 0"]),
        ({"learning_rate": float("inf")}, ["learning_rate=inf", "finite number"]),
        ({"train_steps": 1, "dataset": "moby"}, ["unknown data set 'moby'", *DATASETS]),
        ({"train_steps": 1, "dataset": "miniature"}, ["'miniature' has content hash", "planned with none"]),
        ({"dropout": 0.1}, ["unknown field 'dropout' of a language_model run", *VALID]),
        ({"kind": "image_model"}, ["unknown kind of run 'image_model'", "language_model"]),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_choice_that_cannot_be_is_named_with_its_value_and_what_is_allowed(run, change, words):
    assert_one_line(run(VALID | change), *words)


@pytest.mark.parametrize("value", [[], None, "language_model", 3, {}, [VALID]], ids=str)
def test_what_is_no_description_of_a_run_is_refused(run, value):
    assert_one_line(run(value), "unknown kind of run", "known: language_model")


def test_a_missing_field_is_named_without_the_whole_run_being_repeated(run):
    result = run({name: value for name, value in VALID.items() if name != "n_layers"})
    assert result.stderr == "error: n_layers: Field required\n"


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "not JSON"),
        (b"kind: language_model", "not JSON"),
        (json.dumps(VALID).encode()[:-1], "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"experiment": "\xff"}', "not UTF-8 text"),
    ],
    ids=["empty", "yaml", "truncated", "deep", "latin-1"],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, content, word):
    path = tmp_path / "run.json"
    path.write_bytes(content)
    assert_one_line(invoke("run", path, "--results", tmp_path), str(path), word)


def test_a_file_that_is_not_there_is_named(tmp_path):
    assert_one_line(invoke("run", tmp_path / "none.json"), "none.json", "No such file", "a JSON file is needed")
    assert_one_line(invoke("run", tmp_path), str(tmp_path), "Is a directory", "a JSON file is needed")


@pytest.mark.parametrize("place", ["{}/file", "{}/file/below", "/proc/nowhere"])
def test_a_results_folder_that_cannot_be_written_is_named(tmp_path, place):
    (tmp_path / "file").write_text("")
    (tmp_path / "run.json").write_text(json.dumps(VALID))
    place = place.format(tmp_path)
    result = invoke("run", tmp_path / "run.json", "--results", place)
    assert_one_line(result, f"results folder {place}: cannot be written", "choose another")


def test_a_data_folder_that_is_not_there_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setenv("MEMSTUDY_DATA", str(tmp_path / "nowhere"))
    result = run(VALID | {"train_steps": 1, "dataset": "polish-books"})
    assert_one_line(result, "MEMSTUDY_DATA", str(tmp_path / "nowhere"))
    assert_one_line(invoke("list", "datasets"), "MEMSTUDY_DATA", str(tmp_path / "nowhere"))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with good and bad parameter files."""
    copy = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "memstudy", copy / "memstudy", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "notebooks").mkdir()
    shutil.copy(ROOT / "notebooks" / "lab4_grid.ipynb", copy / "notebooks")
    for scale, text in {
        "good": b"n_layers: 3\n",
        "type": b"n_layers: three\n",
        "bytes": b"n_layers: \xff\n",
    }.items():
        (copy / "params" / scale).mkdir(parents=True)
        (copy / "params" / scale / "lab4_grid.yaml").write_bytes(text)
    return copy


def report(project: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run `memstudy report` in its own process, in the copy of the project."""
    command = [sys.executable, "-m", "memstudy.cli", "report", *arguments]
    environment = os.environ | {"PYTHONPATH": str(project)}
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lab5"], "unknown study 'lab5'; known: lab4_grid"),
        (["--scale", "huge"], "no study has parameters at scale 'huge'"),
        (["--scale", "type"], "type/lab4_grid.yaml: n_layers='three' is of type str, int is needed"),
        (["--scale", "bytes"], "bytes/lab4_grid.yaml: not YAML: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_report_that_cannot_be_is_one_line_before_anything_is_run(project, arguments, said):
    done = report(project, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {said}")
    assert not (project / "build").exists()


def test_a_report_whose_records_cannot_be_written_is_one_line(project):
    (project / "results").write_text("")
    done = report(project, "--scale", "good")
    (project / "results").unlink()
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: results folder {project}/results: cannot be written")
    assert len(done.stderr.splitlines()) == 1


def project_of(folder: Path, **studies: str) -> None:
    """Make `folder` a project whose studies each sweep one run and then execute the given code."""
    shutil.copytree(ROOT / "memstudy", folder / "memstudy", ignore=shutil.ignore_patterns("__pycache__"))
    parameters = 'results_dir: str = "../results"\nout_dir: str = ".."\nrun_missing: bool = True'
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for place in ("notebooks", "params/full"):
        (folder / place).mkdir(parents=True)
    for stem, then in studies.items():
        sweep = f"""from memstudy.study import Study
from memstudy.kinds import parse_run

Study("{stem}", globals()).sweep([parse_run({VALID | {"experiment": stem}})])"""
        cells = [
            nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
            *map(nbformat.v4.new_code_cell, (sweep, then)),
        ]
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / "notebooks" / f"{stem}.ipynb")
        (folder / "params" / "full" / f"{stem}.yaml").write_text("{}")


@pytest.mark.slow
def test_a_notebook_that_raises_takes_no_other_down_and_costs_no_record(tmp_path):
    project_of(tmp_path, bad="1 / 0", good="")
    typeset = tmp_path / "report" / "tex.sh"  # stands in for LaTeX
    typeset.parent.mkdir()
    typeset.write_text("#!/bin/sh\n")
    typeset.chmod(0o755)
    done = report(tmp_path, "--scale", "full")
    assert done.returncode == 1
    assert "failed: bad; the failing cell is marked in build/" in done.stderr.splitlines()
    assert "ZeroDivisionError" in (tmp_path / "build" / "bad.ipynb").read_text()
    assert (tmp_path / "build" / "good.ipynb").exists()
    before = {path: path.read_bytes() for path in tmp_path.glob("results/*/*.json")}
    assert {path.parent.name for path in before} == {"bad", "good"}
    notebook = tmp_path / "notebooks" / "bad.ipynb"
    notebook.write_text(notebook.read_text().replace("1 / 0", "1 / 1"))
    again = report(tmp_path, "bad", "--scale", "full")
    assert (again.returncode, "failed: " in again.stderr) == (0, False)
    assert {path: path.read_bytes() for path in tmp_path.glob("results/*/*.json")} == before


@pytest.mark.slow
def test_a_study_without_all_its_records_is_left_out_of_the_paper(tmp_path):
    project_of(tmp_path, young="")
    done = report(tmp_path, "--scale", "full", "--reference")
    assert "1 of 1 runs have no record in " in done.stderr
    assert done.stderr.splitlines()[-1] == "left out, not all records are there: young"
    assert done.returncode == 1  # nothing is left to typeset
    named = report(tmp_path, "young", "--scale", "full", "--reference")
    assert "left out" not in named.stderr
    assert named.stderr.splitlines()[-1].startswith("failed: young; ")


# Help and lists


@pytest.mark.parametrize(
    ("command", "taught"),
    [
        ([], ["list studies", "report lab4_grid", "run CONFIG.json", "list runs", "finished runs are never repeated"]),
        (
            ["run"],
            ['"kind": "language_model"', '"techniques": ["bf16"]', "--results", "Exit status", "2 for bad input"],
        ),
        (["report"], ["params/SCALE/<study>.yaml", "build/report.pdf", "--scale", "--reference", "run nothing"]),
        (["validate"], ["memstudy validate --quick", "in a fresh process", "--results", "can be contributed"]),
        (["list"], ["variants", "techniques", "datasets", "studies", "runs", "--results"]),
    ],
    ids=["memstudy", "run", "report", "validate", "list"],
)
def test_help_teaches(command, taught):
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    for words in taught:
        assert words in text


def test_the_run_that_help_shows_is_a_valid_one():
    from memstudy.kinds import parse_run

    text = " ".join(invoke("run", "--help").stdout.split())
    example = '{"kind"' + text.partition('{"kind"')[2].partition("}")[0] + "}"
    assert parse_run(json.loads(example)).experiment == "mine"


@pytest.mark.parametrize(
    ("what", "names"),
    [("variants", ATTENTION), ("techniques", TECHNIQUES), ("datasets", DATASETS), ("studies", studies())],
)
def test_a_list_has_every_name_of_its_registry(what, names):
    result = invoke("list", what)
    assert result.exit_code == 0
    _, *lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(names)


def test_the_list_of_studies_has_their_scales():
    assert ", ".join(scales("lab4_grid")) in invoke("list", "studies").stdout


def test_the_list_of_runs_has_the_records_there_are(tmp_path):
    assert invoke("list", "runs", "--results", tmp_path).stdout == "no runs yet\n"
    nothing = {"metrics": {}, "curves": {}, "data": {}}
    record = records.perform(VALID, tmp_path / "lab4_grid", lambda checkpoints: nothing)
    (line,) = invoke("list", "runs", "--results", tmp_path).stdout.splitlines()[1:]
    for word in ("lab4_grid", record["run_id"], "tiny", "ok", record["provenance"]["ended"][:19]):
        assert word in line


def test_an_unknown_list_is_refused_with_those_there_are():
    result = invoke("list", "nonsense")
    assert result.exit_code == 2
    assert "'variants', 'techniques', 'datasets', 'gpus', 'models', 'studies', 'runs'" in " ".join(
        result.stderr.split()
    )
