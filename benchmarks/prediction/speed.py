"""Time to the first answer of a command, relative to importing PyTorch and transformers on the same machine.

python benchmarks/prediction/speed.py [--rounds N]

The commands and the import are run in turn, each in its own process; the times are medians.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from memstudy import machine

MEMSTUDY = str(Path(sys.executable).with_name("memstudy"))
LLAMA = "--model llama-3-8b --seq-len 2048"
COMMANDS = {
    "import torch, transformers": f"{sys.executable} -c 'import torch, transformers'",
    "help": f"{MEMSTUDY} --help",
    "list gpus": f"{MEMSTUDY} list gpus",
    "predict BERT-base": f"{MEMSTUDY} predict --model bert-base-uncased --batch 16 --seq-len 128 --gpu T4",
    "predict Llama-3-8B, LoRA": (
        f"{MEMSTUDY} predict {LLAMA} --batch 1 --technique lora,bf16,checkpointing --gpu A100-80GB"
    ),
    "advise Llama-3-8B": f"{MEMSTUDY} advise {LLAMA} --batch 8 --gpu RTX4090",
}


def seconds(command: str) -> float:
    """Seconds that one run of ``command`` takes; it must succeed."""
    began = time.perf_counter()
    subprocess.run(shlex.split(command), check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often each command is run (default: 3)")
    rounds = parser.parse_args().rounds
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for name in tqdm([*COMMANDS] * rounds, unit="command"):
        times[name].append(seconds(COMMANDS[name]))
    medians = {name: statistics.median(of_it) for name, of_it in times.items()}
    unit = next(iter(medians.values()))
    print(f"{machine.cpu()}; medians of {rounds} rounds")
    for name, median in medians.items():
        print(f"{name:28}{median:7.2f} s {median / unit:6.2f} ×")


if __name__ == "__main__":
    main()
