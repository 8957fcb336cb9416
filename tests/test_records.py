"""Runs in fresh processes and their records, with real processes, real kills and real lack of memory."""

import fcntl
import hashlib
import importlib.metadata
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_run import tiny_config, tiny_run

from memstudy import data, launcher, machine, records
from memstudy.kinds import PredictionRun
from memstudy.launcher import forker

ROOT = Path(__file__).parents[1]
LONG = 10**9  # timed steps of a run that never ends by itself


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("records")


@pytest.fixture(scope="module")
def record(folder):
    """The record of a successful run, as returned by `spawn`, with its curves loaded."""
    record = launcher.spawn(tiny_config(), folder)
    return record | {"curves": dict(record["curves"])}


def imported_by_python(code: str, *, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run `code` in a new interpreter that finds the package in `cwd`."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=True
    )


def fork_server() -> psutil.Process:
    """The process that forks the runs; started if there is none. Earlier tests may have started a second one."""
    return psutil.Process(forker(0)._process.pid)


def wait_for_run() -> psutil.Process:
    """Wait for a run to start, and return its process."""
    server = fork_server()
    for _ in range(600):
        if running := server.children():
            return running[0]
        time.sleep(0.05)
    raise AssertionError("no run began within 30 s")


def test_run_id_is_the_hash_of_sorted_ascii_json_without_spaces():
    by_hand = b'{"a":"\\u0142","b":[1,2.5,null]}'
    assert records.run_id({"b": [1, 2.5, None], "a": "ł"}) == hashlib.sha256(by_hand).hexdigest()[:16]


@given(st.permutations(sorted(tiny_config().items())))
def test_run_id_does_not_depend_on_the_order_of_the_fields(fields):
    assert records.run_id(dict(fields)) == records.run_id(tiny_config())


def test_run_id_does_not_depend_on_the_interpreter_s_hash_seed():
    code = f"from memstudy.records import run_id; print(run_id({tiny_config()!r}))"
    ids = {imported_by_python(code, PYTHONHASHSEED=seed).stdout.strip() for seed in ("0", "1", "random")}
    assert ids == {records.run_id(tiny_config())}


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"techniques": ["bf16"]}, {"attention": {"variant": "window", "window": 8}}, {"budget_mib": 1}],
    ids=str,
)
def test_run_id_changes_with_every_choice(change):
    assert records.run_id(tiny_config(**change)) != records.run_id(tiny_config())


def test_a_record_tells_every_choice_what_came_out_and_where(folder, record):
    (path,) = folder.glob(f"{record['run_id']}*.json")
    assert json.loads(path.read_text("utf-8")) == record
    assert record.keys() == records.FIELDS
    assert record["config"] == tiny_config()
    assert (record["status"], record["reason"]) == ("ok", "")
    assert {"peak_allocated_mib", "step_time_ms", "tokens_per_s"} <= record["metrics"].keys()
    assert {"memory_timeline", "step_times_ms"} <= record["curves"].keys()

    where = record["provenance"]
    assert where.keys() == {*records.PROVENANCE, "bf16_speed"}
    assert where["bf16_speed"] > 0
    assert where["device"] == machine.device()
    assert f"{len(os.sched_getaffinity(0))} cores" in where["cpu"]
    assert where["threads"] == int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    assert where["platform"].startswith("Linux")
    assert where["packages"]["torch"] == importlib.metadata.version("torch")
    assert set(where["packages"]) == set(machine.PACKAGES)
    assert {"commit": where["commit"], "dirty": where["dirty"]} == records.git_state()
    started, ended = (datetime.fromisoformat(where[when]) for when in ("started", "ended"))
    assert started < ended < datetime.now(UTC)
    assert where["command"] == "memstudy run"


def test_the_record_of_a_training_names_its_data_by_hash(folder):
    corpus = data.load("miniature")
    training = {"measure_steps": 0, "train_steps": 2, "eval_blocks": 2, "dataset": "miniature"}
    record = launcher.spawn(tiny_config(**training, data_hash=corpus.content_hash), folder)
    assert record["status"] == "ok", record["reason"]
    assert record["data"] == {
        "name": "miniature",
        "source": "miniature",
        "revision": corpus.revision,
        "content_hash": corpus.content_hash,
    }
    assert record["metrics"]["test_perplexity"] > 1


