"""The ladder of techniques: its order, the combinations it excludes, and its reference rows."""

import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiers import slow_but
from support.tiny_models import config_file

from memstudy import records, techniques
from memstudy.huggingface.catalogue import model_config
from memstudy.profiler import find_gpu
from memstudy.studies.ablation import advice, reference
from memstudy.trainers.hub_model import HubModelRun

OFFERED = [
    "bf16", "bf16_weights", "checkpointing", "selective_checkpointing=0.5", "chunked_loss", "adamw_8bit",
    "optimizer_in_backward", "accumulation=4", "muon",
]  # fmt: skip
NUMBERS = st.fixed_dictionaries({text: st.floats(0, 2, allow_nan=False) for text in OFFERED})


def test_the_quickest_comes_first():
    times = {"checkpointing": 1.3, "bf16": 0.6, "chunked_loss": 1.0}
    assert advice.ladder(times, dict.fromkeys(times, 0.1)) == [
        (),
        ("bf16",),
        ("bf16", "chunked_loss"),
        ("bf16", "chunked_loss", "checkpointing"),
    ]


def test_what_saves_more_takes_the_place_of_what_it_excludes():
    times = {"selective_checkpointing=0.5": 1.1, "bf16": 1.2, "checkpointing": 1.3}
    savings = {"selective_checkpointing=0.5": 0.3, "bf16": 0.2, "checkpointing": 0.5}
    assert advice.ladder(times, savings)[-1] == ("bf16", "checkpointing")
    savings["checkpointing"] = 0.3
    assert advice.ladder(times, savings)[-1] == ("selective_checkpointing=0.5", "bf16")


def test_what_was_there_at_the_start_stays():
    times, savings = {"checkpointing": 1.0, "bf16": 1.1}, {"checkpointing": 0.9, "bf16": 0.1}
    start = ("selective_checkpointing=0.5",)
    assert advice.ladder(times, savings, start=start) == [start, (*start, "bf16")]


@given(NUMBERS, NUMBERS, st.sampled_from([(), ("checkpointing",), ("accumulation=2", "sgd")]))
def test_every_rung_can_be_run_and_adds_one_technique(times, savings, start):
    rungs = advice.ladder(times, savings, start=start)
    assert rungs[0] == start
    added = [rung[-1] for rung in rungs[1:]]
    assert added == sorted(added, key=times.get)
    for before, rung in itertools.pairwise(rungs):
        techniques.parse(rung)
        assert rung[: len(start)] == start
        gone = set(before) - set(rung)
        assert set(rung) - set(before) == {rung[-1]}
        assert all(techniques.excluded((other, rung[-1])) and savings[rung[-1]] > savings[other] for other in gone)


TEXTS = ["bf16", "checkpointing", "chunked_loss", "adamw_8bit"]


def changes(rung):
    """How much the techniques of `rung` change: nothing, the arithmetic, which weights are trained, or the weights."""
    parsed = techniques.parse(rung)
    if any(t.group == "weights" for t in parsed):
        return 3
    return 2 if any(t.group == "adapters" for t in parsed) else int(not all(t.exact for t in parsed))


def measured():
    return advice.measured_alone(reference.reference().rows, TEXTS)


def climb(**options):
    return advice.climb(measured(), lambda rung: True, **options)


def test_what_changes_more_comes_later():
    rungs = climb(parts_of=4)
    order = [changes(rung) for rung in rungs]
    assert order == sorted(order)
    assert set(order) == {0, 1, 2, 3}
    last_exact = rungs[order.index(1) - 1]
    assert set(last_exact) == {"checkpointing", "chunked_loss", "accumulation=4"}
    assert set(rungs[-1]) == {*last_exact, "adamw_8bit", "convention=uncast", "lora=16", "nf4_weights"}
    assert all("accumulation=4" in rung for rung in rungs[order.index(1) :])


@pytest.mark.parametrize(("keep", "most"), [("exact", 0), ("full", 1), (None, 3)])
def test_what_must_be_kept_ends_the_ladder(keep, most):
    whole = climb()
    assert climb(keep=keep) == [rung for rung in whole if changes(rung) <= most]


@pytest.mark.parametrize("start", [("bf16",), ("lora=4",), ("pure_bf16", "adafactor"), ("qlora=8",)])
def test_a_ladder_keeps_its_start(start):
    rungs = climb(start=start)
    assert all(rung[: len(start)] == start for rung in rungs)
    assert any("lora=16" in rung for rung in rungs) == (start in (("bf16",), ("pure_bf16", "adafactor")))
    for rung in rungs:
        techniques.parse(rung)


def test_a_ladder_leaves_out_what_a_model_does_not_take():
    rungs = advice.climb(measured(), lambda rung: "lora=16" not in rung)
    assert rungs == climb()[:-2]


@pytest.mark.parametrize(
    ("text", "trained"),
    [("lora=16", 12 * 16 * (768 + 2304 + 768 + 768 + 2 * (768 + 3072))), ("prompt=20", 20 * 768)],
)
def test_the_share_of_trained_weights_is_counted(text, trained):
    share = advice.share_trained(text, model="gpt2", seq_len=8, batch_size=1)
    assert share == pytest.approx(trained / (124_439_808 + trained))


@pytest.mark.parametrize("first", [*range(9), None])
def test_the_first_rung_that_fits_is_found_after_asking_few(first):
    rungs, asked = [(f"{n}",) for n in range(9)], []

    def fits(rung):
        asked.append(rung)
        return first is not None and rungs.index(rung) >= first

    assert advice.first_that_fits(rungs, fits) == first
    assert len(set(asked)) == len(asked) <= 5


