"""The machine that runs are carried out on: what it is called, and whether it has fast products in bfloat16.

Timings are compared on one machine alone, and a machine is its processor and its instruction sets: two processors that
go by the same name may differ sixty-fold in bfloat16.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path

PROBE_SIZE = 384  # rows and columns of the matrices: 0.1 s a product where bfloat16 is emulated
FAST = 0.8  # times the speed of fp32, from which on bfloat16 counts as fast
# What each is called, and the flag in /proc/cpuinfo that shows it (x86 or Arm).
_SETS = {"AVX2": ("avx2",), "AVX-512": ("avx512f",), "bf16": ("avx512_bf16", "bf16"), "AMX": ("amx_bf16",)}
# Older records name a processor without its instruction sets. Their timings show that both processors had bf16
# instructions: in results/memory_ablation a step in bf16 takes 0.46 of the time of fp32, in results/lab4_grid 0.37;
# without them it would take some fifty times as long. On AMD's processors these come with AVX-512 and without AMX; of
# Intel's some have AMX and some not, which was not noted, so that no machine of now is taken for that one.
OLD_NAMES = {
    "AMD EPYC, 2 cores": "AMD EPYC, AVX-512 bf16, 2 cores",
    "Intel(R) Xeon(R) Processor, 2 cores": "Intel(R) Xeon(R) Processor, AVX-512 bf16 (AMX not noted), 2 cores",
}


@functools.cache
def device() -> str:
    """The machine that timings belong to: the GPU's name, or, without one, :func:`cpu`."""
    for information in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in information.read_text().splitlines():
            if line.startswith("Model:"):
                return line.partition(":")[2].strip()
    return cpu()


@functools.cache
def cpu() -> str:
    """The processor's model, its instruction sets, and how many cores and threads this process may use."""
    told = _told()
    sets = " ".join(instruction_sets()) or "no vector instructions known"
    return f"{_model(told)}, {sets}, {len(os.sched_getaffinity(0))} cores, {threads()} thread{'s' * (threads() > 1)}"


def read_as(name: str, threads: int) -> str:
    """What a record's device of that ``name`` is called now, see ``OLD_NAMES``."""
    if name not in OLD_NAMES:
        return name
    return f"{OLD_NAMES[name]}, {threads} thread{'s' * (threads > 1)}"


def threads() -> int:
    """How many threads PyTorch starts with."""
    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


def instruction_sets() -> list[str]:
    """Those of ``AVX2``, ``AVX-512``, ``bf16`` and ``AMX`` that PyTorch may use here, less what a larger one contains.

    The variables by which PyTorch and oneDNN are held to fewer count as the processor does.
    """
    flags = set(_told().get("flags", _told().get("features", "")).split())
    held = {os.environ.get("ATEN_CPU_CAPABILITY", "").lower(), os.environ.get("ONEDNN_MAX_CPU_ISA", "").lower()}
    names = ["AVX2"] if held & {"avx2", "avx2_vnni"} else list(_SETS)
    found = [name for name in names if flags.intersection(_SETS[name])]
    return [name for name in found if name != "AVX2" or "AVX-512" not in found]


def bf16_speed() -> float:
    """How many times as fast a product of matrices is in bfloat16 as in fp32: on the GPU, or, without one, here.

    Measured once a machine and version of PyTorch, in a fraction of a second, and kept in the cache folder.
    """
    key = f"{device()}, torch {importlib.metadata.version('torch')}"
    path = cache_folder() / "bf16_speed.json"
    known: dict[str, float] = {}
    with contextlib.suppress(OSError, TypeError, ValueError):
        known = dict(json.loads(path.read_text(encoding="utf-8")))
    if not isinstance(known.get(key), float):
        known[key] = _measured_bf16_speed()
        with contextlib.suppress(OSError):  # then the next process measures again
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(known), encoding="utf-8")
    return known[key]


def bf16_is_fast() -> bool:
    """Whether bfloat16 is worth training in here, and its timings say something of the method."""
    return bf16_speed() >= FAST


def cache_folder() -> Path:
    """Where is kept what can be made again: ``$MEMSTUDY_CACHE``, else ``~/.cache/memstudy``."""
    return Path(os.environ.get("MEMSTUDY_CACHE") or "~/.cache/memstudy").expanduser()


def _measured_bf16_speed() -> float:
    import torch

    where = "cuda" if torch.cuda.is_available() else "cpu"

    def seconds(dtype: torch.dtype) -> float:
        square = torch.ones(PROBE_SIZE, PROBE_SIZE, dtype=dtype, device=where)
        times = []
        while len(times) < 2 or (len(times) < 9 and sum(times) < 0.2):  # the first makes ready
            began = time.perf_counter()
            (square @ square)[0, 0].item()
            times.append(time.perf_counter() - began)
        return min(times)

    return round(seconds(torch.float32) / seconds(torch.bfloat16), 3)


@functools.cache
def _told() -> dict[str, str]:
    """What the system says of its first processor."""
    path = Path("/proc/cpuinfo")
    first = path.read_text().partition("\n\n")[0] if path.exists() else ""
    lines = (line.partition(":") for line in first.splitlines())
    return {name.strip().lower(): value.strip() for name, _, value in lines}


def _model(told: dict[str, str]) -> str:
    name = told.get("model name", "")
    if name:
        return name
    if "cpu family" in told:
        return f"{told.get('vendor_id', 'processor')} family {told['cpu family']} model {told.get('model', '?')}"
    return platform.processor() or platform.machine()
