"""Published times of single ops are predicted (memstudy.studies.published.times)."""

import pytest

from memstudy.studies.published.times import liger, neusight_ops, predicted, vidur


@pytest.mark.parametrize("table", [liger, neusight_ops, vidur], ids=lambda table: table.__name__.rpartition(".")[2])
def test_one_row_of_each_op_and_mode_is_predicted(table):
    """The first row of each: positive, within its band, and the backward pass slower than nothing but the forward."""
    rows = {tuple(row.row.split()[:2]): row for row in reversed(table.rows())}
    times = predicted(rows.values())
    assert (times.kind == "op").all()
    assert (times.low_ms > 0).all()
    assert (times.low_ms <= times.predicted_ms).all()
    assert (times.predicted_ms <= times.high_ms).all()
