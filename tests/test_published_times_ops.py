"""Published times of single ops are predicted (memstudy.studies.published.times)."""

import pytest

from memstudy.studies.published.times import liger, neusight_ops, predicted, vidur


@pytest.mark.parametrize("table", [liger, neusight_ops, vidur], ids=lambda table: table.__name__.rpartition(".")[2])
def test_one_row_of_each_op_and_mode_is_predicted(table):
    """The first row of each: a time above 0, and forward and backward together take longer than forward alone."""
    rows = {tuple(row.row.split()[:2]): row for row in reversed(table.rows())}
    times = predicted(rows.values())
    assert (times.kind == "op").all()
    assert (times.predicted_ms > 0).all()
    assert (times.low_ms <= times.high_ms).all()
    by_mode = times.assign(**dict(zip(("op", "mode"), zip(*rows, strict=True), strict=True)))
    by_mode = by_mode.pivot(index="op", columns="mode", values="predicted_ms")
    if "full" in by_mode:
        both = by_mode.dropna(subset=["forward", "full"])
        assert (both.full > both.forward).all()
