"""Runs: refused choices, measurements, and training that learns, is reproducible and resumes after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from support.results import without_times
from support.tiny_run import tiny_run
from transformers import set_seed

from memstudy import data, records
from memstudy.attention import SoftmaxConfig, WindowConfig
from memstudy.kinds import parse_run
from memstudy.profiler import MIB, measure
from memstudy.techniques import Bf16
from memstudy.trainers import language_model
from memstudy.trainers.step import TIMELINE_POINTS
from memstudy.trainers.trainer import SAVE_STEPS, TechniqueTrainer, last_whole_checkpoint, make_trainer

pytestmark = pytest.mark.usefixtures("one_thread", "cache", "young_garbage_only")


def training(steps, **changes):
    """A tiny run that trains on the miniature."""
    known = {"dataset": "miniature", "data_hash": data.load("miniature").content_hash}
    return tiny_run(**{"measure_steps": 0, "train_steps": steps, "eval_blocks": 4, **known, **changes})


# --- what a run may be


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_layers": 0}, "n_layers"),
        ({"hidden_size": -32}, "hidden_size"),
        ({"n_heads": 3}, "hidden_size=32 is not a multiple of n_heads=3"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"seq_len": 1}, "seq_len"),
        ({"batch_size": -1}, "batch_size"),
        ({"batch_size": 2.5}, "batch_size"),
        ({"batch_size": "many"}, "batch_size"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"measure_steps": -1}, "measure_steps"),
        ({"measure_steps": 0}, "nothing to run"),
        ({"budget_mib": 0}, "budget_mib"),
        ({"train_steps": 5}, "train_steps=5 needs a dataset"),
        ({"eval_blocks": 0}, "eval_blocks"),
        ({"seed": -1}, "seed"),
        ({"layers": 2}, "layers"),
        ({"kind": "encoder"}, "kind"),
        ({"techniques": ("fp8",)}, "unknown technique 'fp8'"),
        ({"techniques": ("accumulation=3",)}, "accumulation=3 does not divide batch_size=2"),
        ({"techniques": ("checkpointing", "selective_checkpointing")}, "only one of kind"),
        ({"attention": {}}, "unknown attention variant None"),
        ({"attention": {"variant": "linear"}}, "unknown attention variant 'linear'; known: softmax"),
        ({"attention": {"variant": "softmax", "implementation": "fast"}}, "implementation='fast'"),
        ({"attention": {"variant": "window", "size": 4}}, "size"),
        ({"attention": {"variant": "window", "window": 0}}, "window=0"),
        ({"attention": {"variant": "window", "window": 17}}, "window=17 is larger than seq_len=16"),
    ],
    ids=str,
)
def test_bad_choices_are_refused(changes, said):
    with pytest.raises(ValidationError) as refusal:
        tiny_run(**changes)
    assert said in str(refusal.value)


@pytest.mark.parametrize("given", [None, [], "run", {}, {"kind": "encoder"}, {"kind": None}], ids=str)
def test_unknown_kinds_of_run_are_refused(given):
    with pytest.raises(ValueError, match=r"unknown kind of run .*; known: language_model"):
        parse_run(given)


def test_a_run_survives_json_and_cannot_be_changed():
    run = tiny_run(techniques=("bf16",), attention={"variant": "window", "window": 8})
    assert parse_run(json.loads(run.model_dump_json())) == run
    assert run.parsed_techniques() == (Bf16(),)
    assert run.mixer() == WindowConfig(8)
    assert tiny_run().mixer() == SoftmaxConfig("eager")
    with pytest.raises(ValidationError):
        run.seed = 1


# --- measuring


def test_what_a_measured_run_reports(tmp_path):
    run = tiny_run(measure_steps=3)
    result = run.execute(tmp_path)
    metrics, curves = result["metrics"], result["curves"]
    json.dumps(result, allow_nan=False)
    assert metrics["n_parameters"] == sum(p.numel() for p in run.make_model().parameters())
    assert metrics["peak_allocated_mib"] == measure(run.build()).peak_allocated_mib
    assert metrics["peak_parameters_mib"] == 4 * metrics["n_parameters"] / MIB
    assert len(curves["step_times_ms"]) == 3
    assert metrics["step_time_min_ms"] <= metrics["step_time_ms"] <= metrics["step_time_max_ms"]
    assert metrics["tokens_per_s"] == pytest.approx(1e3 * 2 * 16 / metrics["step_time_ms"])
    assert 10 < len(curves["memory_timeline"]) <= TIMELINE_POINTS
    assert sum(curves["activations_by_module_mib"].values()) == pytest.approx(
        metrics["forward_end_activations_mib"], abs=0.02
    )
    assert list(tmp_path.iterdir()) == []


def test_a_peak_past_the_budget_is_out_of_memory(tmp_path):
    peak = measure(tiny_run().build()).peak_allocated_mib
    tiny_run(budget_mib=peak).execute(tmp_path)
    with pytest.raises(MemoryError, match=r"MiB passes the budget of"):
        tiny_run(budget_mib=0.99 * peak).execute(tmp_path)


def test_building_twice_gives_the_same_step():
    first, second = measure(tiny_run().build()), measure(tiny_run().build())
    assert [live for _, _, live in first.timeline] == [live for _, _, live in second.timeline]


@pytest.mark.parametrize(
    "techniques",
    [
        (),
        ("accumulation=2",),
        ("chunked_loss",),
        *(
            pytest.param(techniques, marks=pytest.mark.slow)
            for techniques in (("bf16",), ("checkpointing",), ("optimizer_in_backward",), ("adamw_8bit",))
        ),
    ],
    ids=lambda techniques: "".join(techniques) or "baseline",
)
def test_the_measured_step_is_the_one_of_a_training(techniques, tmp_path):
    run = tiny_run(techniques=techniques, hidden_size=64, seq_len=32, batch_size=4)

    def make():
        set_seed(run.seed)
        rows = torch.randint(run.vocab_size, (run.batch_size, run.seq_len)).tolist()
        rows = datasets.Dataset.from_dict({"input_ids": rows})
        return make_trainer(run, run.make_model(), tmp_path, train_steps=3, train=rows).train

    run.build()()()  # bitsandbytes makes its code tables once per process
    alone, trained = measure(run.build(), iterations=3), measure(make, iterations=1)
    assert 0 <= trained.peak_bytes - alone.peak_bytes <= 16  # a training also counts its number of labels
    for category in ("parameters", "gradients", "optimizer", "temporary"):
        assert trained.peak_by_category[category] == alone.peak_by_category[category]
    for phase, peak in alone.peak_by_phase.items():
        assert 0 <= trained.peak_by_phase[phase] - peak <= 16


def test_what_is_predicted_for_a_gpu_stays_on_the_cpu_where_there_is_a_gpu(tmp_path, monkeypatch):
    run = tiny_run(techniques=("bf16",))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    trainer = make_trainer(run, run.make_model(), tmp_path, train_steps=1, predicted=True)
    assert trainer.args.device.type == "cpu"
    assert next(trainer.model.parameters()).device.type == "cpu"


# --- training


def test_two_steps(tmp_path):
    result = training(2).execute(tmp_path)
    metrics, curve = result["metrics"], result["curves"]["train_loss"]
    assert [step for step, _ in curve] == [1, 2]
    assert all(4 < loss < 7 for _, loss in curve)  # ln 300 = 5.7
    assert metrics["train_loss"] == pytest.approx(curve[-1][1], abs=5e-5)
    for split in ("validation", "test"):
        assert metrics[f"{split}_perplexity"] == pytest.approx(torch.tensor(metrics[f"{split}_loss"]).exp().item())
        assert metrics[f"{split}_tokens"] == 4 * 15
    assert metrics["epochs"] == pytest.approx(2 / metrics["epoch_steps"], rel=1e-3)
    assert result["data"] == {
        "name": "miniature",
        "source": "miniature",
        "revision": "unversioned",
        "content_hash": data.load("miniature").content_hash,
    }
    assert list(tmp_path.iterdir()) == []  # too short to need a checkpoint


def test_measuring_and_training_in_one_run(tmp_path):
    both = training(2, measure_steps=1).execute(tmp_path)
    alone = training(2).execute(tmp_path)
    assert both["curves"]["train_loss"] == alone["curves"]["train_loss"]
    assert both["metrics"]["validation_loss"] == alone["metrics"]["validation_loss"]
    assert both["metrics"]["peak_allocated_mib"] > 0


def test_the_loss_of_a_validation_split_is_the_models(tmp_path):
    """Trainer's mean over the blocks equals the mean over all of their tokens."""
    run = training(2, batch_size=2, eval_blocks=3)  # two batches, the second of one block
    kept = []
    make = language_model.make_trainer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_model, "make_trainer", lambda *a, **k: kept.append(make(*a, **k)) or kept[0])
        result = run.execute(tmp_path)
    loaded = data.load("miniature")
    tokenizer = data.train_tokenizer(loaded.splits["train"]["text"], run.vocab_size)
    tokens = torch.tensor(data.blocks(loaded, tokenizer, run.seq_len)["validation"][:3]["input_ids"])
    model = kept[0].model.eval()
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:])
    assert result["metrics"]["validation_loss"] == pytest.approx(losses.item(), rel=1e-5)


