"""Single fp32 ops that NeuSight's authors timed (sitar-lab/NeuSight @6945927) on an A100-PCIe-40GB and a V100 PCIe.

PyTorch 2.1, no TF32, no gradients. Between two CUDA events around one call on an idle GPU: the host's issue of the op
and the events are in the time, some 20 µs. The mean of the best 5 of 25 calls, all on the same input: small tensors
stay in the L2 cache. The table is a seeded sample of 30 rows for each op and GPU.
"""

from __future__ import annotations

from functools import partial

import pandas as pd
import torch
from torch.nn import functional as F

from memstudy.profiler.roles import Step
from memstudy.studies.published.times import HERE, Row

GPUS = {"NVIDIA A100-PCIE-40GB": "A100-PCIe-40GB", "Tesla V100-PCIE-32GB": "V100-PCIe-16GB"}
BINARY = {"add": torch.add, "mul": torch.mul, "div": torch.div, "pow": torch.pow}
UNARY = {f"{name}u": partial(lambda op, x: op(x, 0.5), op) for name, op in BINARY.items()}  # with a number
UNARY |= {"tanh": torch.tanh, "relu": torch.relu, "gelu": F.gelu, "softmax": partial(torch.softmax, dim=-1)}


def rows() -> list[Row]:
    """All rows of ``neusight_ops.csv``."""
    return [
        Row(
            table="neusight_ops",
            row=" ".join([row.op, "forward", *(f"{name}={size}" for name, size in _sizes(row).items())]),
            gpu=GPUS[row.gpu],
            published_ms=row.ms,
            build=partial(build, row.op, **_sizes(row)),
            kind="op",
        )
        for row in pd.read_csv(HERE / "neusight_ops.csv").itertuples()
    ]


def _sizes(row) -> dict[str, int]:
    return {name: int(getattr(row, name)) for name in ("B", "M", "N", "K", "H") if getattr(row, name) > 0}


def build(op: str, B: int, H: int = 0, M: int = 0, N: int = 0, K: int = 0) -> Step:
    """The step of one op: products of B×M×N and N×K, other ops of B×H."""
    if op == "linear":
        given, weight, bias = torch.randn(B, M, N), torch.randn(K, N), torch.randn(K)
        return lambda: F.linear(given, weight, bias)
    if op == "bmm":
        left, right = torch.randn(B, M, N), torch.randn(B, N, K)
        return lambda: torch.bmm(left, right)
    first, second = torch.zeros(B, H), torch.zeros(B, H)
    if op == "ln":
        weight, bias = torch.ones(H), torch.zeros(H)
        return lambda: F.layer_norm(first, (H,), weight, bias)
    return (lambda: BINARY[op](first, second)) if op in BINARY else (lambda: UNARY[op](first))
