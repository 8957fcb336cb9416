"""The time of a step: a queue that the host fills with ops and the GPU works off."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from math import ceil, prod
from pathlib import Path
from typing import NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field

from memstudy.profiler.catalogue import Gpu
from memstudy.profiler.time.ops import KINDS, Work

# Tiles (rows, columns) of the libraries' products, and their speed relative to the largest: of tensor cores, and of
# fp32 arithmetic, by the kernels that neusight_ops_fp32 names.
TENSOR_TILES = {(256, 128): 1.0, (128, 256): 1.0, (128, 128): 0.95, (128, 64): 0.85, (64, 128): 0.85, (64, 64): 0.7}
FP32_TILES = {
    (128, 128): 1.0, (128, 64): 1.0, (64, 128): 1.0, (64, 64): 0.97, (128, 32): 0.86, (32, 128): 0.86, (64, 32): 0.8,
    (32, 64): 0.8, (32, 32): 0.62,
}  # fmt: skip


class Constant(BaseModel):
    """One constant: its ``value``, or one by compute capability (``other``: those not named), and where it comes from.

    ``fitted_on`` names the published rows that chose it, ``seen`` those whose error had been seen before the choice.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float | dict[str, float]
    unit: str = Field(min_length=1)
    means: str = Field(min_length=1)
    source: str = Field(min_length=1)
    fitted_on: tuple[str, ...]
    seen: tuple[str, ...] = ()

    def of(self, gpu: Gpu) -> float:
        """The value for ``gpu``."""
        name = ".".join(map(str, gpu.compute_capability))
        return self.value.get(name, self.value["other"]) if isinstance(self.value, dict) else self.value


@functools.cache
def constants() -> dict[str, Constant]:
    """The constants of ``constants.yaml``, by name."""
    text = Path(__file__).with_name("constants.yaml").read_bytes()
    return {name: Constant.model_validate(given) for name, given in yaml.safe_load(text).items()}


@dataclass(frozen=True)
class StepTime:
    """The time of a step on a GPU, predicted; times in ms.

    Attributes
    ----------
    step_time_ms : float
        With a typical host.
    low_ms, high_ms : float
        The band: with a fast host and a slow one, wider by the error of the GPU's calibration.
    kernels_ms : float
        The kernels alone, one after the other, at the clock of a short benchmark.
    bound_by : str
        ``GPU`` or ``host``: which of the two has more to do.
    by_phase_ms : dict
        Time by phase; adds up to ``step_time_ms``.
    by_kind_ms : dict
        The GPU's time by kind of op, and its wait for the host; adds up to ``step_time_ms``.
    share_of_peak : float
        Floating-point operations of products and attention, over what the tensor cores could do meanwhile.
    untimed : tuple of str
        What the time leaves out or only bounds.
    """

    step_time_ms: float
    low_ms: float
    high_ms: float
    kernels_ms: float
    bound_by: str
    by_phase_ms: dict[str, float]
    by_kind_ms: dict[str, float]
    share_of_peak: float
    untimed: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The time with its band, in seconds from 10 s on."""
        unit, scale = ("s", 1e-3) if self.high_ms >= 10_000 else ("ms", 1.0)
        low, middle, high = (scale * ms for ms in (self.low_ms, self.step_time_ms, self.high_ms))
        digits = 0 if high >= 100 else 1
        return f"{middle:,.{digits}f} {unit} ({low:,.{digits}f} to {high:,.{digits}f})"


def step_time(issued: Sequence[tuple[str, Work]], gpu: Gpu, untimed: tuple[str, ...] = ()) -> StepTime:
    """The time of the ops ``issued``, each with its phase, on ``gpu``, whose ``speed`` must be known."""
    works = {id(work): work for _, work in issued}  # equal ops share one
    alone = {key: kernel_us(work, gpu) for key, work in works.items()}
    us = {key: step_us(work, gpu) for key, work in works.items()}
    fast, typical, slow = (_run(issued, us, host) for host in ("fast", "typical", "slow"))
    total = sum(typical.values())
    by_kind = dict.fromkeys(KINDS, 0.0)
    for phase, work in issued:
        by_kind["optimizer" if phase == "optimizer" else work.kind] += us[id(work)]
    busy = sum(by_kind.values())
    by_kind["host waits"] += total - busy
    wrong = constants()["calibration_error"].of(gpu)
    flops = sum(_flops(work) for _, work in issued)
    return StepTime(
        step_time_ms=total / 1e3,
        low_ms=sum(fast.values()) * (1 - wrong) / 1e3,
        high_ms=sum(slow.values()) * (1 + wrong) / 1e3,
        kernels_ms=sum(alone[id(work)] for _, work in issued) / 1e3,
        bound_by="host" if sum(_host_us(phase, "typical") for phase, _ in issued) > busy else "GPU",
        by_phase_ms={phase: us / 1e3 for phase, us in typical.items()},
        by_kind_ms={kind: us / 1e3 for kind, us in by_kind.items()},
        share_of_peak=flops / (total * gpu.speed.tensor_tflops * 1e6) if total else 0.0,
        untimed=untimed,
    )


class TimedOp(NamedTuple):
    """One op in the queue: when the host has issued it, and when its kernels begin and end [µs]."""

    phase: str
    work: Work
    issued_us: float
    begins_us: float
    ends_us: float


def schedule(issued: Sequence[tuple[str, Work]], gpu: Gpu) -> list[TimedOp]:
    """The ops ``issued``, each with its phase, as a typical host and ``gpu`` handle them."""
    return list(_queue(issued, {id(work): step_us(work, gpu) for _, work in issued}, "typical"))


def _queue(issued: Sequence[tuple[str, Work]], us: dict[int, float], host: str) -> Iterator[TimedOp]:
    """The host issues each op, and the GPU begins it when it is issued and the GPU is free."""
    issued_at = free_at = 0.0
    per_op = {phase: _host_us(phase, host) for phase in {phase for phase, _ in issued}}
    for phase, work in issued:
        issued_at += per_op[phase]
        begins = max(free_at, issued_at)
        if work.kernels:
            free_at = begins + us[id(work)]
        if work.kind == "host waits":
            issued_at = max(issued_at, free_at)
        yield TimedOp(phase, work, issued_at, begins, free_at)


def _run(issued: Sequence[tuple[str, Work]], us: dict[int, float], host: str) -> dict[str, float]:
    """Time by phase [µs], with the given ``host``."""
    before = 0.0
    times: dict[str, float] = {}
    for phase, ops in groupby(_queue(issued, us, host), key=lambda op: op.phase):
        for op in ops:
            now = max(op.issued_us, op.ends_us)
        before, times[phase] = now, times.get(phase, 0.0) + now - before
    return times


def _host_us(phase: str, host: str) -> float:
    """Time in which the ``host`` issues an op [µs]."""
    return constants()[f"host_{phase}_us"].value / constants()[f"{host}_host"].value


def kernel_us(work: Work, gpu: Gpu) -> float:
    """Time of one op's kernels on ``gpu`` [µs]: the longer of moving its bytes and computing."""
    if not work.kernels:
        return 0.0
    known, speed = constants(), gpu.speed
    us = work.moved_bytes / (speed.bandwidth_gb_s * known["memory_share"].of(gpu) * 1e3)
    if work.kind == "transfers":
        us = work.moved_bytes / (speed.pcie_gb_s * known["pcie_share"].value * 1e3)
    elif work.kind == "products":
        us = max(_product_us(work, gpu), us * known["memory_share"].of(gpu) / known["product_memory_share"].value)
    elif work.kind == "attention":
        us = max(work.flops / (_rate(work.arithmetic, gpu) * known[work.attention].value * 1e6), us)
    elif work.unvectorised:
        us = max(us, work.moved_bytes / (speed.sms * known["element_gb_s"].of(gpu) * min(work.unvectorised, 4) * 1e3))
    elif work.moved_bytes <= speed.l2_mib * 2**20:
        us /= known["l2_speed"].value
    return work.kernels * known["kernel_us"].value + us


