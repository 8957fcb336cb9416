"""The synthesis over studies: which rows it has, what they are paid with, and what it writes."""

import pandas as pd
import pytest

from memstudy.cli import synthesis

ROWS = {
    "one": [
        ("plain", 1.0, 1.0, 0.0),
        ("free", 0.5, 0.9, 0.5),
        ("slow", 0.4, 1.3, -2.0),
        ("unjudged_1", 0.9, 1.0, None),
    ],
    "another_one": [("worse", 0.3, 1.005, 4.0), ("both & more", 0.2, 2.0, 30.0), ("larger", 1.5, 0.5, 0.0)],
}


@pytest.fixture
def generated(tmp_path):
    for folder in ("report/tradeoffs", "report/tables", "figures"):
        (tmp_path / folder).mkdir(parents=True)
    for stem, rows in ROWS.items():
        frame = pd.DataFrame(rows, columns=["technique", "memory", "time", "quality_lost"])
        frame.to_csv(tmp_path / "report" / "tradeoffs" / f"{stem}.csv", index=False)
    return tmp_path


def test_the_rows_are_those_of_the_studies_that_were_run(generated):
    rows = synthesis.read(generated / "report", ["another_one", "no_such_study"])
    assert rows["technique"].tolist() == ["worse", "both & more", "larger"]
    assert set(rows["study"]) == {"another_one"}


def test_what_memory_is_paid_with(generated):
    rows = synthesis.read(generated / "report", list(ROWS)).set_index("technique")
    assert synthesis.price(rows).to_dict() == {
        "plain": "nothing", "free": "nothing", "slow": "time", "unjudged_1": "nothing", "worse": "quality",
        "both & more": "both", "larger": "nothing",
    }  # fmt: skip


def test_table_and_figure_are_written_of_what_saves(generated):
    assert synthesis.draw(generated, list(ROWS))
    text = (generated / "report" / "tables" / "synthesis.tex").read_text("utf-8")
    order = ["free", r"unjudged\_1", "slow", "worse", r"both \& more"]
    places = [text.index(name) for name in order]
    assert places == sorted(places)
    assert "plain" not in text
    assert "larger" not in text
    assert (generated / "figures" / "synthesis.pdf").stat().st_size > 5000
    assert (generated / "figures" / "synthesis.png").exists()


def test_without_rows_nothing_is_drawn(tmp_path):
    assert not synthesis.draw(tmp_path, ["one"])
    assert not list(tmp_path.iterdir())
