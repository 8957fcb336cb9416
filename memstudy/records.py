"""Records of runs: one run, one JSON file, whole or not at all.

Studies print from records alone. A record holds every choice of the run, its metrics, its status and its
provenance. ``status`` is ``ok``, ``oom`` (out of memory, killed by the kernel for memory, or over the run's
budget), ``unavailable`` (this machine lacks something; the reason says what) or ``failed``.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
import traceback
import uuid
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path

from memstudy import machine

ROOT = machine.ROOT
FORMAT = 1
FIELDS = {"format", "run_id", "config", "status", "reason", "metrics", "curves", "data", "provenance"}
PROVENANCE = {
    "device", "cpu", "threads", "platform", "packages", "commit", "dirty", "started", "ended", "command",
}  # fmt: skip
SETTLED = ("ok", "oom", "unavailable")  # a "failed" run is tried again
# Environment variables. PLAN: a folder where missing runs are written as JSON files instead of being run. MACHINE: the
# device whose records count, instead of this machine's. PRECISION: bf16 or fp32, what precision "auto" means instead of
# what is fast here.
PLAN, MACHINE, PRECISION = "MEMSTUDY_PLAN", "MEMSTUDY_MACHINE", "MEMSTUDY_PRECISION"
ALLOCATED = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")  # set when a scheduler has given this process its cores
TIMED_LOCK = Path(tempfile.gettempdir(), f"memstudy-timed-{os.getuid()}.lock")  # held while a run is timed


class MissingRecords(ValueError):
    """A study's rows have no record, and nothing may be run."""


def run_id(config: dict) -> str:
    """The first 16 hex digits of the SHA-256 of ``config`` as canonical JSON."""
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def check_writable(folder: Path) -> None:
    """Raise ``ValueError`` unless files can be made in ``folder``; a missing folder is made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"results folder {folder}: cannot be written ({error.strerror}); choose another or change its permissions"
        ) from None


def write_record(folder: Path, record: dict) -> Path:
    """Write ``record`` under ``folder`` atomically and return its path.

    The file is named after the run id. If another device already has a record of the run, that file stays, and the new
    file name gets a hash of this device.
    """
    path = folder / f"{record['run_id']}.json"
    here = record["provenance"]["device"]
    if path.exists():
        there = read_record(path)
        if there and there["provenance"]["device"] != here:
            path = folder / f"{record['run_id']}-{run_id({'device': here})[:6]}.json"
    fields = (f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False, allow_nan=False)}" for k, v in record.items())
    text = "{\n" + ",\n".join(fields) + "\n}\n"
    write_whole(path, text.encode())
    return path


def write_whole(path: Path, content: bytes) -> None:
    """Write the file ``path``, whole or not at all."""
    unfinished = path.with_name(f".{path.name}-{uuid.uuid4().hex}.tmp")
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_records(folder: Path) -> list[dict]:
    """Every whole record in ``folder``; a corrupt one is renamed to ``*.corrupt`` with a warning."""
    return [record for _, record in iterate_records(folder)]


def iterate_records(folder: Path, run_ids: Container[str] | None = None) -> Iterator[tuple[Path, dict]]:
    """Yield file and record as `read_records` does; only those of the runs ``run_ids``, if given."""
    for path in sorted(folder.glob("*.json")):
        if run_ids is not None and path.stem.partition("-")[0] not in run_ids:
            continue
        record = read_record(path)
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
    """A record's curves, read from the file at each access: curves of ten thousand records would fill the memory."""

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


def read_record(path: Path) -> dict | None:
    """The record in a file; None if the record is not whole."""
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


def as_row(record: dict, choices: Iterable[tuple[str, object]]) -> dict:
    """A table's row: the record, with every choice of its run and every metric as a column; a tuple as one text."""
    texts = {name: "+".join(map(str, value)) if isinstance(value, tuple) else value for name, value in choices}
    return {
        "run_id": record["run_id"],
        "status": record["status"],
        "reason": record["reason"],
        **texts,
        **record["metrics"],
        "curves": record["curves"],
        "data_source": record["data"].get("source"),
        "device": record["provenance"]["device"],
        "commit": record["provenance"]["commit"],
    }


def perform(
    config: dict,
    folder: Path,
    execute: Callable[[Path], dict],
    *,
    timed: bool = True,
    out_of_memory: tuple[type[Exception], ...] = (MemoryError,),
    unavailable: tuple[type[Exception], ...] = (),
) -> dict:
    """Carry out a run in this process and write its record, also when the run fails.

    Parameters
    ----------
    config : dict
        Every choice of the run.
    folder : Path
        Folder for the record.
    execute : callable
        Takes a folder for checkpoints and returns ``metrics``, ``curves`` and ``data``.
    timed : bool
        Wait until no other timed run of this user (such as one that outlived its sweep) is running on this machine: two
        would spoil each other's timings. In a scheduler's allocation, which is the run's own, there is no wait.
    out_of_memory, unavailable : tuple of exception types
        The exceptions that mean this status; any other exception means ``failed``.
    """
    check_writable(folder)
    alone = timed and not any(name in os.environ for name in ALLOCATED)
    with open(TIMED_LOCK, "w") if alone else nullcontext() as lock:
        if alone:
            fcntl.flock(lock, fcntl.LOCK_EX)
        return _perform(config, folder, execute, out_of_memory, unavailable)


def _perform(config, folder, execute, out_of_memory, unavailable) -> dict:
    started = now()
    checkpoints = checkpoints_of(config)
    result: dict = {}
    status, reason = "ok", ""
    try:
        found = execute(checkpoints)
        json.dumps(found, allow_nan=False)
        result = found
    except Exception as error:
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        if isinstance(error, out_of_memory) or "can't allocate memory" in str(error):  # torch's CPU allocator says so
            status = "oom"
        elif isinstance(error, unavailable):
            status = "unavailable"
        else:
            traceback.print_exc()
            status, reason = "failed", f"{type(error).__name__}: {reason}"
    record = make_record(config, status, reason, started) | result
    write_record(folder, record)
    if status != "failed":
        shutil.rmtree(checkpoints, ignore_errors=True)
    return record


def checkpoints_of(config: dict) -> Path:
    """The folder of a run's checkpoints while it trains."""
    return ROOT / "build" / "checkpoints" / run_id(config)


def make_record(config: dict, status: str, reason: str, started: str) -> dict:
    """A record with its provenance but without results; its end is now."""
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
            "packages": machine.versions(),
            **git_state(),
            "started": started,
            "ended": now(),
            "command": "memstudy run",
        },
    }


def git_state() -> dict:
    """``commit`` (``unknown`` outside git), and ``dirty``: whether the sources of runs differ from the commit."""
    if not machine.IN_REPOSITORY:  # the current folder may be of another repository
        return {"commit": "unknown", "dirty": True}
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


def now() -> str:
    """The current time in UTC, in ISO format."""
    return datetime.now(UTC).isoformat(timespec="microseconds")
