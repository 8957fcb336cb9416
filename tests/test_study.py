"""Sweeps that are killed, resumed and retried, with real runs; and a study's output from their records."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_run import SWEEP, tiny_config, tiny_run

from memstudy import launcher, machine, records
from memstudy.kinds import PredictionRun
from memstudy.latex import escape
from memstudy.project import notebook_parameters
from memstudy.study import Study

ROOT = Path(__file__).parents[1]


def make_study(folder: Path, *, run_missing: bool = True) -> Study:
    places = {"results_dir": str(folder), "out_dir": str(folder), "run_missing": run_missing}
    return Study("lab4_grid", notebook_parameters("lab4_grid") | places)


def records_in(folder: Path) -> dict[str, dict]:
    return {record["run_id"]: record for record in records.read_records(folder / "lab4_grid")}


def started(records: dict[str, dict]) -> dict[str, str]:
    return {name: record["provenance"]["started"] for name, record in records.items()}


@pytest.mark.slow
def test_a_sweep_killed_half_way_goes_on_where_it_stopped(tmp_path):
    command = [sys.executable, "-c", SWEEP, tmp_path, json.dumps([tiny_config(seed=n) for n in range(4)])]
    driver = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    for _ in range(600):
        if len(list(tmp_path.glob("lab4_grid/*.json"))) >= 2:
            break
        time.sleep(0.1)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    before = started(records_in(tmp_path))
    assert 2 <= len(before) < 4

    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(again.stdout) == ["ok"] * 4
    after = started(records_in(tmp_path))
    assert len(after) == 4
    assert {name: after[name] for name in before} == before, "a finished run was repeated"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


PLANNED = (
    tiny_run(experiment="baseline"),
    tiny_run(experiment="over 50 % of it", budget_mib=0.1),
    tiny_run(experiment="offload_activations", techniques=("offload_activations",)),
    tiny_run(experiment="stale", measure_steps=0, train_steps=1, dataset="miniature", data_hash="stale"),
    tiny_run(experiment="last", seed=1, techniques=("bf16", "checkpointing")),
)


@pytest.fixture(scope="module")
def swept(folder):
    """A study after a sweep over runs of every status, and the rows."""
    study = make_study(folder)
    with pytest.warns(UserWarning, match="run [0-9a-f]{16}: exit status 2; error: data set 'miniature'"):
        rows = study.sweep(PLANNED)
    return study, rows


needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="offloading can run here")


@needs_no_cuda
def test_a_sweep_has_one_row_a_run_in_order_whatever_became_of_it(swept):
    _, rows = swept
    assert rows["experiment"].tolist() == [run.experiment for run in PLANNED]
    assert rows["status"].tolist() == ["ok", "oom", "unavailable", "failed", "ok"]
    assert rows["run_id"].tolist() == [records.run_id(run.model_dump(mode="json")) for run in PLANNED]
    ran = rows["status"] == "ok"
    assert (rows.loc[ran, "peak_allocated_mib"] > 0).all()
    assert rows.loc[~ran, "peak_allocated_mib"].isna().all()
    assert (rows.loc[ran, "reason"] == "").all()
    assert (rows.loc[~ran, "reason"] != "").all()
    assert rows["techniques"].tolist() == ["", "", "offload_activations", "", "bf16+checkpointing"]
    assert set(rows["device"]) == {machine.device()}
    assert "memory_timeline" in rows["curves"][0]


@needs_no_cuda
def test_only_the_failed_run_is_tried_again(swept, folder):
    before = started(records_in(folder))
    with pytest.warns(UserWarning, match="exit status 2"):
        rows = make_study(folder).sweep(PLANNED)
    after = started(records_in(folder))
    repeated = [name for name in after if after[name] != before[name]]
    assert repeated == rows.loc[rows["status"] == "failed", "run_id"].tolist()


def test_a_truncated_record_is_run_again_and_the_others_are_not(swept, folder, tmp_path):
    shutil.copytree(folder / "lab4_grid", tmp_path / "lab4_grid")
    before = started(records_in(tmp_path))
    planned = [PLANNED[0], PLANNED[4]]
    spoilt, kept = (records.run_id(run.model_dump(mode="json")) for run in planned)
    path = tmp_path / "lab4_grid" / f"{spoilt}.json"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.warns(UserWarning, match=f"{spoilt}.json is not a whole record: kept as {spoilt}.json.corrupt"):
        rows = make_study(tmp_path).sweep(planned)
    assert rows["status"].tolist() == ["ok", "ok"]
    after = started(records_in(tmp_path))
    assert after[spoilt] > before[spoilt]
    assert after[kept] == before[kept]


def from_another_machine(folder: Path, place: Path) -> None:
    """Copy the baseline's record into `place` as if another machine had written it."""
    place.mkdir()
    record = records_in(folder)[records.run_id(PLANNED[0].model_dump(mode="json"))]
    records.write_record(place, record | {"provenance": record["provenance"] | {"device": "another GPU"}})


