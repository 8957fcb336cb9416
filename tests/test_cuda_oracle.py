"""The prediction for GPUs equals CUDA's own dispatch (benchmarks/cuda_oracle) in requested bytes."""

import csv
import sys
from pathlib import Path

import pytest
from support.tiers import cover, slow_but

from memstudy.profiler import predict

ORACLE = Path(__file__).resolve().parents[1] / "benchmarks" / "cuda_oracle"
sys.path.insert(0, str(ORACLE))
from cases import CASES, build  # noqa: E402

GPUS = {"80": "A100-80GB", "70": "V100-16GB", "90": "H100-80GB"}


def rows(capability):
    """The oracle's rows for GPUs of ``capability``, by case."""
    with (ORACLE / "oracle.csv").open(encoding="utf-8") as file:
        return {row["case"]: row for row in csv.DictReader(file) if row["compute_capability"] == capability}


AMPERE = rows("80")
OF_NAME = {case.name: case for case in CASES}


def compared():
    """All cases on an A100; on a V100 and an H100, the cases whose attention uses another kernel there."""
    for capability in GPUS:
        for case, row in rows(capability).items():
            if capability == "80" or row["attention_kernels"] != AMPERE[case]["attention_kernels"]:
                yield capability, row


def shows(compared):
    """Every choice of the case, and the case's kernels on the GPU."""
    capability, row = compared
    return {*vars(OF_NAME[row["case"]]).items(), (capability, row["attention_kernels"])}


def _id(value):
    return value["case"] if isinstance(value, dict) else GPUS[value]


@pytest.mark.parametrize(("capability", "row"), slow_but(cover(compared(), shows), compared()), ids=_id)
def test_requested_bytes_are_those_of_cudas_own_dispatch(capability, row, one_thread):
    case = OF_NAME[row["case"]]
    report = predict(lambda: build(case, "cpu"), gpu=GPUS[capability])
    if case.model == "llama-gqa" and "efficient" in row["attention_kernels"] and not case.padded:
        # The oracle's torch 2.14 takes grouped queries in this kernel; torch 2.13 runs the unfused math instead.
        assert report.requested_bytes > int(row["peak_bytes"])
    else:
        assert report.requested_bytes == int(row["peak_bytes"])
    cudnn = {"aten::_scaled_dot_product_cudnn_attention", "aten::_scaled_dot_product_cudnn_attention_backward"}
    assert set(report.unverified) == (cudnn if "cudnn" in row["attention_kernels"] else set())


def test_the_oracle_has_every_case():
    assert set(OF_NAME) == set(AMPERE)
    assert len(AMPERE) > 100
