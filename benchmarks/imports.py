"""What importing the profiler costs beside importing PyTorch, each time in a fresh process.

python benchmarks/imports.py
"""

import argparse
import statistics
import subprocess
import sys

TIMED = """
import time
clocks = time.perf_counter, time.process_time
began = [clock() for clock in clocks]
import torch
torchs = [clock() for clock in clocks]
from memstudy.profiler import fit, measure, predict
print(*(b - a for a, b in zip(began, torchs)), *(clock() - a for clock, a in zip(clocks, torchs)))
"""

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="processes; their medians are printed")
    rounds = parser.parse_args().rounds
    command = [sys.executable, "-c", TIMED]
    printed = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(rounds)]
    torchs, torchs_cpu, more, more_cpu = (
        statistics.median(map(float, column)) for column in zip(*map(str.split, printed), strict=True)
    )
    print(f"import torch: {torchs:.2f} s, of which {torchs_cpu:.2f} s on the CPU")
    print(f"memstudy.profiler after it: {more:.2f} s, of which {more_cpu:.2f} s on the CPU: × {1 + more / torchs:.2f}")