def test_timings_of_another_machine_are_used_only_when_nothing_may_be_run(swept, folder, tmp_path):
    from_another_machine(folder, tmp_path / "lab4_grid")
    rows = make_study(tmp_path, run_missing=False).sweep(PLANNED[:1])
    assert rows["device"].tolist() == ["another GPU"]
    rows = make_study(tmp_path).sweep(PLANNED[:1])
    assert rows["device"].tolist() == [machine.device()]
    assert len(list(tmp_path.glob("lab4_grid/*.json"))) == 2
    rows = make_study(tmp_path, run_missing=False).sweep(PLANNED[:1])
    assert rows["device"].tolist() == [machine.device()]


def test_a_row_without_times_may_come_from_another_machine_if_this_one_has_none(swept, folder, tmp_path):
    from_another_machine(folder, tmp_path / "lab4_grid")
    assert make_study(tmp_path).sweep(PLANNED[:1], any_machine=True)["device"].tolist() == ["another GPU"]
    name = records.run_id(PLANNED[0].model_dump(mode="json"))
    shutil.copy(folder / "lab4_grid" / f"{name}.json", tmp_path / "lab4_grid" / f"{name}-here.json")
    assert make_study(tmp_path).sweep(PLANNED[:1], any_machine=True)["device"].tolist() == [machine.device()]


def test_where_nothing_may_be_run_the_machine_with_most_records_is_used_alone(swept, folder, tmp_path):
    place = tmp_path / "lab4_grid"
    from_another_machine(folder, place)
    elsewhere = records_in(folder)[records.run_id(PLANNED[4].model_dump(mode="json"))]
    records.write_record(place, elsewhere | {"provenance": elsewhere["provenance"] | {"device": "another GPU"}})
    shutil.copy(folder / "lab4_grid" / f"{elsewhere['run_id']}.json", place / "of_here.json")
    rows = make_study(tmp_path, run_missing=False).sweep([PLANNED[0], PLANNED[4]])
    assert rows["device"].tolist() == ["another GPU", "another GPU"]


@pytest.mark.parametrize(
    ("gpu", "changed", "reused"),
    [("T4", {}, True), ("", {}, False), ("T4", {"torch": "0.1"}, False)],
    ids=str,
)
def test_another_machines_prediction_is_used_when_this_one_would_predict_the_same(gpu, changed, reused, tmp_path):
    prediction = PredictionRun(experiment="foretold", of=tiny_run(), gpu=gpu)
    record = records.perform(
        prediction.model_dump(mode="json"), tmp_path / "lab4_grid", lambda _: prediction.execute(tmp_path)
    )
    where = record["provenance"] | {"device": "another GPU", "packages": record["provenance"]["packages"] | changed}
    (path,) = tmp_path.glob("lab4_grid/*.json")
    path.unlink()
    records.write_record(path.parent, record | {"provenance": where})
    study = make_study(tmp_path)
    assert study.sweep([prediction])["device"].tolist() == ["another GPU" if reused else machine.device()]
    study.values({})
    values = read_values(tmp_path)
    assert (values["lab4_grid.n_runs"], values["lab4_grid.n_predictions"]) == ("0", "1")
    assert values["lab4_grid.device"] == "nothing was run"
    assert "foretold (predicted): " in (tmp_path / "report/tables/lab4_grid_provenance.tex").read_text("utf-8")


