"""A fresh process for each run, without the wait: one process imports what runs need, and forks a new one for each.

Importing PyTorch and Transformers takes five seconds, more than many a run. The forked process starts with the imports
done and nothing else: no tensor has been made and no thread started before the fork. The process that imports and forks
is the command line's (`cli.worker`), and is started by its name: nothing here depends on what it imports.
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
from pathlib import Path

from memstudy import machine, records


class Forker:
    """Starts ``memstudy`` commands in processes forked from one that has imported everything."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "memstudy.cli.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(self._process.terminate)

    def run(self, arguments: list[str], log: Path) -> int:
        """Run ``memstudy ARGUMENTS`` to its end, its output going to ``log``.

        Returns its exit status, negative for a signal as in ``subprocess``. When this process is interrupted
        meanwhile, the command is killed.
        """
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            self._process.stdin.write(json.dumps([arguments, str(log)]) + "\n")
            self._process.stdin.flush()
        child = self._answer()
        try:
            return self._answer()
        except KeyboardInterrupt:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            self._answer()  # else the next command would take it for its own
            raise

    def _answer(self) -> int:
        answer = self._process.stdout.readline()
        if not answer:
            forker.cache_clear()
            raise RuntimeError(f"the process that starts the runs died (exit status {self._process.wait()}); run again")
        return int(answer)


@functools.cache
def forker() -> Forker:
    """This process's forker, started when first needed."""
    return Forker()


def spawn(config: dict, folder: Path) -> dict:
    """Carry out a run in a fresh process (``memstudy run``) and return its record, the curves left on disk.

    A process that dies without a record leaves one all the same: ``oom`` when the kernel killed it for memory,
    ``failed`` otherwise, with the signal and its last words.
    """
    records.check_writable(folder)
    started, kills = records.now(), _kernel_oom_kills()
    with tempfile.TemporaryDirectory() as scratch:
        file, log = Path(scratch, "run.json"), Path(scratch, "log")
        file.write_text(json.dumps(config))
        log.touch()  # the process may be killed before it has opened it
        code = forker().run(["run", str(file), "--results", str(folder)], log)
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
