"""Real faults: after each, the same command finishes, and every finished record is unchanged."""

import functools
import http.server
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
from support.hub_server import HubHandler
from support.tiny_run import SWEEP, tiny_config

from memstudy import data, launcher, records

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def sweeping(folder: Path, configs: list[dict], **options) -> subprocess.Popen:
    command = [sys.executable, "-c", SWEEP, str(folder), json.dumps(configs)]
    # A shell ignores ctrl-C in its background jobs, and child processes would inherit that.
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, preexec_fn=heard, **options)


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("lab4_grid/*.json")}


def trainings(count: int) -> list[dict]:
    """Runs long enough to write checkpoints."""
    learn = {"dataset": "miniature", "data_hash": data.load("miniature").content_hash, "eval_blocks": 2}
    return [tiny_config(seed=n, train_steps=120, measure_steps=0, **learn) for n in range(count)]


def test_twenty_kills_at_random_moments_cost_no_finished_record_and_change_no_number(tmp_path):
    configs = trainings(8)
    undisturbed = launcher.spawn(configs[-1], tmp_path / "undisturbed" / "elsewhere")
    moments, finished = random.Random(0), {}
    for _ in range(20):
        process = sweeping(tmp_path, configs)
        time.sleep(moments.uniform(2, 9))
        os.killpg(process.pid, signal.SIGKILL)  # the sweep and its forking process
        process.communicate()
        now = {name: text for name, text in files_in(tmp_path).items() if json.loads(text)["status"] == "ok"}
        assert now.items() >= finished.items(), "a finished record was changed or lost"
        finished = now
    process = sweeping(tmp_path, configs)
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    assert json.loads(said) == ["ok"] * 8
    assert files_in(tmp_path).items() >= finished.items()
    assert list(tmp_path.glob("lab4_grid/*.corrupt")) == []
    (last,) = (r for r in records.read_records(tmp_path / "lab4_grid") if r["config"] == configs[-1])
    assert last["curves"]["train_loss"] == undisturbed["curves"]["train_loss"]
    assert last["metrics"]["test_loss"] == undisturbed["metrics"]["test_loss"]


def test_a_full_disk_costs_the_run_that_could_not_be_written_and_no_other(tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        configs = [tiny_config(seed=n) for n in range(20)]  # about 5 kB each, too much for the disk
        process = sweeping(place, configs)
        _, said = process.communicate()
        assert process.returncode != 0
        assert "No space left on device" in said
        # The last record may say "failed": it is shorter, and its run will be repeated.
        kept = {name: text for name, text in files_in(place).items() if json.loads(text)["status"] == "ok"}
        assert 0 < len(kept) < 20
        assert list(place.glob("lab4_grid/.*.tmp")) == []
        subprocess.run(["mount", "-o", "remount,size=1m", place], check=True)
        process = sweeping(place, configs)
        said, errors = process.communicate()
        assert json.loads(said) == ["ok"] * 20, errors
        assert files_in(place).items() >= kept.items()
    finally:
        subprocess.run(["umount", place], check=True)


def test_two_sweeps_of_the_same_runs_at_once_both_finish(tmp_path):
    configs = [tiny_config(seed=n) for n in range(4)]
    both = [sweeping(tmp_path, configs) for _ in range(2)]
    for process in both:
        said, errors = process.communicate()
        assert json.loads(said) == ["ok"] * 4, errors
    assert len(files_in(tmp_path)) == 4


def test_ctrl_c_ends_the_sweep_and_its_run_and_the_same_command_goes_on(tmp_path):
    configs = [tiny_config(), tiny_config(seed=1, measure_steps=100_000)]
    process = sweeping(tmp_path, configs)
    while not files_in(tmp_path):
        time.sleep(0.05)
        assert process.poll() is None, process.communicate()
    time.sleep(0.5)  # now the long run is under way
    whole = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in said
    _, alive = psutil.wait_procs(whole, timeout=10)
    assert alive == []
    before = files_in(tmp_path)
    again, _ = sweeping(tmp_path, configs[:1]).communicate()
    assert json.loads(again) == ["ok"]
    assert files_in(tmp_path) == before


class Cut(HubHandler):
    """A hub that disappears halfway through the first file."""

    cut = False

    def copyfile(self, source, outputfile):
        whole = source.read()
        if self.path.endswith(".parquet") and not Cut.cut:
            Cut.cut = True
            outputfile.write(whole[: len(whole) // 2])
            outputfile.flush()
            self.server.shutdown_request(self.request)
            threading.Thread(target=self.server.shutdown).start()
        else:
            outputfile.write(whole)


def test_a_download_that_is_cut_off_is_never_taken_for_the_set(tmp_path):
    repository, commit = data.sets.WIKITEXT
    served = tmp_path / "served"
    files = served / "datasets" / repository / "resolve" / commit / "wikitext-2-v1"
    files.mkdir(parents=True)
    names = [f"{split}-00000-of-00001.parquet" for split in ("train", "validation", "test")]
    for name in names:
        pd.DataFrame({"text": [f"A line of {name}, number {n}." for n in range(5000)]}).to_parquet(files / name)
    listing = served / "api" / "datasets" / repository / "tree" / commit
    listing.parent.mkdir(parents=True)
    entries = [
        {"type": "file", "path": f"wikitext-2-v1/{name}", "size": (files / name).stat().st_size, "oid": name}
        for name in names
    ]
    listing.write_text(json.dumps(entries))
    code = (
        "import memstudy.data as data\n"
        "loaded = data.load('wikitext-2-v1')\n"
        "print(loaded.source, len(loaded.splits['train']))"
    )

    def load_from_hub() -> str:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Cut, directory=str(served)))
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        environ = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_CACHE": str(tmp_path / "hub"),
            "HF_HUB_OFFLINE": "0",
            "MEMSTUDY_DATA": str(tmp_path / "none"), "MEMSTUDY_CACHE": str(tmp_path / "cache"),
        }  # fmt: skip
        (tmp_path / "none").mkdir(exist_ok=True)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, cwd=ROOT)
        server.shutdown()
        serving.join()
        server.server_close()
        return done.stdout.strip() or done.stderr.strip().splitlines()[-1]

    first = load_from_hub()
    assert Cut.cut
    assert not first.startswith("hub"), first
    assert load_from_hub() == "hub 5000"


def test_the_same_training_twice_gives_the_same_losses_to_the_last_digit(tmp_path):
    (config,) = trainings(1)
    first, second = (launcher.spawn(config, tmp_path / name) for name in ("first", "second"))
    assert first["status"] == second["status"] == "ok"
    assert first["curves"] == second["curves"]
    losses = [name for name in first["metrics"] if name.endswith(("loss", "perplexity"))]
    assert losses
    assert {name: first["metrics"][name] for name in losses} == {name: second["metrics"][name] for name in losses}
