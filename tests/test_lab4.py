"""Lab 4's experiments: which of them compute the same, and the points of their learning curves."""

import math

import pandas as pd
import pytest

from memstudy.studies.lab4.experiments import experiments, leaders, learning_curves, within


def test_the_first_of_those_that_differ_by_rounding_alone_leads():
    grid = experiments(512, flash="sdpa")
    grid.at["best_of_all", "techniques"] = ("bf16", "chunked_loss", "adamw_8bit")
    found = leaders(grid, 512)
    assert set(found.index[found == "bf16"]) == {"bf16", "flash_attn", "window_512", "bf16_gradcp", "flash_gradcp"}
    assert set(found[found == found.index]) == {"baseline", "bf16", "window_256", "adamw_8bit", "best_of_all"}
    in_fp32 = grid.assign(techniques=[within(texts, []) for texts in grid["techniques"]])
    assert set(leaders(in_fp32, 512)) == {"baseline", "window_256", "adamw_8bit"}


def test_a_learning_curve_counts_tokens_and_passes_over_what_did_not_run():
    ran = {"experiment": "baseline", "seed": 1, "batch_size": 4, "seq_len": 8, "status": "ok"}
    ran |= {"curves": {"validation_loss": [[5, 0.0], [10, 1.0]]}}
    other = ran | {"experiment": "bf16", "curves": {"validation_loss": [[10, 2.0], [20, 3.0]]}}
    points = learning_curves(pd.DataFrame([ran, ran | {"status": "failed"}, other]))
    assert points["change"].tolist() == pytest.approx([0, 0, 100 * (math.e - 1), math.nan], nan_ok=True)
    points = points[points["experiment"] == "baseline"]
    assert points["tokens"].tolist() == pytest.approx([160e-6, 320e-6])
    assert points["perplexity"].tolist() == pytest.approx([1, 2.71828], rel=1e-5)
