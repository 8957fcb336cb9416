"""Published times: each table predicts on its cheapest row, and names a row once."""

import pytest

from memstudy.studies.published.times import (
    fms,
    hf_v100,
    lambda_bert,
    mli,
    mosaic,
    neusight_models,
    peft_l40s,
    predicted,
    vision,
)

CHEAPEST = {
    mli: "V100-16GB: BertLayer, fwd+bwd, 4 × 128",
    hf_v100: "batch 4",
    fms: "gpt_bigcode-santacoder, full, 4 × 2048",
    peft_l40s: peft_l40s.LORA,
    lambda_bert: "V100-16GB: base, fp16, 48 × 384",
    neusight_models: "A100-40GB: bert_large, inf, 8 × 512",
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