def test_missing_rows_are_counted_and_named_when_nothing_may_be_run(swept, folder, tmp_path):
    planned = [PLANNED[0], tiny_run(experiment="new", seed=5), tiny_run(experiment="newer", seed=6)]
    first = records.run_id(planned[1].model_dump(mode="json"))
    with pytest.raises(ValueError, match=r"^2 of 3 runs have no record in ") as caught:
        make_study(folder, run_missing=False).sweep(planned)
    assert str(folder / "lab4_grid") in str(caught.value)
    assert f"(first: new, run {first}): run the study at this scale first" in str(caught.value)
    with pytest.raises(ValueError, match=r"^3 of 3 runs"):
        make_study(tmp_path / "nowhere", run_missing=False).sweep(planned)
    assert not (tmp_path / "nowhere").exists()


def test_what_another_study_has_run_is_not_run_again_and_counts_there(swept, folder, tmp_path):
    shutil.copytree(folder / "lab4_grid", tmp_path / "memory_ablation")
    study = make_study(tmp_path)
    assert study.sweep([PLANNED[0]])["status"].tolist() == ["ok"]
    assert not list(tmp_path.glob("lab4_grid/*.json"))
    study.values({})
    assert read_values(tmp_path)["lab4_grid.n_runs"] == "0"
    assert r"\run{memory_ablation}" in (tmp_path / "report/tables/lab4_grid_provenance.tex").read_text("utf-8")


def test_a_run_asked_for_twice_is_one_row(swept, folder):
    rows = make_study(folder, run_missing=False).sweep([PLANNED[0], PLANNED[4], PLANNED[0]])
    assert rows["experiment"].tolist() == ["baseline", "last"]


def test_a_study_that_does_not_exist_and_a_folder_that_cannot_be_written_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"unknown study 'lab5'; known: .*lab4_grid"):
        Study("lab5", {})
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=f"results folder {tmp_path}/file/lab4_grid: cannot be written"):
        make_study(tmp_path / "file")


def test_unknown_published_figures_are_named_with_those_there_are(tmp_path):
    study = make_study(tmp_path)
    assert {"system", "metric", "value"} <= set(study.published("lab4").columns)
    with pytest.raises(ValueError, match="no published figures 'lab5'; there are: .*lab4"):  # noqa: RUF043
        study.published("lab5")


# A study's output


@pytest.fixture(scope="module")
def printed(swept, folder):
    """The folder with all kinds of output of a study with awkward names."""
    study, rows = swept
    frame = rows.set_index("experiment")[["status", "peak_allocated_mib", "reason"]]
    frame.columns = ["status & co.", "peak_{max} [MiB] #1", "reason ~ 100 % \\ $x^2$"]
    study.table(frame, "awkward", 2)
    study.table(frame.iloc[:, :2], "plain", {"peak_{max} [MiB] #1": ".1f"})
    figure, axes = plt.subplots(figsize=(2, 2))
    axes.plot([1, 2])
    study.figure(figure, "line")
    plt.close(figure)
    peaks = frame["peak_{max} [MiB] #1"]
    study.values({"awkward": "50 % & more: a_b #1 {x} $3 ~ 2^20 \\ ± 1–2 ×", "plain": "1,098", "peak_mib": peaks})
    return folder


def test_claims_are_counted_and_their_rows_are_in_the_ledger(tmp_path):
    study = make_study(tmp_path)
    rows = [
        ("saves 50 %", "50 %", "49 %", "48 %", "reproduced"),
        ("is faster", "2 ×", "–", "1 ×", "not reproduced"),
        ("is better & cheaper", "yes", "–", "–", "not testable here"),
        ("is cheaper", "yes", "–", "no", "not reproduced"),
    ]
    study.claims(rows)
    study.values({})
    (values,) = tmp_path.rglob("report/values/lab4_grid.tex")
    told = read_values(values.parents[2])
    counts = {"claims": 4, "reproduced": 1, "partly": 0, "not_reproduced": 2, "not_testable_here": 1}
    assert {name: told[f"lab4_grid.n_{name}"] for name in counts} == {
        name: str(count) for name, count in counts.items()
    }
    text = (values.parents[1] / "tables" / "lab4_grid_ledger.tex").read_text("utf-8")
    assert r"saves 50 \%" in text
    assert r"is better \& cheaper" in text
    assert text.count("not reproduced") == 2


