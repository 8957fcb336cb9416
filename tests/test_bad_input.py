"""For any input: the result asked for, or one line with the reason; never a partial record.

Each test tries thirty examples; in `make test-all`, a thousand.
"""

import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.tiny_run import tiny_config
from typer.testing import CliRunner

from memstudy import data
from memstudy.cli.main import app
from memstudy.kinds import parse_run

MANY = settings(
    max_examples=1000 if settings.get_current_profile_name() == "thousand" else 30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
VALID = [
    tiny_config(),
    {"kind": "hub_model", "experiment": "x", "model": "gpt2", "seq_len": 16, "batch_size": 1, "measure_steps": 1},
    {"kind": "layer", "experiment": "x", "attention": {"variant": "softmax"}, "seq_len": 16, "is_causal": True},
    {"kind": "prediction", "experiment": "x", "gpu": "T4", "of": tiny_config()},
]


@st.composite
def nearly_valid(draw) -> object:
    """A run's JSON with some fields changed, left out or added."""
    config = dict(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(config)) | st.text(max_size=8)) if config else "kind"
        if draw(st.booleans()):
            config.pop(name, None)
        else:
            config[name] = draw(values)
    return draw(st.just(config) | values)


@MANY
@given(nearly_valid())
def test_a_description_is_a_run_or_refused(config):
    try:
        run = parse_run(config)
    except ValueError:
        return
    assert parse_run(run.model_dump(mode="json")) == run


@MANY
@given(
    st.text()
    | st.binary()
    | nearly_valid().map(
        lambda config: json.dumps(config | {"kind": "nothing"} if isinstance(config, dict) else config)
    )
)
def test_a_file_that_is_no_run_gets_one_line_and_leaves_no_record(tmp_path, content):
    file = tmp_path / "run.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    done = CliRunner().invoke(app, ["run", str(file), "--results", str(tmp_path / "results")])
    assert done.exit_code == 2, done.output
    assert isinstance(done.exception, SystemExit)
    assert len(done.output.strip().splitlines()) == 1
    assert not list(tmp_path.glob("results/*"))


cells = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=10) | st.integers().map(str)


@MANY
@given(
    st.text()
    | st.binary()
    | st.lists(st.tuples(cells, cells), max_size=8).map(
        lambda rows: "sentence,label\n" + "\n".join(map(",".join, rows))
    )
)
def test_a_table_is_read_or_refused_in_one_line(tmp_path, content):
    file = tmp_path / "mine.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        said, columns = "mine.csv", data.load(str(file)).splits["train"].column_names
    except ValueError as error:
        said, columns = str(error), ["sentence", "label"]
    assert "mine.csv" in said
    assert len(said.splitlines()) == 1
    assert {"sentence", "label"} <= set(columns)


words = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=10)
options = st.sampled_from(
    ["--model", "--gpu", "--batch", "--seq-len", "--technique", "--optimizer", "--budget-gib", "-x", "--"]
)


@MANY
@given(st.sampled_from(["predict", "fit", "advise", "list", "report", "plan"]), st.lists(words | options, max_size=5))
def test_a_command_that_cannot_be_says_so_without_a_traceback(tmp_path, command, arguments):
    # "no" is not a model, study or scale, so no command starts to work.
    without = {"predict": ["--model", "no"], "fit": ["--model", "no"], "advise": ["--model", "no"], "report": ["no"]}
    done = CliRunner().invoke(app, [command, *arguments, *without.get(command, ["no", str(tmp_path / "plan")])])
    assert done.exit_code == 2, (done.output, done.exception)
    assert isinstance(done.exception, SystemExit)
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    "name", ["../../../etc/passwd", "/etc/passwd", "..", "glue/../../x", "a\x00b", "~root", "wikitext-2-v1/../.."]
)
def test_no_name_of_a_data_set_leads_out_of_its_folders(name, tmp_path, monkeypatch):
    monkeypatch.setenv("MEMSTUDY_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="data set"):
        data.load(name)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_no_experiment_writes_outside_the_results(tmp_path):
    file = tmp_path / "run.json"
    file.write_text(json.dumps(tiny_config(experiment="../../outside/<b>&\\input{x}")))
    done = CliRunner().invoke(app, ["run", str(file), "--results", str(tmp_path / "results")])
    assert done.exit_code == 0, done.output
    written = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.parts[0] for path in written} == {"run.json", "results"}
    (record,) = (tmp_path / "results").glob("*.json")
    assert re.fullmatch("[0-9a-f]{16}", record.stem)
