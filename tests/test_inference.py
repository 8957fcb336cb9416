"""Inference: forward passes take the predicted memory, and their times are reported correctly."""

import functools
import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from support.tiers import cover, slow_but
from support.tiny_models import config_file

from memstudy.kinds import PredictionRun, parse_run
from memstudy.profiler import MIB, measure, predict
from memstudy.techniques import TECHNIQUES
from memstudy.trainers import inference
from memstudy.trainers.inference import InferenceRun

pytestmark = pytest.mark.usefixtures("one_thread", "young_garbage_only")

VARIANTS = {
    "unchanged": {},
    "lowrank": {"variant": "lowrank", "rank": 4},
    "linformer": {"variant": "linformer", "rank": 4, "max_len": 32},
}


@pytest.fixture
def run(tmp_path):
    model = config_file(tmp_path, "bert")

    def make(**changes):
        return InferenceRun(
            **{"experiment": "tiny", "model": model, "seq_len": 32, "batch_size": 2, "measure_steps": 3, **changes}
        )

    return make


# --- memory


def highest(report):
    """The moment of the pass with most memory: its phase, and bytes by category."""
    return max(report.timeline, key=lambda moment: sum(moment[2].values()))[1:]


PASSES = [
    (variant, task, batch_size)
    for variant, task in [("unchanged", "lm"), *((variant, "classification") for variant in VARIANTS)]
    for batch_size in (1, 16)
]


@pytest.mark.parametrize(("variant", "task", "batch_size"), slow_but(cover(PASSES), PASSES))
def test_a_forward_pass_takes_what_is_predicted(variant, task, batch_size, run):
    made = run(convert_to=VARIANTS[variant], batch_size=batch_size, task=task)
    measured, predicted = measure(made.build(), iterations=1), predict(made.build(), iterations=1)
    assert predicted.iteration_peaks == measured.iteration_peaks
    assert highest(predicted) == highest(measured)
    assert {phase for _, phase, _ in measured.timeline} == {"forward"}
    parameters = 4 * sum(p.numel() for p in made.make_model().parameters())
    assert measured.most_by_category["parameters"] == parameters
    assert measured.most_by_category["gradients"] == measured.most_by_category["optimizer"] == 0
    metrics = made.execute(None)["metrics"]
    assert metrics["peak_allocated_mib"] * MIB == measured.iteration_peaks[0]
    assert metrics["parameters_mib"] * MIB == parameters
    assert metrics["beside_parameters_mib"] * MIB == measured.iteration_peaks[0] - parameters > 0


def test_the_unchanged_classifiers_peak_is_in_its_pass(run):
    made = run(task="classification")
    assert measure(made.build(), iterations=1).peak_bytes == predict(made.build(), iterations=1).iteration_peaks[0]


@pytest.mark.parametrize(
    "changes", [{"task": "lm"}, {"task": "classification", "convert_to": VARIANTS["lowrank"]}], ids=["tied", "factored"]
)
def test_what_making_a_model_takes_is_not_the_passes(changes, run):
    """Making a model takes more: a head exists before it is tied to the embedding, projections before factoring."""
    made = run(batch_size=1, seq_len=2, **changes)
    whole = measure(made.build(), iterations=1).peak_allocated_mib
    reported = made.execute(None)["metrics"]["peak_allocated_mib"]
    assert reported < 0.9 * whole
    made.model_copy(update={"budget_mib": reported}).execute(None)


def test_a_pass_keeps_nothing_for_a_backward_pass(run):
    """Two more layers add only their parameters to a pass; a training step would also grow in activations."""
    folder = Path(run().model).parent
    beside = []
    for layers in (2, 4):
        made = run(model=config_file(folder, "bert", num_hidden_layers=layers), batch_size=16, task="classification")
        beside.append(made.execute(None)["metrics"]["beside_parameters_mib"])
    assert beside[0] == beside[1]


def test_low_rank_takes_less_and_a_rank_of_more_than_half_the_width_takes_more(run):
    unchanged, small, large = (
        run(convert_to=convert_to).execute(None)["metrics"]["peak_allocated_mib"]
        for convert_to in ({}, *({"variant": "lowrank", "rank": rank} for rank in (4, 128)))
    )
    assert small < unchanged < large


def test_a_gpu_is_predicted(run):
    report = predict(run().build(gpu="T4"), gpu="T4")
    assert report.whole_gpu_mib > report.peak_reserved_mib >= report.peak_allocated_mib > 0
    assert report.out_of_memory is None
    assert report.peak_by_category["parameters"] >= 4 * sum(p.numel() for p in run().make_model().parameters())
    assert report.peak_by_category["gradients"] == 0


# --- a run carried out


def test_a_peak_past_the_budget_is_out_of_memory(run):
    peak = run().execute(None)["metrics"]["peak_allocated_mib"]
    run(budget_mib=peak).execute(None)
    with pytest.raises(MemoryError, match=r"peak \d+\.\d MiB passes the budget of \d"):
        run(budget_mib=0.99 * peak).execute(None)


RANKS = [(1, 1), (2, 2), (10, 10), (19, 19), (20, 19), (21, 20), (40, 38), (100, 95)]