def test_trade_offs_have_a_row_for_what_was_measured(tmp_path):
    rows = make_study(tmp_path).trade_offs(
        memory=pd.Series({"plain": 1.0, "lean": 0.5, "absent": None}), time=pd.Series({"plain": 1.0, "lean": 1.2}),
        quality_lost=pd.Series({"plain": 0.0, "absent": 3.0}),
    )  # fmt: skip
    assert sorted(rows.index) == ["lean", "plain"]
    assert set(rows["device"]) == {"here"}
    (path,) = tmp_path.rglob("report/tradeoffs/lab4_grid.csv")
    pd.testing.assert_frame_equal(pd.read_csv(path, index_col="technique"), rows, check_dtype=False)


def test_trade_offs_on_a_gpu_are_rows_of_their_own_with_the_quality_that_was_measured(tmp_path):
    here = pd.DataFrame({"memory": {"plain": 1.0, "lean": 0.5}, "time": {"plain": 1.0, "lean": 1.2}})
    there = pd.DataFrame({"memory": {"lean": 0.6, "absent": None}, "time": {"lean": 0.8, "absent": 1.0}})
    quality = pd.Series({"lean": 3.0})
    rows = make_study(tmp_path).trade_offs(
        memory=here["memory"], time=here["time"], quality_lost=quality, predicted={"T4": there}
    )
    assert rows.index.to_list() == ["plain", "lean", "lean"]
    assert rows[rows["device"] == "T4"].to_dict("records") == [
        {"memory": 0.6, "time": 0.8, "quality_lost": 3.0, "device": "T4"}
    ]


def test_a_verdict_of_another_kind_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="verdict 'maybe': one of reproduced, partly, not reproduced, not testable here"
    ):
        make_study(tmp_path).claims([("saves", "–", "–", "–", "maybe")])


def read_values(folder: Path) -> dict[str, str]:
    text = (folder / "report/values/lab4_grid.tex").read_text("utf-8")
    assert all(re.fullmatch(r"\\defval\{.+?\}\{.*\}|\\defcolumn\{.+?\}", line) for line in text.splitlines())
    return dict(re.findall(r"\\defval\{(.+?)\}\{(.*)\}", text))


def test_values_are_those_given_and_what_every_caption_says(printed):
    values = read_values(printed)
    assert values["lab4_grid.plain"] == "1,098"
    state = records.git_state()
    assert values["lab4_grid.commit"] == state["commit"][:7] + "+" * state["dirty"]
    assert values["lab4_grid.dataset"] == "random tokens"
    assert values["lab4_grid.device"] == escape(machine.device())
    assert values["lab4_grid.n_runs"] == str(len(PLANNED))
    assert values["lab4_grid.n_predictions"] == "0"
    assert values["lab4_grid.vocab_size"] == "10,000"
    assert values["lab4_grid.slowest"] == "1.5"
    assert values["lab4_grid.paper_gpu"] == "RTX5090"
    assert "lab4_grid.results_dir" not in values
    assert re.fullmatch("[0-9a-f]{8}", values["lab4_grid.parameters_hash"])


def test_each_cell_of_a_table_and_each_row_of_a_series_is_a_value(swept, printed):
    values, peaks = read_values(printed), swept[1].set_index("experiment")["peak_allocated_mib"]
    assert values["lab4_grid.plain.baseline.status_co"] == "ok"
    assert values["lab4_grid.plain.baseline.peak_max_mib_1"] == f"{peaks['baseline']:.1f}"
    assert values["lab4_grid.awkward.baseline.peak_max_mib_1"] == f"{peaks['baseline']:,.2f}"
    assert values["lab4_grid.peak_mib.baseline"] == f"{peaks['baseline']:,.0f}"
    assert values["lab4_grid.peak_mib.over_50_percent_of_it"] == "–"


