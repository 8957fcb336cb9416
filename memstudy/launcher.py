"""A fresh process for each run without the import time: one process imports everything, then forks one for each run.

Importing PyTorch and Transformers takes five seconds, longer than many runs. A forked process starts with the imports
done and nothing else: before the fork, no tensor is made and no thread started. The importing process (`cli.worker`)
is started by module name, so that this module imports none of its dependencies.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from memstudy import machine, records

TOGETHER = 2  # untimed runs at once


class Forker:
    """Starts ``memstudy`` commands in processes forked from one that has imported everything."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "memstudy.cli.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(self._process.terminate)

    def run(self, arguments: list[str], log: Path) -> int:
        """Run ``memstudy ARGUMENTS`` to its end, with its output in the file ``log``.

        Returns the exit status, negative for a signal as in ``subprocess``. If this process is interrupted meanwhile,
        the command is killed.
        """
        with contextlib.suppress(BrokenPipeError):  # _answer then raises
            self._process.stdin.write(json.dumps([arguments, str(log)]) + "\n")
            self._process.stdin.flush()
        child = self._answer()
        try:
            return self._answer()
        except KeyboardInterrupt:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            self._answer()  # read now, or the next command would take the answer for its own
            raise

    def _answer(self) -> int:
        answer = self._process.stdout.readline()
        if not answer:
            forker.cache_clear()
            raise RuntimeError(f"the process that starts the runs died (exit status {self._process.wait()}); run again")
        return int(answer)


@functools.cache
def forker(number: int) -> Forker:
    """Forker ``number`` of this process, started when first needed."""
    return Forker()


def spawn_together(configs: Mapping[str, dict], folder: Path) -> Iterator[tuple[str, dict]]:
    """Carry out untimed runs, two at a time (`spawn`); yield the name and the record of each run as it ends."""
    free = list(reversed(range(TOGETHER)))  # as many forkers as threads: a thread always finds one

    def one(config: dict) -> dict:
        number = free.pop()
        try:
            return spawn(config, folder, number)
        finally:
            free.append(number)

    pool = ThreadPoolExecutor(TOGETHER)
    try:
        started = {pool.submit(one, config): name for name, config in configs.items()}
        for future in as_completed(started):
            yield started[future], future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def spawn(config: dict, folder: Path, number: int = 0) -> dict:
    """Carry out a run in a fresh process (``memstudy run``) and return its record, with the curves left on disk.

    ``number`` is the forker's number; each forker starts one run at a time.

    If the process dies without a record, one is written here: ``oom`` when the kernel killed the process for memory,
    otherwise ``failed``, with the signal and the last line of output.
    """
    records.check_writable(folder)
    started, kills = records.now(), _kernel_oom_kills()
    with tempfile.TemporaryDirectory() as scratch:
        file, log = Path(scratch, "run.json"), Path(scratch, "log")
        file.write_text(json.dumps(config))
        log.touch()  # the process may be killed before it opens the file
        code = forker(number).run(["run", str(file), "--results", str(folder)], log)
        said = log.read_text(errors="replace").strip().splitlines()
    for path in folder.glob(f"{records.run_id(config)}*.json"):
        record = records.read_record(path)
        if record and record["provenance"]["device"] == machine.device() and record["provenance"]["started"] >= started:
            return record | {"curves": records.Curves(path)}
    status, reason = "failed", f"exit status {code}"
    if code < 0:
        reason = f"killed by {signal.Signals(-code).name}"
        if _kernel_oom_kills() > kills:
            status, reason = "oom", "killed by the kernel: out of memory"
    record = records.make_record(config, status, f"{reason}; {said[-1] if said else 'no output'}", started)
    records.write_record(folder, record)
    return record


def _kernel_oom_kills() -> int:
    for counter in (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat")):
        if counter.exists():
            for line in counter.read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0
