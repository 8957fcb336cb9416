"""The largest batch by prediction: equal to a search over all batches, with few predictions; a run makes it tested."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiers import cover, slow_but
from support.tiny_run import tiny_run
from torch import nn

from memstudy.profiler import MIB, Gpu, find_gpu, fit, measure, predict
from memstudy.profiler.search import LIMIT, _largest

pytestmark = pytest.mark.usefixtures("one_thread", "young_garbage_only")

WIDTH = 64


def mlp(batch, length=64):
    """Make the step of a small network; a sequence of 64 takes about 0.1 MiB."""

    def make():
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        updates = torch.optim.AdamW(model.parameters())
        rows = torch.randn(batch, length, WIDTH)

        def step():
            model(rows).square().mean().backward()
            updates.step()
            updates.zero_grad()

        return step

    return make


def small_gpu(memory_mib):
    return Gpu(name="small", compute_capability=(8, 0), memory_mib=memory_mib, context_mib=10)


def needed(batch, gpu=None):
    report = predict(mlp(batch), gpu=gpu)
    return report.peak_allocated_mib if gpu is None else report.whole_gpu_mib


class Counted:
    """`mlp`, with a list of the requested batches."""

    def __init__(self, make=mlp):
        self.batches, self._make = [], make

    def __call__(self, batch):
        self.batches.append(batch)
        return self._make(batch)


# --- the batch


def test_on_a_cpu_it_is_the_largest_of_all_batches_tried():
    table = {batch: needed(batch) for batch in range(1, 41)}
    for budget in (0.5 * table[1], table[1], table[2] - 1e-6, 2.0, table[17], 0.999 * table[40]):
        found = fit(mlp, budget_mib=budget)
        fitting = [batch for batch, peak in table.items() if peak <= budget]
        assert found.batch_size == max(fitting, default=0)
        assert found.refused_at == found.batch_size + 1
        assert found.needed_mib == table[max(found.batch_size, 1)] == found.report.peak_allocated_mib
        assert found.headroom_percent == pytest.approx(100 * (1 - found.needed_mib / budget))
        assert (found.budget_mib, found.accumulation, found.tested) == (budget, 1, False)


def test_on_a_gpu_it_is_the_largest_of_all_batches_tried():
    for memory_mib in (50, 90):
        card = small_gpu(memory_mib)
        reports = {batch: predict(mlp(batch, 1024), gpu=card) for batch in range(1, 41)}
        fitting = [batch for batch, report in reports.items() if report.out_of_memory is None]
        assert fitting == list(range(1, len(fitting) + 1)), "where a larger batch fits again, more than one is right"
        found = fit(lambda batch: mlp(batch, 1024), gpu=card)
        assert 0 < found.batch_size == len(fitting) < 40
        assert found.refused_at == found.batch_size + 1
        assert found.needed_mib == reports[found.batch_size].whole_gpu_mib <= found.budget_mib == memory_mib


@pytest.mark.parametrize(
    ("gpu", "expandable_segments"), slow_but([("T4", False)], [("T4", False), ("A100-80GB", True)])
)
def test_the_batch_fits_the_gpu_and_the_next_one_does_not(gpu, expandable_segments):
    counted = Counted(lambda batch: tiny_run(batch_size=batch, seq_len=512, hidden_size=256).build(gpu=gpu))
    found = fit(counted, gpu=gpu, expandable_segments=expandable_segments)
    whole = {
        batch: predict(counted(batch), gpu=gpu, expandable_segments=expandable_segments)
        for batch in (found.batch_size, found.batch_size + 1)
    }
    assert [report.out_of_memory is None for report in whole.values()] == [True, False]
    assert found.report.device == gpu
    assert found.report.whole_gpu_mib == whole[found.batch_size].whole_gpu_mib == found.needed_mib


@pytest.mark.parametrize("budget_mib", [20, 200])
def test_on_a_cpu_a_handful_of_predictions_do(budget_mib):
    counted = Counted()
    found = fit(counted, budget_mib=budget_mib)
    assert found.batch_size > 7 * budget_mib
    assert len(counted.batches) <= 6


@pytest.mark.parametrize("memory_mib", slow_but([60, 500], [60, 80, 100, 120, 200, 500, 3000]))
def test_on_a_gpu_whose_allocator_goes_in_steps_some_more_do(memory_mib):
    counted = Counted()
    found = fit(counted, gpu=small_gpu(memory_mib))
    assert found.batch_size > 3 * memory_mib
    assert len(set(counted.batches)) == len(counted.batches) <= 15


PLACES = st.floats(0, 16).map(lambda power: int(2**power))


@given(
    slope=st.floats(0, 10), jumps=st.lists(st.tuples(PLACES, st.floats(0.1, 1e4)), max_size=40), share=st.floats(0, 1)
)
def test_where_memory_jumps_each_halving_of_what_is_left_takes_two_predictions_at_most(slope, jumps, share):
    asked = {}

    def memory(size):
        return asked.setdefault(size, 1 + slope * size + sum(jump for place, jump in jumps if size >= place))

    budget = 1 + share * (memory(LIMIT) - 1)
    found = _largest(memory, range(1, LIMIT + 1), budget)
    assert len(asked) <= 2 * math.log2(LIMIT) + 4
    assert found == 0 or memory(found) <= budget
    assert found == LIMIT or memory(found + 1) > budget


def test_no_batch_beyond_the_limit_is_looked_at():
    counted = Counted(lambda batch: mlp(1))  # every batch takes the same memory
    found = fit(counted, budget_mib=100)
    assert (found.batch_size, found.refused_at) == (LIMIT, None)
    assert max(counted.batches) == LIMIT
    assert fit(mlp, budget_mib=1e6, effective_batch=10 * LIMIT).batch_size <= LIMIT


# --- the budget


def test_nothing_fits():
    found = fit(mlp, budget_mib=0.01)
    assert (found.batch_size, found.accumulation, found.refused_at) == (0, 1, 1)
    assert found.needed_mib == needed(1)
    assert found.headroom_percent < 0
    on_gpu = fit(mlp, gpu=small_gpu(15), effective_batch=8)
    assert (on_gpu.batch_size, on_gpu.accumulation, on_gpu.refused_at) == (0, 1, 1)
    assert on_gpu.report.out_of_memory is not None
    assert on_gpu.needed_mib == needed(1, small_gpu(15)) > 15


def test_the_whole_gpu_is_the_budget_unless_one_is_given():
    assert fit(mlp, gpu="T4").budget_mib == find_gpu("T4").memory_mib
    card = small_gpu(60)
    whole, less, more = (fit(mlp, gpu=card, budget_mib=budget) for budget in (None, 40, 90))
    assert [found.budget_mib for found in (whole, less, more)] == [60, 40, 90]
    assert less.batch_size < whole.batch_size < more.batch_size
    for found in (whole, less, more):  # the report has the same budget
        assert found.report.memory_bytes == found.budget_mib * MIB
        assert found.report.out_of_memory is None
        assert found.batch_size == fit(mlp, gpu=small_gpu(found.budget_mib)).batch_size


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "fit needs a GPU or budget_mib"),
        ({"budget_mib": 0}, "budget_mib=0: a budget above 0 MiB is needed"),
        ({"budget_mib": -1.5}, "budget_mib=-1.5: a budget above 0 MiB is needed"),
        ({"budget_mib": float("nan")}, "budget_mib=nan: a budget above 0 MiB is needed"),
        ({"budget_mib": float("inf")}, "budget_mib=inf: a budget above 0 MiB is needed"),
        ({"gpu": "T4", "budget_mib": -1}, "budget_mib=-1: a budget above 0 MiB is needed"),
        ({"gpu": "T5"}, "unknown GPU 'T5'; known: T4"),
        ({"budget_mib": 10, "effective_batch": 0}, "effective_batch=0: at least 1 sequence is needed"),
        ({"gpu": "T4", "effective_batch": -8}, "effective_batch=-8: at least 1 sequence is needed"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_anything_is_predicted(given, said):
    counted = Counted()
    with pytest.raises(ValueError, match=said):
        fit(counted, **given)
    assert counted.batches == []


# --- the effective batch


def test_the_batch_divides_the_effective_batch():
    table = {batch: needed(batch) for batch in range(1, 25)}
    for effective_batch in (1, 7, 24):
        divisors = [batch for batch in table if effective_batch % batch == 0]
        for budget in (table[1], table[5], table[11], table[24]):
            counted = Counted()
            found = fit(counted, budget_mib=budget, effective_batch=effective_batch)
            assert found.batch_size == max(batch for batch in divisors if table[batch] <= budget)
            assert found.accumulation * found.batch_size == effective_batch
            assert found.refused_at == min((batch for batch in divisors if table[batch] > budget), default=None)
            assert set(counted.batches) <= set(divisors)


PARTED = [
    (techniques, implementation, gpu)
    for techniques, implementation in [((), "eager"), (("bf16", "checkpointing"), "sdpa")]
    for gpu in (None, "T4")
]


@pytest.mark.parametrize(("techniques", "implementation", "gpu"), slow_but(cover(PARTED), PARTED))
def test_two_parts_of_an_update_take_all_the_memory_that_more_do(techniques, implementation, gpu):
    """Lets `fit` predict an effective batch of thousands as fast as an effective batch of two parts."""
    attention = {"variant": "softmax", "implementation": implementation}
    run = tiny_run(batch_size=16, techniques=(*techniques, "accumulation=8"), attention=attention)
    whole, two, one = (predict(run.build(gpu=gpu, parts=parts), gpu=gpu) for parts in (None, 2, 1))
    assert two.peak_bytes == whole.peak_bytes
    assert two.peak_by_category == whole.peak_by_category
    assert two.peak_by_phase == whole.peak_by_phase
    assert two.whole_gpu_mib == whole.whole_gpu_mib
    assert one.peak_bytes < two.peak_bytes  # a single part runs before there are gradients


def test_two_parts_are_four_parts_but_for_their_tokens():
    two, four = (
        predict(tiny_run(batch_size=2 * parts, techniques=(f"accumulation={parts}",)).build()) for parts in (2, 4)
    )
    tokens = 2 * 2 * 16 * torch.long.itemsize  # two more parts of two sequences of 16
    assert four.peak_bytes - two.peak_bytes == tokens
    assert four.peak_by_category["other"] - two.peak_by_category["other"] == tokens


# --- runs


def test_what_is_only_predicted_is_not_tested():
    assert not fit(mlp, budget_mib=2).tested


def test_a_real_run_of_the_batch_makes_it_tested():
    ran = []

    def run(batch):
        ran.append(batch)
        peak = measure(mlp(batch)).peak_allocated_mib
        return peak if peak <= 2 else None

    found = fit(mlp, budget_mib=2, run=run)
    assert found.tested
    assert ran == [found.batch_size]
    assert found.batch_size == fit(mlp, budget_mib=2).batch_size


SMALLER = [(effective_batch, largest) for effective_batch in (None, 12) for largest in (2, 1, 0)]


@pytest.mark.parametrize(("effective_batch", "largest"), slow_but(cover(SMALLER), SMALLER))
def test_when_a_real_run_does_not_fit_the_next_smaller_is_run(effective_batch, largest):
    ran = []

    def run(batch):
        ran.append(batch)
        return 1.0 if batch <= largest else None

    budget = needed(4)
    found = fit(mlp, budget_mib=budget, effective_batch=effective_batch, run=run)
    assert (found.batch_size, found.tested) == (largest, largest > 0)
    assert ran == [4, 3, 2, 1][: 5 - max(largest, 1)]
    assert found.refused_at == largest + 1
    assert found.needed_mib == needed(max(largest, 1)) == found.report.peak_allocated_mib
    assert found.accumulation == (effective_batch // largest if effective_batch and largest else 1)


def test_when_nothing_is_predicted_to_fit_nothing_is_run():
    found = fit(mlp, budget_mib=0.01, run=lambda batch: pytest.fail("run"))
    assert (found.batch_size, found.tested) == (0, False)
