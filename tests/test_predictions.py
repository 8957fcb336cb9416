"""Predictions as runs: their metrics equal the prediction and the measurement; committed predictions still hold."""

import json
from importlib.util import find_spec

import pytest
from pydantic import ValidationError
from support.results import committed
from support.tiers import cover, slow_but
from support.tiny_run import tiny_run

from memstudy.kinds import LargestBatchRun, LongestSequenceRun, PredictionRun, parse_run
from memstudy.profiler import MIB, find_gpu, fit, predict
from memstudy.studies.reformer.run import ReformerRun
from memstudy.techniques import parse
from memstudy.trainers.inference import InferenceRun

pytestmark = pytest.mark.usefixtures("one_thread", "cache", "young_garbage_only")
REFORMER = ReformerRun(
    experiment="tiny", n_layers=2, hidden_size=32, n_heads=2, head_dim=8, feed_forward=48, vocab_size=300, seq_len=32,
    batch_size=2, measure_steps=1, attention={"variant": "lsh", "num_hashes": 2, "chunk_length": 8},
)  # fmt: skip
FORWARD = InferenceRun(experiment="tiny", model="gpt2", batch_size=1, seq_len=16, measure_steps=1)
KINDS = pytest.mark.parametrize("run", [tiny_run(), REFORMER, FORWARD], ids=lambda run: run.kind)


@KINDS
@pytest.mark.parametrize("gpu", ["", "T4"])
def test_a_prediction_survives_json(run, gpu):
    prediction = PredictionRun(experiment="tiny", of=run, gpu=gpu)
    again = parse_run(json.loads(prediction.model_dump_json()))
    assert again == prediction
    assert type(again.of) is type(run)


@pytest.mark.parametrize("run", [tiny_run(), REFORMER], ids=lambda run: run.kind)
def test_on_this_machine_it_is_what_is_measured_to_the_byte(run, tmp_path):
    predicted = PredictionRun(experiment="tiny", of=run).execute(tmp_path)["metrics"]
    measured = run.execute(tmp_path)["metrics"]
    assert set(predicted) < set(measured)
    assert {name: measured[name] for name in predicted} == predicted


def test_of_a_forward_pass_it_is_what_is_measured_to_the_byte(tmp_path):
    predicted = PredictionRun(experiment="tiny", of=FORWARD).execute(tmp_path)["metrics"]
    assert predicted["step_peak_max_mib"] == FORWARD.execute(tmp_path)["metrics"]["peak_allocated_mib"]


def test_for_a_gpu_it_says_the_whole_of_it_and_whether_it_fits(tmp_path):
    small = PredictionRun(experiment="tiny", of=tiny_run(), gpu="T4").execute(tmp_path)
    json.dumps(small, allow_nan=False)
    report = predict(tiny_run().build(gpu="T4"), gpu="T4")
    assert small["metrics"]["whole_gpu_mib"] == report.whole_gpu_mib
    assert small["metrics"]["fits"] is True
    assert small["curves"]["unverified_ops"] == list(report.unverified)
    large = PredictionRun(experiment="tiny", of=tiny_run(batch_size=2**21), gpu="T4").execute(tmp_path)
    assert large["metrics"]["fits"] is False


def test_the_largest_batch_is_what_fit_finds_whatever_the_batch_of_the_run(tmp_path):
    search = LargestBatchRun(experiment="tiny", of=tiny_run(batch_size=3), gpu="T4")
    assert parse_run(json.loads(search.model_dump_json())) == search
    metrics = search.execute(tmp_path)["metrics"]
    found = fit(lambda size: tiny_run(batch_size=size).build(gpu="T4"), gpu="T4")
    assert (metrics["largest_batch"], metrics["headroom_percent"]) == (found.batch_size, found.headroom_percent)
    assert metrics["whole_gpu_mib"] == found.report.whole_gpu_mib
    with pytest.raises(ValidationError, match="gpu"):
        LargestBatchRun(experiment="tiny", of=tiny_run(), gpu="")


def test_the_longest_sequence_is_the_last_that_fits(tmp_path):
    search = LongestSequenceRun(experiment="tiny", of=tiny_run(batch_size=2**12), gpu="T4")
    assert parse_run(json.loads(search.model_dump_json())) == search
    metrics = search.execute(tmp_path)["metrics"]
    longest = metrics["longest_seq_len"]
    assert longest % 8 == 0

    def whole_gpu_mib(seq_len):
        return search.of.model_copy(update={"seq_len": seq_len}).foretell("T4").whole_gpu_mib

    assert metrics["whole_gpu_mib"] == whole_gpu_mib(longest) <= find_gpu("T4").memory_mib < whole_gpu_mib(longest + 8)


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"gpu": "T5"}, "unknown GPU 'T5'"),
        ({"of": {"kind": "fine_tune"}}, "does not match any of the expected tags"),
        ({"of": {"kind": "language_model", "experiment": "tiny"}}, "of.language_model.seq_len"),
        ({"steps": 3}, "steps"),
    ],
    ids=str,
)
def test_bad_choices_are_refused(choices, said):
    with pytest.raises(ValidationError) as refusal:
        PredictionRun(**{"experiment": "tiny", "of": tiny_run(), **choices})
    assert said in str(refusal.value)


def smallest() -> list[dict]:
    """The committed prediction with fewest tokens for each study, kind of run and GPU, among those possible here."""
    fewest: dict[tuple, dict] = {}
    for path, record in committed().items():
        config = record["config"]
        if config["kind"] != "prediction" or record["status"] != "ok":
            continue
        packages = {package for t in parse(config["of"].get("techniques", ())) for package in t.packages}
        if all(map(find_spec, packages)):
            key = path.parent.name, config["of"]["kind"], config.get("gpu", "")
            tokens = config["of"].get("batch_size", 1) * config["of"]["seq_len"]
            if key not in fewest or tokens < fewest[key]["tokens"]:
                fewest[key] = record | {"tokens": tokens}
    return list(fewest.values())


ONE_OF_A_KIND = cover(smallest(), lambda record: {record["config"]["of"]["kind"]})


@pytest.mark.parametrize("record", slow_but(ONE_OF_A_KIND, smallest()), ids=lambda record: record["run_id"])
def test_committed_predictions_are_made_again_to_the_byte(record, tmp_path):
    again = parse_run(record["config"]).execute(tmp_path)["metrics"]
    # Older records were predicted before the gradients of cast weights counted as gradients.
    if not record["metrics"].get("most_gradients_mib", 1):
        again["most_gradients_mib"] = 0
    assert {name: round(value * MIB) for name, value in again.items() if name.endswith("_mib")} == {
        name: round(value * MIB) for name, value in record["metrics"].items() if name.endswith("_mib")
    }
