"""Tables of published times as runs: their rows, their errors, and what a wrong table or GPU is told."""

import pandas as pd
import pytest

from memstudy.kinds import parse_run
from memstudy.studies.published.times import mli_best
from memstudy.studies.published.times.errors import by_source, held_out, summary, summary_of_ratios
from memstudy.studies.published.times.tables import TABLES
from memstudy.studies.published.timings import gpus, runs

GIVEN = {"kind": "published_times", "experiment": "mine", "of": "mli_best", "gpu": "A6000"}


def test_a_run_has_the_rows_of_its_gpu_and_their_errors(tmp_path):
    found = parse_run(GIVEN).execute(tmp_path)
    metrics, rows = found["metrics"], pd.DataFrame(found["curves"]["rows"])
    assert [*rows.row] == [row.row for row in mli_best.rows() if row.gpu == "A6000"]
    assert metrics["n_rows"] == len(rows) >= metrics["n"] > 0
    busy = rows[rows.bound_by == "GPU"]
    off = 100 * (busy.predicted_ms / busy.published_ms - 1)
    assert metrics["n"] == len(busy)
    assert metrics["median_error_percent"] == pytest.approx(off.abs().median())
    assert metrics["worst_error_percent"] == pytest.approx(off.abs().max())
    assert metrics["bias_percent"] == pytest.approx(off.median())
    inside = (busy.low_ms <= busy.published_ms) & (busy.published_ms <= busy.high_ms)
    assert metrics["in_band_percent"] == pytest.approx(100 * inside.mean())
    assert metrics["unseen_median_error_percent"] != metrics["median_error_percent"]
    assert found["curves"]["ratios"] == []


@pytest.mark.parametrize("table", TABLES)
def test_the_runs_of_a_table_have_all_its_rows(table):
    planned = runs(table)
    assert [run.gpu for run in planned] == gpus(table)
    assert {row.gpu for row in TABLES[table].rows()} == {run.gpu for run in planned}
    assert all(parse_run(run.model_dump(mode="json")) == run for run in planned)


@pytest.mark.parametrize(
    ("changes", "said"), [({"of": "lmi"}, "unknown table 'lmi'; known: fms, "), ({"gpu": "T4"}, "needs one of .*A6000")]
)
def test_a_wrong_table_or_gpu_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        parse_run(GIVEN | changes)


def test_summaries_are_those_of_the_errors():
    rows = pd.DataFrame({
        "table": "t", "row": ["a", "b", "c", "d"], "error_percent": [-4.0, 1.0, 20.0, 2.0],
        "in_band": [True, True, False, True], "fitted": ["", "calibration_error", "kernel_us", ""],
        "seen": ["", "", "", "kernel_us"],
    })  # fmt: skip
    assert summary(rows) == {
        "n": 4, "median": 3.0, "p90": pytest.approx(15.2), "worst": 20.0, "bias": 1.5, "in_band": 75.0,
        "worst_row": "t: c",
    }  # fmt: skip
    assert [*held_out(rows).row] == ["a", "b"]
    ratios = pd.DataFrame({"published_ratio": [1.2, 0.8, 2.0], "predicted_ratio": [1.1, 1.1, 3.0]})
    ratios["error_percent"] = 100 * (ratios.predicted_ratio / ratios.published_ratio - 1)
    found = summary_of_ratios(ratios)
    assert (found["n"], found["worst"]) == (3, pytest.approx(50))
    assert found["right"] == pytest.approx(200 / 3)


def test_a_source_is_summed_up_by_the_rows_that_the_gpu_bounds():
    shared = {"in_band": True, "seen": "", "unseen_error_percent": 30.0, "fitted": ""}
    rows = pd.DataFrame([
        {"table": "mine", "row": "a", "kind": "step", "bound_by": "GPU", "error_percent": 2.0} | shared,
        {"table": "mine", "row": "b", "kind": "step", "bound_by": "host", "error_percent": 90.0} | shared,
        {"table": "mine", "row": "c", "kind": "step", "bound_by": "GPU", "error_percent": -6.0} | shared
        | {"fitted": "kernel_us"},
        {"table": "mosaic", "row": "d", "kind": "step", "bound_by": "GPU", "error_percent": -40.0} | shared,
        {"table": "ours", "row": "e", "kind": "op", "bound_by": "GPU", "error_percent": 12.0} | shared
        | {"their_old_error_percent": 50.0},
    ])  # fmt: skip
    found = by_source(rows)
    assert found["n"].to_dict() == {
        "mine": 2, "mosaic, a lower bound": 1, "ours": 1, "all steps": 2, "all steps, held out": 1, "by old": 1,
        "by us where others are": 1,
    }  # fmt: skip
    assert found.loc["mine", ["median", "worst", "worst_row", "n_chosen", "unseen"]].to_list() == [
        4.0, 6.0, "c", 1, 30.0,
    ]  # fmt: skip
    assert found.loc["all steps, held out", "worst_row"] == "mine: a"
    assert found.loc[["by old", "by us where others are"], "median"].to_list() == [50.0, 12.0]
