"""What importing the profiler costs beside importing PyTorch, each time in a fresh process.

python benchmarks/imports.py
"""

import argparse
import statistics
import subprocess
import sys

TIMED = """
import time
began = time.perf_counter()
import torch
torchs = time.perf_counter()
from memstudy.profiler import fit, measure, predict
print(torchs - began, time.perf_counter() - torchs)
"""

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="processes; their median is printed")
    rounds = parser.parse_args().rounds
    command = [sys.executable, "-c", TIMED]
    printed = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(rounds)]
    torchs, more = (statistics.median(map(float, column)) for column in zip(*map(str.split, printed), strict=True))
    print(f"import torch: {torchs:.2f} s; memstudy.profiler after it: {more:.2f} s more, × {1 + more / torchs:.2f}")