def _rate(arithmetic: str, gpu: Gpu) -> float:
    """What products reach [TFLOP/s]: on tensor cores, or by ordinary fp32 arithmetic where they lack the type."""
    known, speed = constants(), gpu.speed
    bf16 = speed.tensor_tflops if gpu.compute_capability >= (8, 0) else None
    peak = {"fp16": speed.tensor_tflops, "bf16": bf16, "tf32": speed.tf32_tflops, "fp32": None}[arithmetic]
    return peak * known["tensor_share"].of(gpu) if peak else speed.fp32_tflops * known["fp32_share"].of(gpu)


def step_us(work: Work, gpu: Gpu) -> float:
    """As `kernel_us`, within a training step, where the board's power and heat lower the tensor cores' clock.

    A kernel's FLOP take watts, of TF32 twice as many, and the board has so many.
    """
    us, known = kernel_us(work, gpu), constants()
    if work.arithmetic == "fp32" or work.kind not in ("products", "attention"):
        return us
    limit = gpu.speed.watts * known["tflops_per_watt"].of(gpu) / (2 if work.arithmetic == "tf32" else 1)
    return max(us / known["sustained"].of(gpu), _flops(work) / (limit * 1e6))


def _flops(work: Work) -> int:
    return work.flops or 2 * prod(work.product or (0,))


def _product_us(work: Work, gpu: Gpu) -> float:
    """Time of a product: its tiles in waves over the multiprocessors, by the best tile.

    The inner dimension may be split, and the parts' sums added up.
    """
    batch, rows, columns, inner = work.product
    if min(rows, columns) == 1:
        return 0.0  # a matrix by a vector, for which the libraries have a kernel of its own: only the bytes count
    speed, known = gpu.speed, constants()
    flops_per_us = _rate(work.arithmetic, gpu) * 1e6 / speed.sms  # of one multiprocessor
    bandwidth = speed.bandwidth_gb_s * known["memory_share"].of(gpu) * 1e3
    best = float("inf")
    tiles = FP32_TILES if work.arithmetic == "fp32" else TENSOR_TILES
    splits = [parts for parts in (1, 2, 4, 8, 16) if parts == 1 or inner >= 256 * parts]
    for ((height, width), efficiency), parts in product(tiles.items(), splits):
        waves = ceil(batch * ceil(rows / height) * ceil(columns / width) * parts / speed.sms)
        us = waves * 2 * height * width * (inner / parts) / (flops_per_us * efficiency)
        if parts > 1:
            us += 8 * batch * rows * columns * parts / bandwidth  # fp32 sums, written and read
        best = min(best, us)
    return best