@pytest.mark.parametrize("guess", range(9))
@pytest.mark.parametrize("first", [0, 1, 4, 8, None])
def test_a_wrong_guess_is_corrected(first, guess):
    rungs, asked = [(f"{n}",) for n in range(9)], []

    def fits(rung):
        asked.append(rung)
        return first is not None and rungs.index(rung) >= first

    assert advice.first_that_fits(rungs, fits, lambda rung: rungs.index(rung) >= guess) == first
    assert len(set(asked)) == len(asked)
    if first and first == guess:
        assert asked == [rungs[0], rungs[first], *[rungs[first - 1]] * (first > 1)]


@pytest.mark.parametrize(
    ("rung", "batch_size", "parts"),
    [
        ((), 1, []),
        ((), 8, [2, 4, 8]),
        (("accumulation=4", "bf16"), 8, [8]),
        (("accumulation=8",), 8, []),
        (("optimizer_in_backward", "bf16"), 12, [2, 4, 12]),
        ((), 7, [7]),
    ],
)
def test_a_batch_comes_down_to_single_sequences(rung, batch_size, parts):
    lists = advice.in_more_parts(rung, batch_size)
    assert [texts[-1] for texts in lists] == [f"accumulation={number}" for number in parts]
    for texts in lists:
        techniques.parse(texts)
        assert set(texts) >= set(rung) - {"optimizer_in_backward", "accumulation=4"}


def test_what_suits_a_model():
    texts = ("bf16", "chunked_loss", "accumulation=4")
    sizes = {"seq_len": 8, "batch_size": 8}
    assert advice.suited(texts, model="gpt2", **sizes) == texts
    assert advice.suited(texts, model="bert-base-uncased", **sizes) == ("bf16", "accumulation=4")
    assert advice.suited(texts, model="gpt2", **sizes | {"batch_size": 6}) == ("bf16", "chunked_loss")


def test_the_reference_is_that_of_the_committed_records():
    assert reference.FILE.read_text("utf-8") == reference.text(), "run python -m memstudy.studies.ablation.reference"
    rows = reference.reference().rows
    assert len(rows) > 20
    rungs = advice.ladder(*advice.measured_alone(rows, reference.advised()))
    assert len(rungs) > 4
    for rung in rungs:
        HubModelRun(experiment="test", model="gpt2", seq_len=8, batch_size=8, techniques=rung)


def test_without_reference_rows_it_is_said_how_to_make_them(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=r"no reference rows in .*: run memstudy report memory_ablation --scale full"):
        reference.made()


# --- the quickest of what fits


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (1000, ()),
        (30, ("accumulation=2",)),
        (22, ("checkpointing", "accumulation=2")),
        (10, ("checkpointing", "accumulation=4")),
        (5, ("checkpointing", "accumulation=8")),
        (2.5, ("checkpointing", "chunked_loss", "accumulation=8")),
    ],
)
def test_what_later_techniques_make_needless_is_left_out_again(limit, expected):
    def parts(rung):
        return next((int(text.partition("=")[2]) for text in rung if text.startswith("accumulation")), 1)

    def time(rung):
        return 10 + 2 * parts(rung) * (1 + 1.1 * ("chunked_loss" in rung)) + 3 * ("checkpointing" in rung)

    def fits(rung):
        saved = (0.5 if "checkpointing" in rung else 1) * (0.75 if "chunked_loss" in rung else 1)
        return 48 / parts(rung) * saved <= limit

    full = ("checkpointing", "chunked_loss", "accumulation=8")
    assert advice.quickest(full, full, time, fits) == expected
    assert advice.quickest(full, (), time, fits) == full


# --- alone, by prediction


DEEP = [
    ("gpt2", {"n_layer": 12}, ("checkpointing", "selective_checkpointing=0.5", "bf16")),
    ("t5", {"num_layers": 8, "num_decoder_layers": 3}, ("accumulation=4", "checkpointing")),
    ("bert", {"num_hidden_layers": 3}, ("checkpointing",)),  # predicted whole
]


@pytest.mark.parametrize(("family", "layers", "texts"), slow_but(DEEP[:1], DEEP), ids=["deep", "two stacks", "shallow"])
def test_few_layers_give_the_times_of_the_whole_model(family, layers, texts, tmp_path):
    card = find_gpu("H100-80GB")
    run = HubModelRun(experiment="a", model=config_file(tmp_path, family, **layers), batch_size=64, seq_len=64)
    alone = advice.predicted_alone(advice.estimates(run, card), texts)
    plain, *whole = (run.model_copy(update={"techniques": chosen}).foretell(card) for chosen in ((), *zip(texts)))
    times = [report.time.step_time_ms / plain.time.step_time_ms for report in whole]
    assert alone.times == pytest.approx(dict(zip(texts, times, strict=True)), rel=0.03)
    # Memory bends where the peak moves to another phase, but what saves more still does.
    needs = dict(zip(texts, (report.whole_gpu_mib for report in whole), strict=True))
    assert sorted(texts, key=alone.savings.get, reverse=True) == sorted(texts, key=needs.get)


@pytest.mark.parametrize("model", ["gpt2", "qwen2.5-7b", "gemma-3-1b", "t5-small"])
def test_a_cut_model_differs_in_its_layers_alone(model):
    run = {"experiment": "a", "model": model, "batch_size": 1, "seq_len": 8}
    with torch.device("meta"):
        before, after = HubModelRun(**run).make_model(), advice.CutRun(**run, n_layers=2).make_model()
    shapes, left = ({name: weight.shape for name, weight in net.named_parameters()} for net in (before, after))
    assert left.items() < shapes.items()
    gone = shapes.keys() - left.keys()
    n_layers = model_config(model).num_hidden_layers
    assert {re.search(r"\.(\d+)\.", name)[1] for name in gone} == {str(n) for n in range(2, n_layers)}
