"""`memstudy validate`: predictions beside measurements. The measurements here are made up: there is no GPU."""

import json

import pytest
import torch
from typer.testing import CliRunner

from memstudy import records
from memstudy.cli import validate as command
from memstudy.cli.main import app
from memstudy.kinds import parse_run
from memstudy.profiler import find_gpu
from memstudy.profiler.catalogue import Gpu
from memstudy.studies.validation import comparison, steps
from memstudy.studies.validation.run import ValidationRun
from memstudy.trainers.language_model import LanguageModelRun

TOLD = {"driver": "550.54.15", "torch": "2.13.0+cu126"}
TINY = LanguageModelRun(
    experiment="tiny", n_layers=1, hidden_size=8, n_heads=2, feed_forward=16, vocab_size=11, seq_len=4, batch_size=2,
    measure_steps=1,
)  # fmt: skip


def predicted(**others):
    metrics = {
        "peak_allocated_mib": 990.0, "peak_reserved_mib": 1020.0, "whole_gpu_mib": 1500.0, "step_time_ms": 11.0,
        "step_time_low_ms": 9.0, "step_time_high_ms": 14.0, "fits": True,
    }  # fmt: skip
    config = {"of": TINY.model_dump(mode="json")}
    return {"status": "ok", "reason": "", "config": config, "metrics": metrics | others}


def measured(status="ok", reason="", **others):
    metrics = {
        "peak_allocated_mib": 1000.0, "peak_reserved_mib": 1000.0, "whole_gpu_mib": 1500.0, "step_time_ms": 10.0,
    }  # fmt: skip
    return {"status": status, "reason": reason, "metrics": metrics | others if status == "ok" else {}}


def rows():
    without_time = predicted()
    for name in [name for name in without_time["metrics"] if "time" in name]:
        del without_time["metrics"][name]
    return [
        comparison.compared("one", predicted(), measured()),
        comparison.compared("two", predicted(step_time_high_ms=10.5), measured(step_time_ms=11.5)),
        comparison.compared("unknown speed", without_time, measured()),
        comparison.compared("too large", predicted(fits=False), None),
        comparison.compared("failed", predicted(), measured("oom", "CUDA out of memory")),
    ]


def test_an_error_is_the_prediction_relative_to_the_measurement():
    one, two, unknown, large, failed = rows()
    assert one["errors_percent"] == {"allocated": -1.0, "reserved": 2.0, "whole GPU": 0.0, "step time": 10.0}
    assert "step time" not in unknown["errors_percent"]
    assert (large["status"], large["reason"], large["errors_percent"]) == ("not run", "predicted not to fit", {})
    assert (failed["status"], failed["errors_percent"]) == ("oom", {})
    assert [comparison.in_band(row) for row in (one, two, unknown, large)] == [True, False, None, None]


def test_the_summary_counts_what_was_measured():
    found = comparison.summary(rows())
    assert (found["n_steps"], found["n_measured"]) == (5, 3)
    assert (found["allocated_median_percent"], found["reserved_worst_percent"]) == (1.0, 2.0)
    assert found["step_time_median_percent"] == pytest.approx((10 + 100 * (1 - 11 / 11.5)) / 2, abs=1e-3)
    assert found["in_band_percent"] == 50
    assert comparison.summary([rows()[3]]) == {"n_steps": 1, "n_measured": 0}


def test_the_record_is_whole_and_named_after_card_driver_and_torch(tmp_path):
    path = comparison.write(tmp_path, rows(), find_gpu("A100-80GB"), TOLD, started=records.now(), quick=False)
    assert [file.name for file in tmp_path.iterdir()] == ["A100-80GB-550.54.15-2.13.0+cu126.json"]
    record = records.read_record(path)
    assert record["curves"]["rows"] == rows()
    assert record["data"]["gpu"]["context_source"]
    assert record["metrics"]["n_measured"] == 3
    bad = [rows()[0] | {"measured": {"step_time_ms": float("nan")}}]
    with pytest.raises(ValueError, match="JSON"):
        comparison.write(tmp_path, bad, find_gpu("T4"), TOLD, started=records.now(), quick=True)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_card_that_the_catalogue_lacks_is_described_in_the_record(tmp_path):
    card = Gpu(
        name="NVIDIA-New/Card", compute_capability=(9, 9), memory_mib=1000, context_mib=300, context_source="here"
    )
    path = comparison.write(tmp_path, rows(), card, TOLD, started=records.now(), quick=True)
    assert path.name == "NVIDIA-New-Card-550.54.15-2.13.0+cu126-quick.json"
    told = json.loads(path.read_text())["data"]["gpu"]
    assert (told["context_mib"], told["context_source"], told["speed"]) == (300, "here", None)