def folder_of_text(folder, text):
    """Write the data set polish-books to `folder`, with the same text in each split."""
    (folder / "polish-books").mkdir(parents=True)
    for split in data.sources.SHARES:
        pq.write_table(pa.table({"text": [text]}), folder / "polish-books" / f"{split}.parquet")


@pytest.fixture
def one_batch(tmp_path, monkeypatch):
    """The choices of a run that trains on two sentences, with all blocks in one batch."""
    folder_of_text(tmp_path / "data", "Zażółć gęślą jaźń. W Szczebrzeszynie chrząszcz brzmi w trzcinie.")
    monkeypatch.setenv("MEMSTUDY_DATA", str(tmp_path / "data"))
    return {"dataset": "polish-books", "data_hash": data.load("polish-books").content_hash, "batch_size": 64}


@pytest.mark.parametrize("techniques", [(), ("chunked_loss",)], ids=["baseline", "chunked"])
def test_the_loss_of_the_first_step_is_that_of_the_untrained_model(techniques, one_batch, tmp_path):
    run = training(1, **one_batch, techniques=techniques)
    result = run.execute(tmp_path / "run")
    loaded = data.load(run.dataset)
    tokenizer = data.train_tokenizer(loaded.splits["train"]["text"], run.vocab_size)
    tokens = torch.tensor(data.blocks(loaded, tokenizer, run.seq_len)["train"][:]["input_ids"])
    set_seed(run.seed)
    with torch.no_grad():
        logits = run.make_model()(tokens).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:])
    assert result["metrics"]["train_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_one_batch_is_learnt_by_heart(one_batch, tmp_path):
    result = training(80, **one_batch, learning_rate=5e-3).execute(tmp_path / "run")
    assert result["metrics"]["epoch_steps"] == 1
    assert result["metrics"]["train_loss"] < 0.05
    assert result["metrics"]["validation_perplexity"] < 1.1  # same text as in training
    assert result["data"]["source"] == "folder"


def test_the_seed_decides_the_curve(tmp_path):
    first, again, other = (training(12, seed=seed).execute(tmp_path) for seed in (3, 3, 4))
    assert without_times(first) == without_times(again)
    assert first["curves"]["train_loss"] != other["curves"]["train_loss"]
    assert first["metrics"]["validation_loss"] != other["metrics"]["validation_loss"]


def test_other_data_than_planned_is_refused(tmp_path):
    known = data.load("miniature").content_hash
    for planned, said in (("0123456789abcdef", "0123456789abcdef"), ("", "none")):
        with pytest.raises(
            ValueError, match=f"'miniature' has content hash {known}.*planned with {said}: plan it again"
        ):
            training(2, data_hash=planned).execute(tmp_path)


def test_without_the_data_the_miniature_stands_in(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMSTUDY_DATA", str(tmp_path))
    with pytest.warns(UserWarning, match="the miniature stands in"):
        result = training(2, dataset="polish-books").execute(tmp_path)
    assert (result["data"]["name"], result["data"]["source"]) == ("polish-books", "miniature")
    assert without_times(result)[:2] == without_times(training(2).execute(tmp_path))[:2]


# --- resuming

SHORT, LONG = SAVE_STEPS + 2, SAVE_STEPS + 30  # both log every second step; the last step is always saved


def alter(checkpoint):
    """Mark a checkpoint by a changed first loss in its history; return the old loss."""
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    loss, state["log_history"][0]["loss"] = state["log_history"][0]["loss"], 99.0
    path.write_text(json.dumps(state))
    return loss


@pytest.mark.parametrize(
    "techniques",
    [
        ("selective_checkpointing",),
        *(
            pytest.param(techniques, marks=pytest.mark.slow)
            for techniques in ((), ("adamw_8bit",), ("optimizer_in_backward",), ("accumulation=2", "bf16"))
        ),
    ],
    ids=lambda techniques: "+".join(techniques) or "baseline",
)
def test_a_training_goes_on_from_its_checkpoint_as_if_nothing_had_been(techniques, tmp_path):
    whole = training(LONG, techniques=techniques).execute(tmp_path / "whole")
    training(SHORT, techniques=techniques).execute(tmp_path / "cut")
    assert [path.name for path in (tmp_path / "cut").iterdir()] == [f"checkpoint-{SHORT}"]
    loss = alter(tmp_path / "cut" / f"checkpoint-{SHORT}")
    resumed = training(LONG, techniques=techniques).execute(tmp_path / "cut")
    assert resumed["curves"]["train_loss"][0][1] == 99.0  # resumed, not restarted
    resumed["curves"]["train_loss"][0][1] = round(loss, 4)
    assert without_times(resumed) == without_times(whole)  # to the last digit


@pytest.mark.slow
def test_a_scheduled_training_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    run = training(LONG, schedule="cosine", validations=3)
    whole = run.execute(tmp_path / "whole")

    def killed(trainer, logs, *args, **kwargs):
        if trainer.state.global_step > SHORT:
            raise KeyboardInterrupt

    monkeypatch.setattr(TechniqueTrainer, "log", killed)
    with pytest.raises(KeyboardInterrupt):
        run.execute(tmp_path / "cut")
    monkeypatch.undo()
    resumed = run.execute(tmp_path / "cut")
    assert resumed["curves"]["validation_loss"][-1] == whole["curves"]["validation_loss"][-1]
    assert resumed["metrics"]["test_loss"] == whole["metrics"]["test_loss"]


def test_a_scheduled_learning_rate_rises_and_falls(tmp_path):
    run = training(20, schedule="cosine", learning_rate=1e-2)
    rows = datasets.Dataset.from_dict({"input_ids": torch.randint(run.vocab_size, (40, run.seq_len)).tolist()})
    trainer = make_trainer(run, run.make_model(), tmp_path, train_steps=20, train=rows)
    trainer.go_on()
    rates = [rate for _, rate in trainer.curve("learning_rate")]
    assert max(rates) == 1e-2
    assert rates.index(1e-2) in (1, 2)  # the warm-up is two updates
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] < 5e-4


@pytest.mark.parametrize("technique", ["optimizer_in_backward", "accumulation=2", "chunked_loss", "checkpointing"])
def test_an_exact_technique_has_the_curves_of_a_scheduled_training(technique, tmp_path):
    choices = {"schedule": "cosine", "validations": 2, "learning_rate": 1e-2}
    plain, other = (
        training(8, techniques=chosen, **choices).execute(tmp_path)["curves"] for chosen in ((), (technique,))
    )
    assert [step for step, _ in plain["validation_loss"]] == [4, 8]
    for name, curve in plain.items():
        assert other[name] == [[step, pytest.approx(loss, abs=2e-4)] for step, loss in curve]


def test_the_time_of_updates_before_a_kill_is_counted(tmp_path):
    training(SHORT).execute(tmp_path)
    path = tmp_path / f"checkpoint-{SHORT}" / "trainer_state.json"
    state = json.loads(path.read_text())
    assert 0 < state["log_history"][0]["trained_s"] < state["log_history"][-1]["trained_s"] < 100
    state["log_history"][-1]["trained_s"] = 1000.0
    path.write_text(json.dumps(state))
    assert 1000 < training(LONG).execute(tmp_path)["metrics"]["train_time_s"] < 1100


@pytest.mark.parametrize(
    "left", [["model.safetensors"], ["model.safetensors", "optimizer.pt", "trainer_state.json"]], ids=len
)
def test_a_checkpoint_cut_short_is_passed_over(left, tmp_path):
    """A kill during saving leaves some of the files, the last one half written."""
    before = training(SHORT).execute(tmp_path)
    whole, cut = tmp_path / f"checkpoint-{SHORT}", tmp_path / f"checkpoint-{SHORT + 10}"
    alter(whole)
    cut.mkdir()
    for name in left:
        content = (whole / name).read_bytes()
        (cut / name).write_bytes(content[: len(content) // 2] if name == left[-1] else content)
    resumed = training(LONG).execute(tmp_path)["curves"]["train_loss"]
    assert resumed[0][1] == 99.0
    assert resumed[1 : SHORT // 2] == before["curves"]["train_loss"][1:]
    assert resumed[-1][0] == LONG


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path):
    run = training(4 * SAVE_STEPS)
    whole = run.execute(tmp_path / "whole")
    config, results = tmp_path / "run.json", tmp_path / "results"
    config.write_text(run.model_dump_json())
    checkpoints = records.ROOT / "build" / "checkpoints" / records.run_id(run.model_dump(mode="json"))
    command = [sys.executable, "-m", "memstudy.cli", "run", str(config), "--results", str(results)]
    options = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "cwd": records.ROOT, "stdout": subprocess.PIPE}

    with subprocess.Popen(command, **options) as process:
        deadline = time.monotonic() + 120
        while not last_whole_checkpoint(checkpoints) and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
    assert list(results.glob("*.json")) == []
    saved = last_whole_checkpoint(checkpoints)
    loss = alter(Path(saved))

    assert subprocess.run(command, **options).returncode == 0
    (record,) = records.read_records(results)
    assert record["status"] == "ok"
    assert record["curves"]["train_loss"][0][1] == 99.0
    record["curves"]["train_loss"][0][1] = round(loss, 4)
    assert record["curves"] == whole["curves"]
    assert without_times(record)[0] == without_times(whole)[0]
    assert not checkpoints.exists()