def test_the_parameters_hash_tells_parameters_apart_but_not_places(swept, folder, tmp_path):
    hashes = []
    for out, changed in (("a", {}), ("b", {}), ("c", {"slowest": 0.5})):
        places = {"results_dir": str(folder), "out_dir": str(tmp_path / out), "run_missing": False}
        study = Study("lab4_grid", notebook_parameters("lab4_grid") | places | changed)
        study.sweep(PLANNED[:1])
        study.values({})
        hashes.append(read_values(tmp_path / out)["lab4_grid.parameters_hash"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_study_that_only_predicts_says_that_nothing_was_run(tmp_path):
    make_study(tmp_path).values({"whole_mib": "2,661"})
    (out,) = {path.parents[2] for path in tmp_path.rglob("report/values/lab4_grid.tex")}
    values = read_values(out)
    assert values["lab4_grid.whole_mib"] == "2,661"
    assert values["lab4_grid.device"] == "nothing was run"
    assert values["lab4_grid.commit"].rstrip("+") == records.git_state()["commit"][:7]
    provenance = (out / "report/tables/lab4_grid_provenance.tex").read_text("utf-8")
    assert "Nothing was run; predicted with memstudy" in provenance
    assert "torch" in provenance


def plain(latex: str) -> str:
    return latex.replace(r"\allowbreak{}", "")


def test_provenance_has_the_machine_the_versions_and_every_run(printed):
    text = plain((printed / "report/tables/lab4_grid_provenance.tex").read_text("utf-8"))
    assert f"Machine: {escape(machine.device())}" in text
    assert f"torch {torch.__version__}" in text
    assert escape("slowest = 1.5") in text
    assert "results" not in text.partition("Parameters:")[2].partition("\n")[0]
    identifiers = [records.run_id(run.model_dump(mode="json")) for run in PLANNED]
    assert re.findall(r"\\run{lab4_grid}{(\w+)}", text) == identifiers
    state = records.git_state()
    assert rf"Commit \texttt{{{state['commit'][:7]}{'+' * state['dirty']}}}, " in text
    assert rf"baseline: \run{{lab4_grid}}{{{identifiers[0]}}}; over 50 \% of it (oom): \run" in text


def test_provenance_names_the_data_of_trained_rows_once(swept, folder, tmp_path):
    """The data's name and hash appear once for two records that differ in the seed."""
    shutil.copytree(folder / "lab4_grid", tmp_path / "lab4_grid")
    data = {"name": "some_books", "source": "folder", "revision": "unversioned", "content_hash": "0123456789abcdef"}
    (baseline,) = (r for r in records_in(folder).values() if r["config"]["experiment"] == "baseline")
    planned = [tiny_run(experiment="trained", seed=seed) for seed in (3, 4)]
    for run in planned:
        config = run.model_dump(mode="json")
        trained = baseline | {"config": config, "run_id": records.run_id(config), "data": data}
        records.write_record(tmp_path / "lab4_grid", trained)
    study = make_study(tmp_path, run_missing=False)
    study.sweep([PLANNED[0], *planned])
    study.values({})
    assert read_values(tmp_path)["lab4_grid.dataset"] == r"some\_books (folder)"
    text = plain((tmp_path / "report/tables/lab4_grid_provenance.tex").read_text("utf-8"))
    assert text.count(r"Data: some\_books, from folder, revision unversioned, SHA-256 0123456789abcdef.") == 1


def test_a_table_prints_what_is_missing_as_a_dash_and_numbers_to_the_right(printed):
    text = (printed / "report/tables/lab4_grid_plain.tex").read_text("utf-8")
    assert text.startswith(r"\begin{tabular}{llr}")
    assert re.search(r"^over 50 \\% of it & oom & – \\\\$", text, re.MULTILINE)
    assert r"peak\_\{max\} [MiB] \#1" in text


def test_a_figure_is_written_as_pdf_and_png_and_the_same_rows_give_the_same_pdf(printed, tmp_path):
    pdf = printed / "figures/lab4_grid_line.pdf"
    assert pdf.read_bytes().startswith(b"%PDF-")
    assert pdf.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    figure, axes = plt.subplots(figsize=(2, 2))
    axes.plot([1, 2])
    make_study(tmp_path).figure(figure, "line")
    plt.close(figure)
    assert (tmp_path / "figures/lab4_grid_line.pdf").read_bytes() == pdf.read_bytes()


@given(st.text(alphabet=st.characters(exclude_categories=["C", "Z"])))
def test_escaped_text_has_no_character_left_that_latex_would_act_on(text):
    command = r"\\(textbackslash|textasciitilde|textasciicircum)\{\}|\\[&%$#_{}]"
    assert not set(re.sub(command, "", escape(text))) & set("\\&%$#_{}~^")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex")
@pytest.mark.parametrize(
    ("latex", "unknown"),
    [
        (r"\val{lab4_grid.n_rnus}", "lab4_grid.n_rnus"),
        (r"\val{lab4_grid.plain.baseline.statsu}", "lab4_grid.plain.baseline.statsu"),
        (r"\everyrow\val{lab4_grid.plain.absent.status_co}", "lab4_grid.plain.absent.status_co"),
    ],
)
def test_a_number_that_no_study_has_written_is_an_error_of_latex(latex, unknown, printed, tmp_path):
    (tmp_path / "memstudy.sty").write_text((ROOT / "report/memstudy.sty").read_text("utf-8"), "utf-8")
    values = rf"\input{{{printed}/report/values/lab4_grid}}"
    document = rf"\documentclass{{article}}\usepackage{{memstudy}}{values}\begin{{document}}{latex}\end{{document}}"
    (tmp_path / "unknown.tex").write_text(document, "utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "unknown.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert done.returncode == 1
    assert f"No value named '{unknown}'" in done.stdout.replace("\n", "")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex")
def test_latex_takes_all_that_a_study_writes(printed, tmp_path):
    """A document with the report's own style and nothing but the study's output."""
    (tmp_path / "memstudy.sty").write_text((ROOT / "report/memstudy.sty").read_text("utf-8"), "utf-8")
    (tmp_path / "generated.tex").write_text(rf"\newcommand{{\generated}}{{{printed}}}")
    document = r"""
        \documentclass{article} \usepackage{memstudy}
        \input{\generated/report/values/lab4_grid}
        \begin{document}
        \val{lab4_grid.awkward}, \val{lab4_grid.plain}
        \val{lab4_grid.awkward.baseline.status_co}
        \val{lab4_grid.plain.absent.status_co} \val{lab4_grid.peak_mib.absent}
        \studytable[sidewaystable]{lab4_grid}{awkward}{measured}{Awkward.}
        \studytable{lab4_grid}{plain}{measured}{Plain.}
        \studyfigure{lab4_grid}{line}{measured}{A line.}
        \input{\generated/report/tables/lab4_grid_provenance}
        \end{document}"""
    (tmp_path / "all.tex").write_text(document, "utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-2000:]


def test_a_wrapped_column_breaks_into_lines(swept, tmp_path):
    frame = pd.DataFrame({"reason": ["long " * 40], "n": [1]}, index=["baseline"])
    make_study(tmp_path).table(frame, "wrapped", wrap="reason")
    text = (tmp_path / "report/tables/lab4_grid_wrapped.tex").read_text("utf-8")
    assert text.startswith(r"\begin{tabularx}{\linewidth}{l>{\raggedright\arraybackslash}Xr}")
    assert text.rstrip().endswith(r"\end{tabularx}")


def test_a_sweep_of_finished_runs_starts_no_process_and_warns_of_nothing(swept, folder, monkeypatch):
    monkeypatch.setattr(launcher, "forker", lambda number: pytest.fail("a process was to be started"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_study(folder).sweep([PLANNED[0], PLANNED[1], PLANNED[4]])
