"""The process that imports what runs need, and forks a process for each run that `launcher` asks for."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
from pathlib import Path


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # output of an import must not be read as an answer
    interrupted = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run and for the launcher
    from memstudy.cli.quick_imports import import_step

    import_step()
    from memstudy import kinds  # noqa: F401 - imported once for all forked processes
    from memstudy.cli.main import end_with

    for line in sys.stdin:
        arguments, log = json.loads(line)
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGINT, interrupted)
            with contextlib.suppress(OSError):  # short of memory, Linux then kills the run, not the launcher
                Path("/proc/self/oom_score_adj").write_text("1000")
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            end_with(arguments)
        answers.write(f"{child}\n")
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            # The launcher sends nothing during a run: readable input means that the launcher has ended. Left alone, the
            # run would spoil the timings of the next sweep.
            if select.select([sys.stdin], [], [], 0.02)[0]:
                os.kill(child, signal.SIGKILL)
                return
        answers.write(f"{os.waitstatus_to_exitcode(ended[1])}\n")


if __name__ == "__main__":
    _serve()