@pytest.fixture
def checkout(tmp_path):
    """A folder with a copy of the modules that write records, for changes and commits."""
    package = tmp_path / "memstudy"
    package.mkdir()
    for name in ("__init__.py", "machine.py", "records.py"):
        shutil.copy(ROOT / "memstudy" / name, package)
    for name in ("notebooks", "params"):  # of the repository
        (tmp_path / name).mkdir()
    return tmp_path


def git_state_in(checkout: Path) -> dict:
    code = "from memstudy.records import git_state; import json; print(json.dumps(git_state()))"
    return json.loads(imported_by_python(code, cwd=checkout, PYTHONDONTWRITEBYTECODE="1").stdout)


def test_dirty_says_whether_what_runs_depend_on_was_changed(checkout):
    def git(*arguments):
        command = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org", *arguments]
        return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "all")
    commit = git("rev-parse", "HEAD")
    (checkout / "results").mkdir()
    (checkout / "results" / "one.json").write_text("{}")
    assert git_state_in(checkout) == {"commit": commit, "dirty": False}
    (checkout / "memstudy" / "records.py").open("a").write("# changed\n")
    assert git_state_in(checkout) == {"commit": commit, "dirty": True}


def test_outside_git_the_commit_is_unknown(checkout):
    assert git_state_in(checkout) == {"commit": "unknown", "dirty": True}


@pytest.mark.slow
def test_a_writer_that_is_killed_never_leaves_half_a_record(tmp_path, record):
    """Ten or more real kills, until one interrupts a write; the 300 kB record is read all the time."""
    large = record | {"curves": {"padding": [0.123456789] * 20_000}}
    given, written = tmp_path / "given", tmp_path / "written"
    given.write_text(json.dumps(large))
    written.mkdir()
    loop = (
        "import json, sys; from pathlib import Path; from memstudy.records import write_record\n"
        "record = json.loads(Path(sys.argv[1]).read_text()); print('ready', flush=True)\n"
        "while True: write_record(Path(sys.argv[2]), record)"
    )
    delays = random.Random(0)
    cut_short = 0
    for attempt in range(60):
        writer = subprocess.Popen([sys.executable, "-c", loop, given, written], cwd=ROOT, stdout=subprocess.PIPE)
        writer.stdout.readline()
        until = time.monotonic() + delays.uniform(0.02, 0.2)
        while time.monotonic() < until:
            assert records.read_records(written) in ([], [large])
        writer.kill()
        writer.communicate()
        assert records.read_records(written) in ([], [large])
        cut_short += any(path.suffix == ".tmp" for path in written.iterdir())
        if attempt >= 9 and cut_short:
            break
    assert cut_short, "no kill came in the middle of a write: the test has shown nothing"
    assert records.read_records(written) == [large]


