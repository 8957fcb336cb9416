"""A run in several processes that share each batch: the losses of one process, and the predicted memory in each."""

import itertools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from support.results import committed
from support.study_models import classifier, masked
from support.techniques import HERE
from support.tiers import cover, slow_but
from support.tiny_models import config_file
from support.tiny_run import tiny_config, tiny_run
from torch.distributed.fsdp import FullyShardedDataParallel

from memstudy import data, records
from memstudy.kinds import parse_run
from memstudy.profiler import MIB, fit, measure, predict
from memstudy.profiler.ranks import first_of
from memstudy.techniques import TECHNIQUES
from memstudy.trainers.hub_model import HubModelRun

ROOT = Path(__file__).parents[1]
MESH_BYTES = 64  # FSDP's device mesh, the ranks of the processes, which a prediction does not count

pytestmark = pytest.mark.usefixtures("one_thread", "young_garbage_only")


# --- by torchrun, with gloo


def memstudy_run(config: dict, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    file = folder / "run.json"
    file.write_text(json.dumps(config))
    return subprocess.run(
        [sys.executable, "-m", "memstudy.cli", "run", str(file), "--results", str(folder / "results")],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip


def trained(folder: Path, **changes) -> dict:
    """The record of a training of six updates."""
    learn = {"dataset": "miniature", "data_hash": data.load("miniature").content_hash, "train_steps": 6}
    config = tiny_config(batch_size=4, eval_blocks=8, **learn, **changes)
    done = memstudy_run(config, folder)
    assert done.returncode == 0, done.stderr
    (record,) = (r for r in records.read_records(folder / "results") if r["config"] == config)
    assert record["status"] == "ok"
    return record


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The training in one process."""
    record = trained(tmp_path_factory.mktemp("alone"))
    assert "processes" not in record["config"]
    return record


@pytest.mark.slow
@pytest.mark.parametrize(
    "techniques",
    [
        (),
        pytest.param(("accumulation=2",), marks=pytest.mark.by_hand),
        pytest.param(("fsdp",), marks=pytest.mark.by_hand),
        ("fsdp", "accumulation=2", "checkpointing"),
    ],
    ids=lambda texts: "+".join(texts) or "none",
)
def test_two_processes_learn_what_one_does(techniques, alone, tmp_path):
    record = trained(tmp_path, techniques=techniques, processes=2, measure_steps=1)
    losses = [[loss for _, loss in each["curves"]["train_loss"]] for each in (record, alone)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)
    for name in ("train_loss", "validation_loss", "test_loss"):
        assert record["metrics"][name] == pytest.approx(alone["metrics"][name], rel=1e-5)
    predicted = parse_run(record["config"]).foretell(None)
    assert record["metrics"]["most_parameters_mib"] == predicted.most_by_category["parameters"] / MIB
    # Gloo's threads free sent tensors a random moment late, unseen by the profiler.
    assert 0.999 < record["metrics"]["peak_allocated_mib"] / predicted.peak_allocated_mib < 1.5


@pytest.mark.slow
def test_another_number_of_processes_than_the_runs_is_refused(tmp_path):
    done = memstudy_run(tiny_config(batch_size=6, processes=2), tmp_path, RANK="0", WORLD_SIZE="3")
    assert done.returncode == 2
    assert "processes=2, but 3 were started" in done.stderr
    assert not (tmp_path / "results").exists() or not any((tmp_path / "results").glob("*.json"))


# --- memory of each process


def first(run, processes=2):
    """Measure the first process's step, without the other processes."""
    with first_of(processes):
        return measure(run.build(), iterations=3)


SIZES = {"batch_size": 12, "seq_len": 24, "vocab_size": 301}


SOME = ["accumulation", "checkpointing", "adamw_8bit", "bf16_weights"]  # in the default tests; the others are slow


@pytest.mark.parametrize("name", slow_but(SOME, [name for name in HERE if name != "optimizer_in_backward"]))
def test_with_ddp_a_process_takes_what_is_predicted(name):
    text = {"accumulation": "accumulation=2"}.get(name, name)
    run = tiny_run(techniques=(text,), processes=3, **SIZES)
    measured, predicted = first(run, 3), run.foretell(None)
    if TECHNIQUES[name].packages and name != "lora":  # the scratch of their kernels is not predicted
        assert predicted.peak_bytes <= measured.peak_bytes
        return
    assert predicted.iteration_peaks == measured.iteration_peaks
    assert predicted.peak_by_category == measured.peak_by_category


def takes_shards(name: str) -> bool:
    technique = TECHNIQUES[name]
    # Muon does its own communication.
    return name != "muon" and (technique.takes_shards or technique.group != "optimizer")


@pytest.mark.parametrize("name", slow_but([None, *SOME], [None, *filter(takes_shards, HERE)]))
def test_with_fsdp_a_process_takes_what_is_predicted(name):
    text = {None: (), "accumulation": ("accumulation=2",)}.get(name, (name,))
    run = tiny_run(techniques=(*text, "fsdp"), processes=3, **SIZES)  # 3 divides no matrix evenly
    predicted, measured = run.foretell(None), first(run, 3)
    bytes_off = 512 if name == "bf16_weights" else MESH_BYTES
    assert 0 <= measured.peak_bytes - predicted.peak_bytes <= bytes_off
    assert predicted.most_by_category["parameters"] == measured.most_by_category["parameters"]


FAMILIES = ["gpt2", "llama", "bert", "roberta", "t5", classifier, masked]
OF_FAMILIES = list(itertools.product(FAMILIES, [(), ("fsdp",), ("fsdp", "checkpointing")]))


@pytest.mark.parametrize(("family", "techniques"), slow_but(cover(OF_FAMILIES), OF_FAMILIES))
def test_a_process_of_another_models_takes_what_is_predicted(family, techniques, tmp_path):
    choices = {"techniques": techniques, "processes": 2}
    if callable(family):
        run = family(tmp_path, **choices)
    else:
        model = config_file(tmp_path, family)
        run = HubModelRun(experiment="tiny", model=model, seq_len=32, batch_size=4, **choices)
    assert 0 <= first(run).peak_bytes - run.foretell(None).peak_bytes <= MESH_BYTES


def test_the_processes_divide_all_state_and_ddp_none():
    sizes = {"hidden_size": 128, "feed_forward": 512, "n_layers": 4, "batch_size": 8}
    of = {
        (processes, sharded): tiny_run(processes=processes, techniques=sharded, **sizes).foretell(None)
        for processes, sharded in [(1, ()), (4, ()), (2, ("fsdp",)), (4, ("fsdp",)), (8, ("fsdp",))]
    }
    plain = of[1, ()].most_by_category
    for name in ("parameters", "gradients", "optimizer"):
        assert of[4, ()].most_by_category[name] == plain[name]
        for processes in (2, 4, 8):
            share = of[processes, ("fsdp",)].most_by_category[name] * processes
            assert plain[name] <= share < 1.01 * plain[name]
    # DDP keeps buckets that are as large as the gradients.
    assert of[4, ()].most_by_category["other"] - of[1, ()].most_by_category["other"] == pytest.approx(
        plain["gradients"], rel=0.01
    )


def test_a_loop_of_ones_own_is_predicted_for_each_of_its_processes():
    def made(wrap):
        def make():
            assert (dist.get_rank(), dist.get_world_size(), os.environ["WORLD_SIZE"]) == (0, 4, "4")
            model = wrap(torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4))))
            updates, rows = torch.optim.AdamW(model.parameters()), torch.randn(8, 64)

            def step():
                model(rows).square().mean().backward()
                updates.step()
                updates.zero_grad()

            return step

        return make

    def sharded(model):
        for layer in model:
            torch.distributed.fsdp.fully_shard(layer)
        torch.distributed.fsdp.fully_shard(model)
        return model

    for wrap in (torch.nn.parallel.DistributedDataParallel, sharded):
        with first_of(4):
            measured = measure(made(wrap), iterations=3)
        predicted = predict(made(wrap), iterations=3, processes=4)
        assert 0 <= measured.peak_bytes - predicted.peak_bytes <= MESH_BYTES


