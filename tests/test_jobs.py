"""Runs as a cluster's jobs: missing runs, requests to the scheduler, and Snakemake, here and on a real Slurm."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.benchmark import load
from support.tiers import slow_but
from support.tiny_run import tiny_run
from typer.testing import CliRunner

from memstudy import project
from memstudy.cli import jobs
from memstudy.cli.main import app
from memstudy.kinds import PredictionRun, parse_run
from memstudy.profiler import MIB, find_gpu, predict
from memstudy.records import run_id
from memstudy.studies.attention_layer.run import LayerRun
from memstudy.studies.glue.run import FineTuneRun
from memstudy.trainers.base import MARGIN, PROCESS_MIB, SLACK, START_MINUTES
from memstudy.trainers.language_model import LanguageModelRun

ROOT = Path(__file__).parents[1]
STUDY = "what_fits"  # fastest to plan


def snakemake(folder: Path | str, *options: str | Path) -> subprocess.CompletedProcess:
    """Run the Snakefile on the smoke grid, with all output below ``folder``."""
    pytest.importorskip("snakemake", reason="snakemake is not installed: pip install -e '.[cluster]'")
    config = [f"studies={STUDY}", "scale=smoke", f"work={folder}"]
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "records", *options]
    return subprocess.run(
        [*command, "--config", *config],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def records_in(folder: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text("utf-8")) for path in (folder / "results" / STUDY).glob("*.json")}


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The smoke grid's plan when there is no record yet."""
    into = tmp_path_factory.mktemp("plan")
    done = CliRunner().invoke(app, ["plan", STUDY, str(into), "--scale", "smoke", "--results", str(into / "results")])
    assert done.exit_code == 0, done.output
    return into


@pytest.mark.slow
def test_a_plan_has_every_missing_run_and_what_it_needs(planned):
    needs = json.loads((planned / "needs.json").read_text())
    configs = {path.stem: json.loads(path.read_text()) for path in planned.glob("????????????????.json")}
    assert configs
    assert configs.keys() == needs.keys()
    for name, config in configs.items():
        assert run_id(parse_run(config).model_dump(mode="json")) == name
        assert needs[name]["mem_mb"] > 1000


def test_a_plan_of_an_unknown_study_says_so_in_one_line(tmp_path):
    done = CliRunner().invoke(app, ["plan", "lab5", str(tmp_path / "plan")])
    assert done.exit_code == 2
    assert "unknown study 'lab5'" in done.output
    assert not (tmp_path / "plan").exists()


def test_a_job_asks_for_what_is_predicted():
    run = tiny_run()
    peak = predict(run.build()).peak_allocated_mib
    asked = run.needs()
    assert asked == {"mem_mb": pytest.approx((PROCESS_MIB + SLACK * peak) * MIB / 1e6, abs=1)}
    on_gpu = run.needs(gpu="T4")
    whole = predict(run.build(gpu="T4"), gpu="T4").whole_gpu_mib
    assert (on_gpu["gpu"], on_gpu["gpu_mem_mb"]) == (1, pytest.approx(whole * MIB / 1e6, abs=1))
    assert "gpu" not in PredictionRun(experiment="tiny", of=run, gpu="T4").needs(gpu="T4")
    layer = LayerRun(experiment="layer", attention={"variant": "softmax"}, seq_len=4096, is_causal=True)
    assert layer.needs()["mem_mb"] > layer.model_copy(update={"seq_len": 16}).needs()["mem_mb"]


TRAINED = {"dataset": "miniature", "data_hash": "0" * 64}


@pytest.mark.parametrize(
    ("run", "steps"),
    [
        (tiny_run(measure_steps=20), 22),
        (tiny_run(measure_steps=0, train_steps=10**6, **TRAINED), 10**6),
        (tiny_run(measure_steps=3, processes=2), 6),
    ],
    ids=["measured", "trained", "two processes"],
)
def test_a_job_asks_for_the_time_of_its_steps(run, steps):
    time, asked = run.foretell("RTX4090").time, run.needs(gpu="RTX4090")
    assert asked["gpu_s"] == pytest.approx(
        [steps * ms / 1e3 for ms in (time.low_ms, time.step_time_ms, time.high_ms)], abs=1e-3
    )
    assert asked["runtime"] == START_MINUTES + math.ceil(MARGIN * asked["gpu_s"][-1] / 60)
    assert asked["untimed"] == ["communication between processes"] * (run.processes > 1)