def damaged(record: dict) -> dict[str, bytes]:
    """Contents of damaged record files, by kind of damage."""
    whole = json.dumps(record).encode()
    without = {name: value for name, value in record.items() if name != "metrics"}
    no_commit = {name: value for name, value in record["provenance"].items() if name != "commit"}
    edits = {
        "another seed": record | {"config": record["config"] | {"seed": 7}},
        "another id": record | {"run_id": "0" * 16},
        "older format": record | {"format": 0},
        "unknown status": record | {"status": "fine"},
        "no metrics": without,
        "metrics are null": record | {"metrics": None},
        "no commit": record | {"provenance": no_commit},
        "a list": [record],
    }
    return {
        "emptied": b"",
        "truncated": whole[: len(whole) // 2],
        "the last brace lost": whole[:-1],
        "zeros, as after a power cut": bytes(len(whole)),
        "not UTF-8": whole.replace(b"tiny", b"t\xffny"),
        **{name: json.dumps(edited).encode() for name, edited in edits.items()},
    }


def test_a_damaged_record_is_set_aside_with_a_warning_and_the_others_are_read(tmp_path, record):
    other = record | {"config": record["config"] | {"seed": 1}}
    other["run_id"] = records.run_id(other["config"])
    for name, content in damaged(record).items():
        place = tmp_path / name
        place.mkdir()
        records.write_record(place, other)
        path = place / f"{record['run_id']}.json"
        path.write_bytes(content)
        with pytest.warns(UserWarning, match=rf"{path.name} is not a whole record: kept as {path.name}.corrupt"):
            assert records.read_records(place) == [other], name
        assert path.with_suffix(".json.corrupt").read_bytes() == content
        assert not path.exists()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert records.read_records(place) == [other]


@given(share=st.floats(0, 1, exclude_max=True))
def test_a_record_cut_off_anywhere_is_not_a_whole_one(tmp_path_factory, record, share):
    place = tmp_path_factory.mktemp("cut")
    text = records.write_record(place, record).read_bytes().rstrip()
    (place / f"{record['run_id']}.json").write_bytes(text[: int(share * len(text))])
    with pytest.warns(UserWarning, match="is not a whole record"):
        assert records.read_records(place) == []


def test_of_many_records_those_asked_for_are_read_alone_and_curves_when_wanted(tmp_path, record):
    path = records.write_record(tmp_path, record | {"curves": {"losses": [3.0, 2.0], "labels": []}})
    (tmp_path / f"{'0' * 16}.json").write_text("{")  # another run's damaged record
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ((found, read),) = records.iterate_records(tmp_path, {record["run_id"]})
    assert (found, read["run_id"]) == (path, record["run_id"])
    curves = records.Curves(path)
    assert curves == {"losses": [3.0, 2.0], "labels": []}
    assert curves["losses"] == [3.0, 2.0]
    assert "steps" not in curves
    assert len(curves) == 2
    with pytest.raises(KeyError, match="steps"):
        curves["steps"]


def test_a_record_from_another_device_keeps_its_place(tmp_path, record):
    elsewhere = record | {"provenance": record["provenance"] | {"device": "NVIDIA A100-SXM4-80GB"}}
    first = records.write_record(tmp_path, elsewhere)
    second = records.write_record(tmp_path, record)
    assert first.name == f"{record['run_id']}.json"
    assert second.name.startswith(f"{record['run_id']}-")
    assert records.write_record(tmp_path, record) == second
    assert {r["provenance"]["device"] for r in records.read_records(tmp_path)} == {
        machine.device(),
        "NVIDIA A100-SXM4-80GB",
    }
    again = launcher.spawn(record["config"], tmp_path)
    assert again["provenance"]["started"] > record["provenance"]["started"]
    assert records.read_records(tmp_path) in ([elsewhere, again], [again, elsewhere])


def test_a_run_killed_from_outside_is_a_failed_record_with_the_signal(tmp_path):
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(launcher.spawn, tiny_config(measure_steps=LONG), tmp_path)
        wait_for_run().kill()
        record = future.result(timeout=30)
    assert record["status"] == "failed"
    assert record["reason"].startswith("killed by SIGKILL")
    assert record["metrics"] == {}
    assert records.read_records(tmp_path) == [record]
    assert launcher.spawn(tiny_config(), tmp_path)["status"] == "ok"  # the next run works


def test_runs_that_are_not_timed_go_two_at_a_time_and_each_has_its_record(tmp_path):
    runs = [PredictionRun(experiment=f"of {size}", of=tiny_run(batch_size=size)) for size in (1, 2, 3)]
    configs = {run.experiment: run.model_dump(mode="json") for run in runs}
    found = dict(launcher.spawn_together(configs, tmp_path))
    assert found.keys() == configs.keys()
    for name, record in found.items():
        assert (record["config"], record["status"]) == (configs[name], "ok")
        assert dict(record["metrics"]) == runs[[*configs].index(name)].execute(tmp_path)["metrics"]


@pytest.mark.parametrize(
    ("timed", "allocated", "waits"), [(True, False, True), (False, False, False), (True, True, False)]
)
def test_a_timed_run_waits_for_another_but_in_an_allocation(timed, allocated, waits, tmp_path, monkeypatch):
    """The lock is the machine's: another results folder is no way around it."""
    monkeypatch.setattr(records, "TIMED_LOCK", tmp_path / "lock")
    for name in records.ALLOCATED:
        monkeypatch.delenv(name, raising=False)
    if allocated:
        monkeypatch.setenv("SLURM_JOB_ID", "7")
    nothing = {"metrics": {}, "curves": {}, "data": {}}
    with open(tmp_path / "lock", "w") as lock, ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        future = pool.submit(records.perform, tiny_config(), tmp_path / "results", lambda _: nothing, timed=timed)
        done, _ = wait([future], timeout=1 if waits else 30)
        assert bool(done) != waits
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert future.result(timeout=30)["status"] == "ok"


@pytest.mark.slow
def test_an_interrupted_wait_kills_the_run_and_the_next_one_gets_its_own_answer(tmp_path):
    """Ctrl-C in a terminal or a notebook: the run must end, and the next run must not get its exit status."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    running = []

    def interrupt():
        running.append(wait_for_run())
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    fork_server()
    timer = threading.Thread(target=interrupt)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        launcher.spawn(tiny_config(measure_steps=LONG), tmp_path)
    timer.join()
    assert not running[0].is_running()
    assert records.read_records(tmp_path) == []
    assert launcher.spawn(tiny_config(), tmp_path)["status"] == "ok"


@pytest.mark.slow
def test_a_run_ends_with_who_asked_for_it(tmp_path):
    """If the sweep's process is killed (such as a notebook's kernel), its run must not disturb the next sweep."""
    config = tiny_config(measure_steps=LONG)
    code = f"from pathlib import *; from memstudy import launcher; launcher.spawn({config!r}, {tmp_path!r})"
    asking = psutil.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    for _ in range(600):
        below = asking.children(recursive=True)
        if len(below) == 2:
            break
        time.sleep(0.05)
    asking.kill()
    asking.wait()  # or it would stay a zombie among this process's children
    gone, left = psutil.wait_procs(below, timeout=20)
    assert (len(gone), left) == (2, [])
    assert records.read_records(tmp_path) == []


@pytest.mark.slow
def test_the_death_of_the_fork_server_is_an_error_and_the_next_run_starts_another(tmp_path):
    fork_server().kill()
    with pytest.raises(RuntimeError, match=r"process that starts the runs died \(exit status -9\)"):
        launcher.spawn(tiny_config(), tmp_path)
    assert launcher.spawn(tiny_config(), tmp_path)["status"] == "ok"


def test_a_run_over_its_budget_is_out_of_memory(folder, record):
    peak = record["metrics"]["peak_allocated_mib"]
    refused = launcher.spawn(tiny_config(budget_mib=0.99 * peak), folder)
    assert refused["status"] == "oom"
    assert refused["reason"] == f"peak {peak:.1f} MiB passes the budget of {0.99 * peak:g} MiB"
    assert launcher.spawn(tiny_config(budget_mib=1.01 * peak), folder)["status"] == "ok"


def test_what_the_allocator_refuses_is_out_of_memory(tmp_path):
    """Under a real limit on address space, inherited from the process that forks the runs."""
    server = fork_server()
    unlimited = resource.prlimit(server.pid, resource.RLIMIT_AS, (16 << 30, resource.RLIM_INFINITY))
    try:
        record = launcher.spawn(tiny_config(hidden_size=65536), tmp_path)
    finally:
        resource.prlimit(server.pid, resource.RLIMIT_AS, unlimited)
    assert record["status"] == "oom"
    assert "can't allocate memory: you tried to allocate" in record["reason"]


@pytest.fixture
def memory_limit():
    """A function that puts later runs under a control group's limit [bytes]; skips where that is forbidden."""
    server, controller = fork_server(), Path("/sys/fs/cgroup/memory")
    group = controller / "memstudy_test_runs"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory control group (version 1) can be made here: {error.strerror}")

    def limit(size: int) -> None:
        (group / "memory.limit_in_bytes").write_text(str(size))
        (group / "cgroup.procs").write_text(str(server.pid))

    yield limit
    (controller / "cgroup.procs").write_text(str(server.pid))
    group.rmdir()


