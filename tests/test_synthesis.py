"""The synthesis over studies: its notebook's table, figure and values from the studies' rows."""

import pandas as pd
import papermill
import pytest

from memstudy.records import ROOT

ROWS = {
    "one": [
        ("plain", 1.0, 1.0, 0.0),
        ("free", 0.5, 0.9, 0.5),
        ("slow", 0.4, 1.3, -2.0),
        ("unjudged_1", 0.9, 1.0, None),
    ],
    "another_one": [("worse", 0.3, 1.005, 4.0), ("both & more", 0.2, 2.0, 30.0), ("larger", 1.5, 0.5, 0.0)],
    "not_chosen": [("least", 0.1, 1.0, 0.0)],
}


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generated")
    (folder / "report" / "tradeoffs").mkdir(parents=True)
    for stem, rows in ROWS.items():
        frame = pd.DataFrame(rows, columns=["technique", "memory", "time", "quality_lost"]).assign(device="here")
        frame = pd.concat([frame, frame.assign(device="T4", time=2 * frame["time"])])
        frame.to_csv(folder / "report" / "tradeoffs" / f"{stem}.csv", index=False)
    papermill.execute_notebook(
        ROOT / "notebooks" / "synthesis.ipynb", None, cwd=ROOT / "notebooks", progress_bar=False,
        parameters={"out_dir": str(folder), "results_dir": str(folder), "studies": ["one", "another_one"]},
    )  # fmt: skip
    return folder


def test_the_table_has_what_saves_memory_in_the_order_of_its_price(generated):
    tables = generated / "report" / "tables"
    text = (tables / "synthesis_best.tex").read_text("utf-8")
    order = [
        "one: free & nothing & 0.50 & 0.90", r"one: unjudged\_1 & nothing (quality not judged) & 0.90 & 1.00",
        "one: slow & time & 0.40 & 1.30", "another one: worse & quality & 0.30",
        r"another one: both \& more & both",
    ]  # fmt: skip
    places = [text.index(line) for line in order]
    assert places == sorted(places)
    assert not any(name in text for name in ("plain", "larger", "least"))
    assert "one: slow & 0.40 & 1.30 & 0.40 & 2.60" in (tables / "synthesis_gpus.tex").read_text("utf-8")


def test_the_table_of_validations_says_that_there_is_none(generated):
    text = (generated / "report" / "tables" / "synthesis_validation.tex").read_text("utf-8")
    assert "none yet & –" in text


def test_the_figure_and_the_number_of_rows_are_written(generated):
    assert (generated / "figures" / "synthesis_prices.pdf").stat().st_size > 5000
    assert (generated / "figures" / "synthesis_prices.png").exists()
    assert (generated / "figures" / "synthesis_gpus.pdf").stat().st_size > 5000
    values = (generated / "report" / "values" / "synthesis.tex").read_text("utf-8")
    assert r"\defval{synthesis.n_rows}{7}" in values
    assert r"\defval{synthesis.n_predicted}{7}" in values
    assert r"\defval{synthesis.same}{1}" in values