def test_frozen_weights_are_sharded_again_after_a_step_with_fsdp1():
    """No gradient tells FSDP1 to: it looks whether they are still gathered."""

    def make():
        frozen, trained = torch.nn.Linear(256, 256).requires_grad_(False), torch.nn.Linear(256, 8)
        model = FullyShardedDataParallel(
            torch.nn.Sequential(frozen, FullyShardedDataParallel(trained, device_id=torch.device("cpu"))),
            device_id=torch.device("cpu"),
        )
        rows = torch.randn(4, 256)
        return lambda: model(rows).square().mean().backward()

    with first_of(2):
        measured = measure(make)
    predicted = predict(make, processes=2)
    at_rest = [sum(report.timeline[-1][2].values()) for report in (measured, predicted)]
    assert at_rest[0] == at_rest[1] < 4 * 256 * 256 < predicted.peak_bytes


def test_a_gpu_is_predicted_with_fsdps_streams_and_what_is_not_counted_is_said():
    report = tiny_run(processes=4, batch_size=4, techniques=("fsdp",)).foretell("A100-80GB")
    alone = tiny_run(batch_size=1).foretell("A100-80GB")
    assert "NCCL's buffers (not counted)" in report.unverified
    assert not [name for name in alone.unverified if "NCCL" in name]
    # FSDP gathers and reduces on two more streams, each with its own segments: 2 MiB each here.
    assert report.peak_bytes < alone.peak_bytes
    assert report.peak_reserved_bytes > alone.peak_reserved_bytes