def test_a_run_that_the_kernel_kills_for_memory_is_out_of_memory(tmp_path, memory_limit):
    memory_limit(200 << 20)
    record = launcher.spawn(tiny_config(hidden_size=1024, feed_forward=4096, batch_size=256), tmp_path)
    assert record["status"] == "oom"
    assert record["reason"].startswith("killed by the kernel: out of memory")
    assert fork_server().is_running()


def test_the_kernel_s_count_of_kills_for_memory_is_read():
    assert type(launcher._kernel_oom_kills()) is int
    assert launcher._kernel_oom_kills() >= 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="they can run here")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"techniques": ["offload_activations"]}, "offload_activations needs a CUDA device"),
        (
            {"attention": {"variant": "softmax", "implementation": "flash_attention_2"}, "techniques": ["bf16"]},
            "implementation='flash_attention_2' needs CUDA",
        ),
        (
            {"attention": {"variant": "window", "window": 8, "implementation": "flash_attention_2"}},
            "implementation='flash_attention_2' needs CUDA",
        ),
    ],
    ids=["offload_activations", "flash_attention_2", "window_flash_attention_2"],
)
def test_what_this_machine_lacks_is_unavailable_with_the_reason(folder, change, reason):
    record = launcher.spawn(tiny_config(**change), folder)
    assert record["status"] == "unavailable"
    assert reason in record["reason"]
    assert record["metrics"] == {}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"kind": "image_model"}, "exit status 2; error: unknown kind of run 'image_model'; known: language_model"),
        (tiny_config() | {"batch_size": -1}, "exit status 2; error: batch_size=-1: Input should be greater than 0"),
        (tiny_config(train_steps=1, dataset="moby"), "exit status 2; error: unknown data set 'moby'; known: "),
        (
            tiny_config(train_steps=1, dataset="miniature"),
            "exit status 2; error: data set 'miniature' has content hash",
        ),
    ],
    ids=["kind", "batch_size", "dataset", "data_hash"],
)
def test_a_run_that_is_refused_is_a_failed_record_with_its_last_words(tmp_path, config, reason):
    record = launcher.spawn(config, tmp_path)
    assert record["status"] == "failed"
    assert record["reason"].startswith(reason)