def test_a_fine_tuning_takes_its_epochs():
    run = FineTuneRun(
        experiment="tuned", model="bert-base-uncased", seq_len=128, batch_size=16, epochs=3, train_rows=100,
        dataset="glue/rte", data_hash="0" * 64,
    )  # fmt: skip
    assert run.n_steps() == 3 * 7


def test_a_layer_on_a_gpu_asks_for_one():
    layer = LayerRun(experiment="layer", attention={"variant": "softmax"}, seq_len=64, is_causal=True)
    asked = layer.needs(gpu="RTX4090")
    assert (asked["gpu"], asked["fits"]) == (1, True)
    assert asked["gpu_s"][1] > 0


def test_what_does_not_fit_takes_no_time():
    asked = tiny_run(batch_size=2**16, seq_len=512, measure_steps=100).needs(gpu="RTX4090")
    assert (asked["fits"], asked["gpu_s"], asked["runtime"]) == (False, [0, 0, 0], START_MINUTES)


def test_without_the_gpus_speed_no_time_is_asked_for(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text('compute_capability: "8.0"\nmemory_mib: 1024\ncontext_mib: 100\n')
    assert tiny_run().needs(gpu=str(path)).keys() == {"mem_mb", "gpu", "gpu_mem_mb", "fits"}


def test_what_cannot_be_predicted_asks_for_a_whole_card_and_is_counted(monkeypatch):
    def has_no_fake_kernel(self, gpu):
        raise NotImplementedError

    monkeypatch.setattr(LanguageModelRun, "foretell", has_no_fake_kernel)
    odd = tiny_run(seq_len=11)  # no other test's step, which would be remembered
    needs = jobs.needs({"odd": odd.model_dump(mode="json")}, "T4", of="tiny")
    assert needs["odd"]["gpu_mem_mb"] == pytest.approx(find_gpu("T4").memory_mib * MIB / 1e6, abs=1)
    total = jobs.Total.of("memory_ablation", needs)
    assert (total.on_gpu, total.unpredicted, total.hours) == (1, 1, (0, 0, 0))
    assert total.lines("T4")[1] == "1 have no predicted time, and are not in the hours"


def test_a_plan_adds_up_what_its_jobs_take():
    runs = [
        tiny_run(measure_steps=0, train_steps=10**6, **TRAINED), tiny_run(processes=2),
        tiny_run(batch_size=2**16, seq_len=512), PredictionRun(experiment="foretold", of=tiny_run(), gpu="RTX4090"),
    ]  # fmt: skip
    needs = jobs.needs({str(n): run.model_dump(mode="json") for n, run in enumerate(runs)}, "RTX4090", of="tiny")
    total = jobs.Total.of("lab4_grid", needs)
    assert (total.runs, total.on_gpu, total.refused, total.unpredicted) == (4, 3, 1, 0)
    hours = [(needs["0"]["gpu_s"][n] + 2 * needs["1"]["gpu_s"][n]) / 3600 for n in range(3)]
    assert total.hours == pytest.approx(hours)
    assert total.requested_hours * 60 == needs["0"]["runtime"] + 2 * needs["1"]["runtime"] + START_MINUTES
    said = total.lines("RTX4090")
    assert said[0].startswith(
        f"on RTX4090, 3 of them: {hours[1]:,.1f} GPU hours ({hours[0]:,.1f} to {hours[2]:,.1f}) of steps"
    )
    assert said[1:3] == ["1 do not fit it and end at once", "not in the hours: communication between processes"]
    assert said[-1].startswith("4 records, about 0.")


@pytest.mark.slow
def test_a_plan_without_a_folder_says_what_the_study_would_take(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--scale", "smoke", "--results", str(tmp_path), "--gpu", "H100-80GB"]
    done = CliRunner().invoke(app, ["plan", "memory_ablation", *options])
    assert done.exit_code == 0, done.output
    first, *rest = done.stdout.splitlines()
    assert re.fullmatch(r"memory_ablation: \d+ runs are missing", first)
    assert re.match(r"on H100-80GB, \d+ of them: [\d.]+ GPU hours \([\d.]+ to [\d.]+\) of steps, predicted; ", rest[0])
    assert re.match(r"\d+ records, about [\d.]+ MB", rest[-1])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_table_of_gpu_hours_has_the_columns_of_its_command_and_names_every_study():
    """Its numbers take hours of prediction."""
    command = load("gpu_hours")
    page = (ROOT / "docs" / "cluster.rst").read_text("utf-8").splitlines()
    start = page.index(command.line(command.COLUMNS))
    rows = page[start + 2 :]
    assert page[start - 1] == page[start + 1] == command.line(tuple("=" * width for width in command.WIDTHS))
    end = rows.index(page[start - 1])
    assert [row.split()[0] for row in rows[:end]] == sorted(project.studies())


@pytest.fixture(scope="module")
def by_report(tmp_path_factory):
    """The records that `memstudy report` makes."""
    folder = tmp_path_factory.mktemp("report")
    done = CliRunner().invoke(app, ["report", STUDY, "--scale", "smoke", "--results", str(folder / "results")])
    records = records_in(folder)
    assert records, done.output
    return records


def assert_same(records: dict[str, dict], by_report: dict[str, dict]) -> None:
    assert records.keys() == by_report.keys()
    for name, record in by_report.items():
        assert record["metrics"] == records[name]["metrics"]
        assert record["status"] == records[name]["status"] == "ok"


@pytest.mark.by_hand  # CI runs the same test on Slurm
def test_snakemake_gives_record_for_record_what_report_gives(by_report, tmp_path):
    done = snakemake(tmp_path, "-j2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(records_in(tmp_path), by_report)
    again = snakemake(tmp_path, "-j2")
    assert "Nothing to be done" in again.stderr + again.stdout


@pytest.mark.by_hand  # pip install snakemake-storage-plugin-fs, which needs rsync
def test_where_jobs_share_no_file_system_a_store_hands_the_files_on(by_report, tmp_path):
    """As on Kubernetes, with a folder instead of a bucket."""
    pytest.importorskip("snakemake_storage_plugin_fs")
    work = f"build/{tmp_path.name}"
    store = ["--default-storage-provider", "fs", "--default-storage-prefix", tmp_path, "--shared-fs-usage", "none"]
    done = snakemake(work, "-j2", *store)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(records_in(tmp_path / work), by_report)
    assert not (ROOT / work).exists()


@pytest.mark.parametrize("profile", slow_but(["local"], ["local", "slurm", "kubernetes"]))
def test_a_profile_is_one_that_snakemake_takes(profile, tmp_path, monkeypatch):
    settings = yaml.safe_load((ROOT / "profiles" / profile / "config.yaml").read_text())
    plugin = settings.get("executor", "local")
    if plugin != "local":
        pytest.importorskip(
            f"snakemake_executor_plugin_{plugin}", reason=f"pip install snakemake-executor-plugin-{plugin}"
        )
    store = settings.get("default-storage-provider")
    if store:
        pytest.importorskip(f"snakemake_storage_plugin_{store}", reason=f"pip install snakemake-storage-plugin-{store}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    done = snakemake(tmp_path, "--dry-run", "--profile", ROOT / "profiles" / profile)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "checkpoint plan" in done.stdout + done.stderr


@pytest.fixture
def slurm(tmp_path):
    """A one-node Slurm, started for this test."""
    lacks = [name for name in ("slurmctld", "slurmd", "munged") if shutil.which(name) is None]
    if lacks or os.geteuid() != 0:
        pytest.skip(
            f"Slurm needs root and Debian's packages slurmctld slurmd slurm-client munge; missing: {lacks or 'root'}"
        )
    place = tmp_path / "slurm"
    started = subprocess.run([ROOT / "tests/slurm/start.sh", place], capture_output=True, text=True)
    try:
        assert started.returncode == 0, started.stderr
        yield place
    finally:
        subprocess.run([ROOT / "tests/slurm/stop.sh", place], check=True)


@pytest.mark.slow
def test_slurm_gives_record_for_record_what_report_gives(slurm, planned, by_report, tmp_path):
    """Also for a run that Slurm first kills for memory and then retries with more."""
    first_round = shutil.copytree(planned, tmp_path / "plans" / STUDY / "0")
    needs = json.loads((first_round / "needs.json").read_text())
    too_little = needs[next(iter(needs))]
    too_little["mem_mb"] = 500  # Python with PyTorch imported takes this much
    (first_round / "needs.json").write_text(json.dumps(needs))
    done = snakemake(
        tmp_path, "--executor", "slurm", "--jobs", "4", "--slurm-no-account", "--slurm-status-command", "squeue",
        "--slurm-init-seconds-before-status-checks", "1", "--default-resources", "slurm_partition=local", "mem_mb=3000",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    records = records_in(tmp_path)
    assert_same(records, by_report)
    said = done.stderr + done.stdout
    assert len(re.findall(r"has been submitted with SLURM jobid", said)) > len(records)
    assert "Trying to restart job" in said
    logs = "".join(path.read_text(errors="replace") for path in (slurm / "log").iterdir())
    assert re.search("exceeded memory limit|OverMemoryKill|Memory limit", logs, re.IGNORECASE), logs[-2000:]