@pytest.mark.parametrize(("count", "rank"), slow_but([(1, 1), (20, 19), (21, 20)], RANKS))
def test_the_95th_percentile_is_the_time_of_the_nearest_rank(count, rank, run, monkeypatch):
    """The time that 95 % of the samples do not exceed: number ceil(0.95 n) of the n sorted times."""
    times = [0.001 * (i + 1) for i in reversed(range(count))]
    left = list(times)
    monkeypatch.setattr(inference, "timed", lambda step: left.pop())
    result = run(measure_steps=count, batch_size=2).execute(None)
    metrics = result["metrics"]
    assert metrics["sample_time_p95_ms"] == pytest.approx(rank / 2)  # a sample is one of two sequences
    assert metrics["sample_time_ms"] == pytest.approx((count + 1) / 2 / 2)
    assert result["curves"]["sample_times_ms"] == pytest.approx([(i + 1) / 2 for i in range(count)])


def test_what_a_run_reports(run):
    result = run(measure_steps=7).execute(None)
    json.dumps(result, allow_nan=False)
    assert result["metrics"]["sample_time_p95_ms"] >= result["metrics"]["sample_time_ms"] > 0
    assert len(result["curves"]["sample_times_ms"]) == 7
    assert result["data"] == {}


def test_dropout_is_off_and_no_gradient_is_followed(run, tmp_path):
    path = config_file(tmp_path, "bert", hidden_dropout_prob=0.9)
    step = run(model=path).build()()
    outputs = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _, output: outputs.append(output) if type(module).__name__ == "BertForMaskedLM" else None
    )
    try:
        step()
        step()
    finally:
        hook.remove()
    first, second = (output.logits for output in outputs)
    assert not first.requires_grad
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert outputs[0].loss is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"techniques": ("bf16",)}, "techniques"), ({"measure_steps": 0}, "greater than 0"), ({"seq_len": 65}, "65")],
    ids=str,
)
def test_bad_choices_are_refused(changes, said, run):
    with pytest.raises(ValidationError, match=said):
        run(**changes)


def test_a_run_survives_json(run):
    for convert_to in VARIANTS.values():
        made = run(convert_to=convert_to)
        again = parse_run(json.loads(made.model_dump_json()))
        assert again == made
        assert type(again) is InferenceRun


# --- pruned weights and engines


def executed(run, *names, **changes):
    return run(techniques=names, **changes).execute(None)["metrics"]


PRUNED = ["masks=0.5", "pruned=0.5", "narrow=0.5", "fewer_heads=0.5"]


@pytest.mark.parametrize("text", slow_but(PRUNED[1:3], PRUNED))
def test_a_pruned_models_pass_takes_what_is_predicted(text, run):
    made = run(techniques=(text,), task="classification")
    measured, predicted = measure(made.build(), iterations=1), predict(made.build(), iterations=1)
    assert predicted.iteration_peaks == measured.iteration_peaks
    assert highest(predicted) == highest(measured)


def test_only_narrow_and_very_sparse_weights_take_less(run):
    took = {name: executed(run, name) for name in ("masks=0.8", "pruned=0.8", "narrow=0.8", "sparse=0.5", "sparse=0.9")}
    whole = executed(run)
    parameters = {name: metrics["parameters_mib"] for name, metrics in took.items()}
    assert took["masks=0.8"]["peak_allocated_mib"] > whole["peak_allocated_mib"]
    assert took["pruned=0.8"]["peak_allocated_mib"] == whole["peak_allocated_mib"]
    assert parameters["narrow=0.8"] < whole["parameters_mib"]


@pytest.mark.parametrize(
    ("engine", "distance"),
    [pytest.param("compile", 1e-4, marks=pytest.mark.slow), ("onnxruntime", 1e-3)],
)
def test_an_engine_computes_what_pytorch_does(engine, distance, run):
    for package in TECHNIQUES[engine].packages:
        pytest.importorskip(package)
    made = run(task="classification")
    model = made.make_model().eval()
    batch = {name: tensor for name, tensor in made.make_batch().items() if name != "labels"}
    with torch.no_grad():
        expected = model(**batch).logits
        technique = TECHNIQUES[engine]()
        technique.prepare(model)
        found = (technique.forward_pass(model, batch) or functools.partial(model, **batch))()
    found = torch.as_tensor(found[0]) if isinstance(found, list) else found.logits
    torch.testing.assert_close(found, expected, atol=distance, rtol=distance)


@pytest.mark.parametrize("engine", [pytest.param("compile", marks=pytest.mark.slow), "onnxruntime", "int8"])
def test_an_engine_leaves_a_record(engine, run):
    for package in TECHNIQUES[engine].packages:
        pytest.importorskip(package)
    metrics = executed(run, engine, task="classification")
    assert metrics["sample_time_ms"] > 0
    assert "resident_mib" in metrics


def test_engines_are_not_predicted(run):
    with pytest.raises(ValueError, match="the memory of onnxruntime is not predicted"):
        PredictionRun(experiment="test", of=run(techniques=("onnxruntime",)))


def test_what_is_for_training_is_refused_at_inference(run):
    for name in ("bf16", "checkpointing", "sgd"):
        with pytest.raises(ValueError, match=f"technique '{name}' is for training alone"):
            run(techniques=(name,))