def test_the_table_of_all_records_says_none_yet_until_there_is_one(tmp_path):
    empty = comparison.of_all(tmp_path)
    assert list(empty.index) == ["none yet"]
    assert empty.isna().all(axis=None)
    comparison.write(tmp_path, rows(), find_gpu("A100-80GB"), TOLD, started=records.now(), quick=False)
    (name,) = (table := comparison.of_all(tmp_path)).index
    assert name == "A100-80GB, driver 550.54.15, PyTorch 2.13.0+cu126"
    assert table.loc[name, ("", "steps")] == 3
    assert table.loc[name, ("step time", "worst [%]")] == 10.0
    assert list(table.columns) == list(empty.columns)


def test_the_errors_are_printed(capsys):
    command.show(rows())
    told = capsys.readouterr().out
    assert "\ntoo large: not run: predicted not to fit\n" in told
    assert "-1.00 %" in told
    assert "allocated: median error 1.00 %, worst 1.00 %" in told


def test_the_standard_steps_are_models_techniques_and_variants():
    chosen, few = steps.standard_steps(), steps.standard_steps(quick=True)
    assert 28 <= len(chosen) <= 32
    assert set(few) < set(chosen)
    used = {text.partition("=")[0] for step in chosen.values() for text in step.techniques}
    assert {"bf16", "fp16", "tf32", "checkpointing", "adamw_8bit", "offload_activations", "chunked_loss"} <= used
    assert {step.mixer().name for step in chosen.values() if step.mixer()} >= {"softmax", "window", "lsh", "performer"}
    for name, step in chosen.items():
        run = ValidationRun(experiment=name, of=step)
        step.build(gpu="A100-80GB")  # raises for what cannot run
        assert parse_run(run.model_dump(mode="json")) == run


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_it_says_so_in_one_line(tmp_path):
    said = CliRunner().invoke(app, ["validate", "--quick", "--results", str(tmp_path)])
    assert said.exit_code == 2
    assert said.stderr.strip() == (
        "error: validate measures on a GPU, and PyTorch finds no CUDA device here; to predict one, memstudy predict"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_each_step_is_predicted_and_one_that_fits_is_run(tmp_path, monkeypatch):
    """For a card without an entry; here the run itself says that there is no GPU."""
    large = TINY.model_copy(update={"vocab_size": 2_000_000})
    monkeypatch.setattr(steps, "standard_steps", lambda *, quick: {"tiny": TINY, "large": large})
    card = Gpu(name="New", compute_capability=(8, 0), memory_mib=200, context_mib=100)
    tiny, big = command.compare(card, tmp_path, quick=True)
    assert (tiny["status"], tiny["reason"]) == ("unavailable", "a validation needs a CUDA device")
    assert tiny["predicted"]["whole_gpu_mib"] > 100
    assert "step_time_ms" not in tiny["predicted"]
    assert (big["status"], big["reason"]) == ("not run", "predicted not to fit")
    assert command.with_context(find_gpu("T4"), tmp_path) == find_gpu("T4")
    with pytest.raises(ValueError, match="tiny, the step that shows the context of New: a validation needs a CUDA"):
        command.with_context(card, tmp_path)


@pytest.mark.gpu
def test_this_gpu_is_as_predicted(tmp_path):
    said = CliRunner().invoke(app, ["validate", "--quick", "--results", str(tmp_path)])
    assert said.exit_code == 0, said.output
    (path,) = tmp_path.glob("*-quick.json")
    record = records.read_record(path)
    assert record["metrics"]["n_measured"] > 0
    assert record["metrics"]["allocated_worst_percent"] < 5
