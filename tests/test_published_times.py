"""Published times: each table predicts on its cheapest row, and names a row once."""

from unittest.mock import patch

import pytest

from memstudy.profiler.time.cost import Constant, constants
from memstudy.studies.published.times import (
    fms,
    hf_v100,
    lambda_bert,
    mli,
    mli_best,
    mosaic,
    neusight_models,
    peft_l40s,
    predicted,
    vision,
)
from memstudy.studies.published.times.tables import TABLES

CHEAPEST = {
    mli: "V100-16GB: BertLayer, fwd+bwd, 4 × 128",
    mli_best: "V100-16GB: GPT2Block, fwd+bwd",
    hf_v100: "batch 4",
    fms: "gpt_bigcode-santacoder, full, 4 × 2048",
    peft_l40s: peft_l40s.LORA,
    lambda_bert: "V100-16GB: base, fp16, 48 × 384",
    neusight_models: "A100-PCIe-40GB: bert_large, inf, 8 × 512",
    mosaic: "A100-80GB: 1b, 14 × 2048",
    vision: "deit_tiny_distilled_patch16_224",
}


@pytest.mark.parametrize("table", CHEAPEST, ids=lambda table: table.__name__.rpartition(".")[2])
def test_a_row_is_predicted_with_its_band(table):
    row = next(row for row in table.rows() if row.row == CHEAPEST[table])
    line = predicted([row]).iloc[0]
    assert 0 < line.low_ms < line.predicted_ms < line.high_ms
    assert line.error_percent == pytest.approx(100 * (line.predicted_ms - row.published_ms) / row.published_ms)


def test_a_row_has_one_name():
    names = [(row.table, row.row) for table in CHEAPEST for row in table.rows()]
    assert len(set(names)) == len(names)


def test_what_chose_a_constant_is_a_row():
    names = [(row.table, row.row) for table in TABLES.values() for row in table.rows()]
    for constant in constants().values():
        for entry in (*constant.fitted_on, *constant.seen):
            table, _, text = entry.partition(": ")
            assert any(table == of and text in row for of, row in names), entry


def test_an_unseen_generation_has_the_constants_of_all_others():
    others = {
        name: constant.model_copy(update={"value": constant.value["other"]})
        if isinstance(constant.value, dict)
        else constant
        for name, constant in constants().items()
    }
    rows = [row for row in mli.rows() if row.row == "V100-16GB: matmul 8192, float16"]
    line = predicted(rows).iloc[0]
    assert line.unseen_ms != line.predicted_ms
    (bf16,) = (row for row in mosaic.rows() if row.row == CHEAPEST[mosaic])
    of_bf16 = predicted([bf16]).iloc[0]
    assert of_bf16.unseen_ms == pytest.approx(of_bf16.predicted_ms, rel=0.5)  # tensor cores multiply it there too
    with patch("memstudy.profiler.time.cost.constants", lambda: others):
        assert predicted(rows).iloc[0].predicted_ms == line.unseen_ms


def test_a_constant_names_the_rows_that_chose_it():
    def chosen(**entries):
        return Constant(value=1, unit="µs", means="a time", source="a fit", **({"fitted_on": ()} | entries))

    rows = [row for row in mli.rows() if row.row.startswith(("V100-16GB: matmul 128,", "V100-16GB: a × 1.2, 16384"))]
    known = {
        "all": chosen(fitted_on=("mli",)),
        "products": chosen(fitted_on=("mli: matmul", "vision: patch16"), seen=("mli: float32",)),
        "elsewhere": chosen(fitted_on=("vision",)),
    }
    with patch("memstudy.studies.published.times.constants", lambda: known):
        lines = predicted(rows)
    assert list(lines.fitted) == ["all, products", "all, products", "all"]
    assert list(lines.seen) == ["products", "", ""]
