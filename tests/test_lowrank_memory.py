"""Memory saved by low-rank projections in a training step: counted by hand, measured, predicted.

Each of a layer's four (d, d) projections becomes (r, d) and (d, r), so L layers lose L (4 d² - 8 d r) weights of
4 bytes each. Parameters and gradients each shrink by these bytes, AdamW's two moments by twice as many. AdamW also has
a step counter of 4 bytes for each parameter tensor, and there are 4 L more tensors.
"""

import pytest
import torch
from support.tiers import slow_but

from memstudy.profiler import measure, predict
from memstudy.trainers.hub_model import HubModelRun

pytestmark = pytest.mark.usefixtures("one_thread", "young_garbage_only")

SIZES = {"all-MiniLM-L6-v2": (6, 384), "bert-base-uncased": (12, 768)}  # layers, width
RANKS = (4, 16, 64)


def run(rank=None, model="all-MiniLM-L6-v2", **changes):
    sizes = {"seq_len": 16, "batch_size": 2, "task": "classification", **changes}
    convert_to = {} if rank is None else {"variant": "lowrank", "rank": rank}
    return HubModelRun(experiment="test", model=model, convert_to=convert_to, **sizes)


def most(report):
    return {name: report.most_by_category[name] for name in ("parameters", "gradients", "optimizer")}


def saved(model, rank, layers=None):
    """Saved bytes by category, from the formula."""
    of_model, width = SIZES[model]
    layers = of_model if layers is None else layers
    weights = 4 * layers * (4 * width**2 - 8 * width * rank)
    return {"parameters": weights, "gradients": weights, "optimizer": 2 * weights - 4 * 4 * layers}


def less(unchanged, report):
    return {name: size - most(report)[name] for name, size in most(unchanged).items()}


@pytest.fixture(scope="module")
def minilm():
    return predict(run().build())


@pytest.mark.parametrize("rank", RANKS)
def test_the_prediction_saves_what_the_formula_says(rank, minilm):
    assert less(minilm, predict(run(rank).build())) == saved("all-MiniLM-L6-v2", rank)


def test_the_measurement_saves_what_the_formula_says_and_is_the_prediction(minilm):
    unchanged, low = measure(run().build()), measure(run(16).build())
    assert less(unchanged, low) == saved("all-MiniLM-L6-v2", 16)
    assert most(unchanged) == most(minilm)
    assert unchanged.peak_by_category == minilm.peak_by_category
    assert low.peak_by_category == predict(run(16).build()).peak_by_category


def test_one_layer_saves_a_sixth(minilm):
    assert less(minilm, predict(run(16, layers=(3,)).build())) == saved("all-MiniLM-L6-v2", 16, layers=1)


def test_half_the_width_saves_no_weights_and_costs_the_counters(minilm):
    counters = {"parameters": 0, "gradients": 0, "optimizer": -4 * 4 * 6}
    assert less(minilm, predict(run(192).build())) == saved("all-MiniLM-L6-v2", 192) == counters


@pytest.mark.parametrize("rank", slow_but(RANKS[:1], RANKS))
def test_bert_base_saves_what_the_formula_says(rank, bert_base):
    low = predict(run(rank, "bert-base-uncased", seq_len=128, batch_size=16).build())
    assert less(bert_base, low) == saved("bert-base-uncased", rank)


@pytest.fixture(scope="module")
def bert_base():
    return predict(run(None, "bert-base-uncased", seq_len=128, batch_size=16).build())


def test_the_optimizers_state_is_two_moments_and_a_counter_for_each_tensor(minilm):
    with torch.device("meta"):
        parameters = list(run().make_model().parameters())
    weights = sum(p.numel() for p in parameters)
    assert most(minilm) == {
        "parameters": 4 * weights,
        "gradients": 4 * weights,
        "optimizer": 8 * weights + 4 * len(parameters),
    }