def test_a_run_that_raises_is_a_failed_record_and_keeps_its_checkpoints(tmp_path, capsys):
    """The checkpoints are still there on the next try, and removed after success."""
    config = {"experiment": str(tmp_path)}
    seen = []

    def execute(checkpoints: Path) -> dict:
        seen.append(checkpoints.exists())
        checkpoints.mkdir(parents=True, exist_ok=True)
        if len(seen) == 1:
            raise RuntimeError("the disk\nis full")
        return {"metrics": {"loss": 1.0}, "curves": {}, "data": {}}

    failed = records.perform(config, tmp_path, execute)
    assert (failed["status"], failed["reason"]) == ("failed", "RuntimeError: the disk is full")
    assert "Traceback" in capsys.readouterr().err
    ok = records.perform(config, tmp_path, execute)
    assert (ok["status"], ok["metrics"]) == ("ok", {"loss": 1.0})
    assert seen == [False, True]
    assert not (ROOT / "build" / "checkpoints" / records.run_id(config)).exists()
    assert records.read_records(tmp_path) == [ok]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_a_failed_record(tmp_path, loss):
    record = records.perform({}, tmp_path, lambda _: {"metrics": {"loss": loss}, "curves": {}, "data": {}})
    assert record["status"] == "failed"
    assert "not JSON compliant" in record["reason"]
    assert records.read_records(tmp_path) == [record]


def test_two_runs_never_write_to_one_folder_at_once(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from memstudy.records import perform\n"
        "def execute(_):\n    time.sleep(0.3)\n    return {'metrics': {}, 'curves': {}, 'data': {}}\n"
        "perform({'seed': sys.argv[1]}, Path(sys.argv[2]), execute)"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, str(n), tmp_path], cwd=ROOT) for n in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]
    spans = sorted((r["provenance"]["started"], r["provenance"]["ended"]) for r in records.read_records(tmp_path))
    assert len(spans) == 3
    assert all(ended <= began for (_, ended), (began, _) in itertools.pairwise(spans))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        with pytest.raises(ValueError, match=rf"^results folder {place}: cannot be written \(.+\); choose another"):
            launcher.spawn(tiny_config(), place)
