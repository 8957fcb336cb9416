"""Carry out the runs that studies lack at full scale, study by study; stop and start again as you like.

    OMP_NUM_THREADS=1 python build/sweep.py lab4_grid memory_ablation glue_lowrank   # two trainings at once
    python build/sweep.py memsizer                                                   # timed as well: one at a time
    python build/sweep.py --plan STUDY ...                                           # only say what is missing

Records of whatever machine count, as for `make paper`; only what has none is run.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from memstudy import launcher, records

for package in ("pytorch_optimizer", "torchao", "bitsandbytes"):  # else their rows would be recorded as unavailable
    if not importlib.util.find_spec(package):
        sys.exit(f"{package} is not installed: pip install -c constraints.txt -e '.[techniques]' first")


def missing(study):
    """What the first sweep that lacks records asks for; nothing when the study is complete."""
    with tempfile.TemporaryDirectory() as plan:
        command = [sys.executable, "-m", "memstudy.cli", "report", study, "--scale", "full", "--reference"]
        done = subprocess.run(command, cwd=records.ROOT, env=os.environ | {records.PLAN: plan}, capture_output=True, text=True)
        found = {path.stem: json.loads(path.read_text()) for path in sorted(Path(plan).glob("*.json"))}
    if not found:
        print(study, "complete" if done.returncode == 0 else f"ended without a plan:\n{done.stdout}{done.stderr}"[-1500:], flush=True)
    return found


for number in range(launcher.TOGETHER):  # a temporary folder, and so a lock, of its own: no time of these runs is shown
    os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="sweep")
    launcher.forker(number)

only_plan, studies = "--plan" in sys.argv, [name for name in sys.argv[1:] if name != "--plan"]
for study in studies:
    tried = set()
    while asked := {name: config for name, config in missing(study).items() if name not in tried}:
        tried |= asked.keys()
        print(time.strftime("%H:%M"), study, len(asked), "runs:", ", ".join(f"{c['experiment']}/{c.get('seed', 0)}" for c in asked.values()), flush=True)
        if only_plan:
            break
        folder = records.ROOT / "results" / study
        untimed = {name: config for name, config in asked.items() if not config.get("measure_steps")}
        for name, record in launcher.spawn_together(untimed, folder):
            print(time.strftime("%H:%M"), name, asked[name]["experiment"], record["status"], record["reason"][:200], flush=True)
        for name in asked.keys() - untimed.keys():
            record = launcher.spawn(asked[name], folder)
            print(time.strftime("%H:%M"), name, asked[name]["experiment"], record["status"], record["reason"][:200], flush=True)
