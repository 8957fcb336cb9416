"""Predict ratios of step time between techniques on this CPU, and compare with those that this project measured on it.

python benchmarks/step_time/cpu.py

The CPU is described as a GPU by what two products and a copy reach here, live; no absolute time is claimed. Judged is
what repeats or leaves out fp32 products (checkpointing, accumulation, width). Not judged: bf16, whose casts and
elementwise kernels compute here longer than a copy takes; 8 bits and 4, for which CUDA has other kernels; a loss in
chunks of 16 tokens, whose weights stay in a CPU's cache.
"""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import torch
from torch.utils.benchmark import Timer

from memstudy import machine, project
from memstudy.attention import Unavailable
from memstudy.kinds import parse_run
from memstudy.profiler.catalogue import Gpu, Speed
from memstudy.profiler.time.cost import constants

RESULTS = Path(__file__).parents[2] / "results"
SIZE = "n_layers", "hidden_size", "n_heads", "feed_forward", "vocab_size", "seq_len", "batch_size"
CPU = Gpu(name="this CPU", compute_capability=(8, 0), memory_mib=2**20, context_mib=0)  # a capability that has bf16
# What must not limit, and a link that no technique here uses.
BESIDE = {"tf32_tflops": None, "watts": 1e6, "l2_mib": 1, "pcie_gb_s": 1, "speed_source": "measured here"}


def rate(amount: float, function, share: str, threads: int = 1) -> float:
    """``amount`` over the shortest time, and over the share that the prediction will multiply the rate with."""
    timer = Timer("function()", globals={"function": function}, num_threads=threads)
    return amount / min(timer.blocked_autorange(min_run_time=1).times) / constants()[share].of(CPU)


def this_cpu() -> Gpu:
    """This CPU; products are timed on one core, since two that wait for each other are slow on a busy machine."""
    left, right, source, target = torch.randn(512, 512), torch.randn(512, 2048), torch.ones(2**26), torch.empty(2**26)
    half, cores = (left.bfloat16(), right.bfloat16()), machine.threads()
    tflop, gigabytes = cores * 2 * 512 * 512 * 2048 / 1e12, 2 * source.nbytes / 1e9
    speed = {
        "fp32_tflops": rate(tflop, lambda: left @ right, "fp32_share"),
        "tensor_tflops": rate(tflop, lambda: half[0] @ half[1], "tensor_share"),
        "bandwidth_gb_s": rate(gigabytes, lambda: target.copy_(source), "memory_share", cores),
    }
    print(", ".join(f"{name} {value:.3g}" for name, value in speed.items()))
    return CPU.model_copy(update={"speed": Speed(**speed, **BESIDE, sms=cores)})


def main() -> None:
    gpu, rows = this_cpu(), {}
    reference = project.read_parameters("memory_ablation", "full")  # records of smaller scales may lie beside
    for path in RESULTS.glob("memory_[ac]*/*.json"):
        record = json.loads(path.read_text("utf-8"))
        config, ms = record["config"], record["metrics"].get("step_time_ms")
        same_size = all(config.get(name) == reference[name] for name in SIZE)
        if config["kind"] == "language_model" and same_size and ms and not config.get("train_steps"):
            try:
                predicted_ms = parse_run(config).foretell(gpu).time.step_time_ms
            except Unavailable as error:
                print(f"not predicted: {error}")
                continue
            rows["+".join(config.get("techniques", [])) or "none"] = ms, predicted_ms
    found = pd.DataFrame(rows, index=["measured", "predicted"]).T.sort_values("measured")
    found /= found.loc["none"]
    found["error [%]"] = 100 * (found.predicted / found.measured - 1)
    print(found.to_string(float_format="{:.2f}".format))
    for bf16, size in found["error [%]"].drop("none").abs().groupby(lambda name: "bf16" in name):
        print(f"{'bf16' if bf16 else 'fp32'}: {len(size)}, median {size.median():.0f} %, worst {size.max():.0f} %")


if __name__ == "__main__":
    main()
