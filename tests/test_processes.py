"""A run in several processes that share each batch: the same losses as in one, and one record, the first process's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError
from tiny_run import tiny_config, tiny_run

from memstudy import data, runs
from memstudy.trainers import PredictionRun, parse_run

ROOT = Path(__file__).parents[1]


def memstudy_run(config: dict, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    file = folder / "run.json"
    file.write_text(json.dumps(config))
    return subprocess.run(
        [sys.executable, "-m", "memstudy.cli", "run", str(file), "--results", str(folder / "results")],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("techniques", [[], ["accumulation=2"]], ids=["whole", "in parts"])
def test_two_processes_learn_what_one_does(techniques, tmp_path):
    trained = {
        "dataset": "miniature", "data_hash": data.load("miniature").content_hash, "train_steps": 6, "eval_blocks": 8,
        "batch_size": 4, "techniques": techniques, "measure_steps": 1,
    }  # fmt: skip
    for processes in (1, 2):
        done = memstudy_run(tiny_config(processes=processes, **trained), tmp_path)
        assert done.returncode == 0, done.stderr
    records = {r["config"].get("processes", 1): r for r in runs.read_records(tmp_path / "results")}
    assert records.keys() == {1, 2}
    one, two = (records[n] for n in (1, 2))
    assert one["status"] == two["status"] == "ok"
    assert "processes" not in one["config"]
    assert [loss for _, loss in two["curves"]["train_loss"]] == pytest.approx(
        [loss for _, loss in one["curves"]["train_loss"]], abs=2e-4
    )
    for name in ("train_loss", "validation_loss", "test_loss"):
        assert two["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-5)
    # Each has half of the batch's activations, all parameters, and the buckets in which gradients are exchanged.
    sizes = {name: (one["metrics"][f"most_{name}_mib"], two["metrics"][f"most_{name}_mib"]) for name in
             ("parameters", "activations", "other")}  # fmt: skip
    assert sizes["parameters"][0] == sizes["parameters"][1]
    assert sizes["activations"][1] < 0.6 * sizes["activations"][0]
    assert sizes["other"][1] - sizes["other"][0] == pytest.approx(sizes["parameters"][0], rel=0.05)


@pytest.mark.parametrize("study", ["lab4_grid", "reformer_seqlen"])
def test_runs_in_one_process_are_named_as_ever(study):
    kinds = ("language_model", "reformer")
    records = [json.loads(path.read_text("utf-8")) for path in (ROOT / "results" / study).glob("*.json")]
    configs = [record["config"] for record in records if record["config"]["kind"] in kinds]
    assert configs
    for config in configs:
        assert parse_run(config).model_dump(mode="json") == config


def test_a_batch_that_cannot_be_shared_evenly_is_refused():
    with pytest.raises(ValidationError, match="processes=2 do not share batch_size=2 in 2 parts evenly"):
        tiny_run(batch_size=2, techniques=("accumulation=2",), processes=2)


def test_what_several_processes_take_is_not_predicted():
    with pytest.raises(ValidationError, match="processes=2: what each of several processes takes is not predicted"):
        PredictionRun(experiment="tiny", of=tiny_run(batch_size=2, processes=2))


def test_another_number_of_processes_than_the_runs_is_refused(tmp_path):
    done = memstudy_run(tiny_config(batch_size=6, processes=2), tmp_path, RANK="0", WORLD_SIZE="3")
    assert done.returncode == 2
    assert "processes=2, but 3 were started" in done.stderr
    assert not (tmp_path / "results").exists() or not any((tmp_path / "results").glob("*.json"))
