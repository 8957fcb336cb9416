"""A study's numbers as text: digits by unit, names of cells, verdicts."""

import numpy as np
import pandas as pd
import pytest

from memstudy import latex
from memstudy.study import verdict


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("peak [MiB]", "peak_mib"),
        (("measured", "saved [%]"), "measured_saved_percent"),
        (("time of a step", "[×]"), "time_of_a_step_x"),
        (("speed", "tokens/s"), "speed_tokens_s"),
        ("masks=0.5", "masks_0_5"),
        (1024, "1024"),
    ],
)
def test_names_of_values_have_letters_digits_and_underscores(header, name):
    assert latex.key(header) == name


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("peak_mib", 1234.5, "1,234"),
        ("saved_percent", -3.4, "-3"),
        ("time_x", 1.234, "1.23"),
        ("n_rows", 12345, "12,345"),
        ("n_rows", 7.0, "7"),
        ("best", "flash", "flash"),
        ("peak_mib", float("nan"), "–"),
    ],
)
def test_a_value_prints_by_the_unit_at_the_end_of_its_name(name, value, text):
    assert latex.printed(name, value) == text


def test_a_fraction_without_a_unit_is_refused_by_name():
    with pytest.raises(ValueError, match=r"value ratio=0.5: end its name with a unit"):
        latex.printed("ratio", 0.5)
    with pytest.raises(ValueError, match=r"column 'ratio' has fractions: give it a unit .* or digits"):
        latex.formats(pd.DataFrame({"ratio": [0.5]}))


FRAME = pd.DataFrame(
    {
        ("measured", "peak [MiB]"): [1234.5, np.nan],
        ("measured", "[×]"): [1.0, 2.345],
        ("loss [nats]", "change"): [0.0, -0.12345],
        ("", "rows"): [3, 4000],
        ("", "why"): ["so", None],
    },
    index=["plain", "lean, 50 %"],
)


def test_a_column_prints_by_its_unit_or_by_the_digits_given():
    assert latex.formats(FRAME, {"change": "+.4f"}) == {
        ("measured", "peak [MiB]"): "{:,.0f}",
        ("measured", "[×]"): "{:,.2f}",
        ("loss [nats]", "change"): "{:+.4f}",
        ("", "rows"): "{:,.0f}",
    }
    assert set(latex.formats(FRAME, 1).values()) == {"{:,.1f}"}
    assert latex.formats(FRAME, {("measured", "[×]"): 3, "change": 1})["measured", "[×]"] == "{:,.3f}"


def test_each_cell_has_a_name_and_the_text_of_the_table():
    formats = latex.formats(FRAME, {"change": "+.4f"})
    cells = latex.cells(FRAME, formats)
    assert len(cells) == FRAME.size
    assert cells["plain.measured_peak_mib"] == "1,234"
    assert cells["lean_50_percent.measured_peak_mib"] == cells["lean_50_percent.why"] == "–"
    assert cells["lean_50_percent.loss_nats_change"] == "-0.1235"
    table = latex.tabular(FRAME, formats)
    assert all(text in table for text in cells.values())


def test_two_cells_of_one_name_are_refused():
    frame = pd.DataFrame({"a b": [1], "a_b": [2]}, index=["row"])
    with pytest.raises(ValueError, match=r"two cells are named 'row.a_b': rename a row or a column"):
        latex.cells(frame, latex.formats(frame))


@pytest.mark.parametrize(
    ("value", "low", "high", "said"),
    [
        (40, 40, 50, "reproduced"), (55, 40, 50, "reproduced"), (35, 40, 50, "reproduced"), (34, 40, 50, "partly"),
        (6, 40, 50, "partly"), (5, 40, 50, "not reproduced"), (-60, 40, 50, "not reproduced"), (90, 40, 50, "partly"),
        (-20, -40, -40, "partly"), (20, -40, -40, "not reproduced"), (float("nan"), 40, 50, "not testable here"),
    ],
)  # fmt: skip
def test_the_verdict_on_a_claim(value, low, high, said):
    assert verdict(value, low, high, slack=5) == said