def test_nothing_is_left_behind():
    state = dict(os.environ), torch.get_num_threads(), sys.excepthook, threading.active_count()
    for techniques in ((), ("fsdp",)):
        tiny_run(processes=2, techniques=techniques).foretell(None)
    assert (dict(os.environ), torch.get_num_threads(), sys.excepthook, threading.active_count()) == state
    assert not dist.is_initialized()
    once = tiny_run().foretell(None)
    assert once.peak_bytes == measure(tiny_run().build()).peak_bytes


def test_a_process_that_is_one_of_several_predicts_for_no_other_number():
    with first_of(2), pytest.raises(ValueError, match="processes=3: this process is one of 2 already"):
        predict(tiny_run().build(), processes=3)


# --- the largest batch, and a cluster's job


def test_the_largest_batch_is_one_that_the_processes_share():
    def made(batch):
        return tiny_run(batch_size=batch, processes=4, techniques=("fsdp",)).build(parts=2)

    found = fit(made, budget_mib=1.0, processes=4)
    assert found.batch_size % 4 == found.refused_at % 4 == 0
    assert found.batch_size > 4
    for batch, fits in ((found.batch_size, True), (found.refused_at, False)):
        run = tiny_run(batch_size=batch, processes=4, techniques=("fsdp",))
        assert (run.foretell(None).peak_allocated_mib <= 1.0) is fits
    with pytest.raises(ValueError, match="effective_batch=6: processes=4 do not share it evenly"):
        fit(made, budget_mib=1.0, effective_batch=6, processes=4)


def test_a_job_asks_for_every_process():
    run = tiny_run(processes=2)
    asked = run.needs(gpu="T4")
    assert asked["gpu"] == 2
    assert asked["gpu_mem_mb"] == pytest.approx(run.foretell("T4").whole_gpu_mib * MIB / 1e6, abs=1)
    assert run.needs()["mem_mb"] > 1.9 * tiny_run().needs()["mem_mb"]


# --- what is refused


@pytest.mark.parametrize(
    "study", slow_but(["memsizer"], ["lab4_grid", "reformer_seqlen", "memory_ablation", "memsizer"])
)
def test_runs_in_one_process_are_named_as_ever(study):
    assert committed(study)
    for record in committed(study).values():
        config = parse_run(record["config"]).model_dump(mode="json")
        assert config == record["config"]
        assert records.run_id(config) == record["run_id"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"techniques": ("accumulation=2",)}, "processes=2 do not share batch_size=2 in 2 parts evenly"),
        ({"techniques": ("fsdp",), "processes": 1}, "technique 'fsdp' is for several processes, and processes=1"),
        ({"techniques": ("optimizer_in_backward",)}, "before processes have exchanged gradients: add fsdp"),
        ({"processes": 0}, "greater than 0"),
    ],
    ids=lambda value: "",
)
def test_what_several_processes_cannot_do_is_refused(changes, said):
    with pytest.raises(ValidationError, match=said):
        tiny_run(**{"batch_size": 2, "processes": 2} | changes)


def test_an_optimizer_that_needs_whole_parameters_is_refused(tmp_path):
    choices = {"experiment": "tiny", "model": config_file(tmp_path, "gpt2"), "seq_len": 16, "batch_size": 2}
    with pytest.raises(ValidationError, match="optimizer 'adafactor' needs whole parameters and so excludes fsdp"):
        HubModelRun(optimizer="adafactor", techniques=("fsdp",), processes=2, **choices)


@pytest.mark.parametrize("kind", ["reformer", "seq2seq", "inference", "fine_tune"])
def test_runs_that_go_in_one_process_alone_say_so(kind):
    with pytest.raises(ValidationError) as refusal:
        parse_run({"kind": kind, "experiment": "tiny", "seq_len": 16, "batch_size": 2, "processes": 2})
    assert any(error["loc"] == ("processes",) for error in refusal.value.errors())


@pytest.mark.parametrize("techniques", [(), ("fsdp",)], ids="+".join)
def test_a_step_of_two_processes_is_not_taken_in_one(techniques):
    with pytest.raises(ValueError, match="processes=2, but 1 were started: memstudy run starts as many"):
        tiny_run(batch_size=2, processes=2, techniques=techniques).build()()


def test_a_model_without_blocks_is_refused():
    from transformers import AutoConfig, AutoModel

    model = AutoModel.from_config(AutoConfig.for_model("resnet"))
    with first_of(2), pytest.raises(ValueError, match="fsdp: ResNetModel has no blocks that can be sharded one by one"):
        TECHNIQUES["fsdp"]().prepare(model)
