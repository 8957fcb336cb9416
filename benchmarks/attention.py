"""The attention variants against the packages a user would choose instead: time and memory of one layer.

One layer with its projections, forward and backward, batch 1, width 512, 8 heads, fp32, two threads unless
OMP_NUM_THREADS is set. Each measurement is a fresh process; in a round, our layer and each peer's layer take turns, and
a row is the median over the rounds.

  time    ratio to the layer's bare projections, four Linear on the same input, timed in turn with the layer
  U       peak memory from the layer's call to the end of backward, in fp32 tensors of the input's shape

A peer that is not installed, or would need more memory than available or more than ten minutes per round, gets a row
with the reason. Run the benchmark alone on the machine: memory is reproducible to the byte, time is not.

  python benchmarks/attention.py                                               everything, about two hours
  python benchmarks/attention.py --variants window --lengths 4096 --rounds 1   a quick look, one minute
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from pydantic import ValidationError
from tqdm import tqdm

from memstudy import launcher, machine
from memstudy.studies.attention_layer.run import LayerRun

# Settings (max_len is added for linformer), is_causal, cross, the peers' layers.
VARIANTS: dict[str, tuple[dict, bool, bool, list[str]]] = {
    "window": ({"variant": "window", "window": 256}, True, False, ["local-attention", "local-attention as it comes"]),
    "lsh_8": ({"variant": "lsh", "num_hashes": 8}, True, False, ["transformers", "reformer-pytorch"]),
    "lsh_1": ({"variant": "lsh", "num_hashes": 1}, True, False, ["transformers", "reformer-pytorch"]),
    "linformer": ({"variant": "linformer", "rank": 128}, False, False, ["linformer"]),
    "memsizer": ({"variant": "memsizer", "slots": 4}, True, False, ["MemSizer as released"]),
    # The equations of cross-attention, with the layer's own input as memory.
    "memsizer_cross": ({"variant": "memsizer", "slots": 32}, False, False, ["MemSizer as released"]),
    "performer": ({"variant": "performer", "features": 256}, True, False, ["performer-pytorch"]),
    "softmax": ({"variant": "softmax"}, True, False, ["torch"]),
    "softmax_lean": ({"variant": "softmax", "recompute": True}, True, False, ["torch"]),
}
# Targets for our rows, at most (time ratio, U) by length.
TARGETS: dict[str, dict[int, tuple[float, float]]] = {
    "window": {4096: (1.8, 8.0), 16_384: (1.8, 4.5)},
    "lsh_8": {4096: (4.5, 10.0), 16_384: (5.0, 10.0)},
    "lsh_1": {4096: (1.4, 10.0)},
    "linformer": {4096: (1.0, 5.5), 16_384: (1.0, 5.5)},
    "memsizer": {4096: (0.6, 4.5), 16_384: (0.6, 3.0)},
    "memsizer_cross": {4096: (0.5, 4.7)},
    "performer": {4096: (3.4, 8.0), 16_384: (3.4, 4.0)},
}
# Targets relative to torch's row: at most (factor of torch's time ratio, U; None for torch's own U). Two runs of one
# layer differ by 3 %.
AGAINST_TORCH = {"softmax": (1.03, None), "softmax_lean": (1.1, 5.6)}
SLOPE = (4096, 16_384)  # log-log slopes are taken between these lengths
LINEAR = {"memory": 1.02, "time": 1.15}  # targets: largest log-log slopes of all variants but softmax
LONGEST_ROUND_S = 600


def plan(variant: str, who: str, n: int, seed: int = 0) -> LayerRun:
    """The run of ``who``'s layer at ``n`` tokens."""
    settings, is_causal, cross, _ = VARIANTS[variant]
    if settings["variant"] == "linformer":
        settings = settings | {"max_len": n}
    return LayerRun(
        experiment=variant, who=who, attention=settings, seq_len=n, is_causal=is_causal, cross=cross, seed=seed
    )


def too_much(history: list[dict], n: int) -> str:
    """The reason not to try ``n`` tokens after the shorter lengths in ``history``, or an empty text."""
    if not history:
        return ""
    last = history[-1]
    if last["status"] != "ok":
        return f"{last['reason'] or last['status']} (at {last['n']:,} tokens)"
    for name, most, unit in (
        ("peak_mib", 0.9 * psutil.virtual_memory().available / 2**20, "MiB are available"),
        ("seconds", LONGEST_ROUND_S, "s are allowed"),
    ):
        slope = 2.0 if len(history) < 2 else max(1.0, log_slope(history[-2], last, name))
        expected = last[name] * (n / last["n"]) ** slope
        if expected > most:
            return f"not tried: would take about {expected:,.0f}, {most:,.0f} {unit}"
    return ""


def log_slope(shorter: dict, longer: dict, name: str) -> float:
    """Slope of ``name`` between two rows, both axes logarithmic."""
    return math.log(longer[name] / shorter[name]) / math.log(longer["n"] / shorter["n"])


def summary(variant: str, who: str, n: int, records: list[dict], seconds: float) -> dict:
    """One row of the table from the records of all rounds."""
    row = {"variant": variant, "who": who, "n": n, "time_ratio": None, "peak_u": None}
    bad = next((record for record in records if record["status"] != "ok"), None)
    if bad:
        return row | {"status": bad["status"], "reason": bad["reason"]}
    metrics = [record["metrics"] for record in records]
    provenance = records[0]["provenance"]
    return row | {
        "status": "ok",
        "reason": "",
        "time_ratio": statistics.median(m["time_ratio"] for m in metrics),
        "time_ratio_min": min(m["time_ratio_min"] for m in metrics),
        "time_ratio_max": max(m["time_ratio_max"] for m in metrics),
        "step_time_ms": statistics.median(m["step_time_ms"] for m in metrics),
        "projections_time_ms": statistics.median(m["projections_time_ms"] for m in metrics),
        "peak_u": max(m["peak_u"] for m in metrics),
        "peak_mib": max(m["peak_allocated_mib"] for m in metrics),
        "predicted_mib": metrics[0].get("predicted_peak_mib"),
        "rounds": len(records),
        "seconds": seconds / len(records),
        **{name: provenance[name] for name in ("device", "threads", "packages", "commit", "dirty")},
    }


def judged(row: dict, peers: Sequence[dict]) -> dict:
    """Our row with its targets and whether it meets them; ``peers`` are the rows at the same length."""
    target = TARGETS.get(row["variant"], {}).get(row["n"])
    if row["variant"] in AGAINST_TORCH:
        torchs = next((peer for peer in peers if peer["who"] == "torch" and peer["status"] == "ok"), None)
        times, most = AGAINST_TORCH[row["variant"]]
        target = torchs and (times * torchs["time_ratio"], most or torchs["peak_u"])
    if not target or row["status"] != "ok":
        return row
    met = row["time_ratio"] <= target[0] and row["peak_u"] <= target[1]
    return row | {"target_time_ratio": target[0], "target_u": target[1], "met": met}


def line(row: dict) -> str:
    """``row`` as a line of the table."""
    begin = f"{row['variant']:15} {row['who']:28} {row['n']:>7,}"
    if row["status"] != "ok":
        return f"{begin}  {row['status']}: {row['reason']}"
    spread = f"{row['time_ratio_min']:.2f}-{row['time_ratio_max']:.2f}"
    end = ""
    if "met" in row:
        end = f"{row['target_time_ratio']:7.2f} {row['target_u']:6.2f}  {'met' if row['met'] else 'NOT MET'}"
    return f"{begin} {row['time_ratio']:7.2f} {spread:>11} {row['peak_u']:8.2f} {end}".rstrip()


def compare(variants: list[str], lengths: list[int], rounds: int, report) -> list[dict]:
    """Run everything, and call ``report(row, rows so far)`` for each new row."""
    rows: list[dict] = []
    total = rounds * sum(lengths) * sum(1 + len(VARIANTS[variant][3]) for variant in variants)
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=total, unit="token", unit_scale=True, mininterval=1) as bar,
    ):
        for variant in variants:
            layers = ["memstudy", *VARIANTS[variant][3]]
            for n in lengths:
                records: dict[str, list[dict]] = {who: [] for who in layers}
                seconds = dict.fromkeys(layers, 0.0)
                skipped = {
                    who: too_much([row for row in rows if (row["variant"], row["who"]) == (variant, who)], n)
                    for who in layers
                }
                for number in range(rounds):
                    for who in layers[:: -1 if number % 2 else 1]:
                        bar.set_postfix_str(f"{variant}, {who}, {n:,}")
                        if not skipped[who]:
                            began = time.perf_counter()
                            config = plan(variant, who, n, seed=number).model_dump(mode="json")
                            records[who].append(launcher.spawn(config, Path(folder)))
                            seconds[who] += time.perf_counter() - began
                        bar.update(n)
                made = {
                    who: {"variant": variant, "who": who, "n": n, "time_ratio": None, "peak_u": None}
                    | {"status": "skipped", "reason": skipped[who]}
                    if skipped[who]
                    else summary(variant, who, n, records[who], seconds[who])
                    for who in layers
                }
                made["memstudy"] = judged(made["memstudy"], [made[who] for who in layers[1:]])
                for row in made.values():
                    rows.append(row)
                    report(row, rows)
    return rows


def slopes(rows: list[dict]) -> list[str]:
    """Lines with the log-log slopes of memory and time, for each layer with rows at both ends of `SLOPE`."""
    found = []
    for variant, who in dict.fromkeys((row["variant"], row["who"]) for row in rows):
        ends = [row for row in rows if (row["variant"], row["who"]) == (variant, who) and row["n"] in SLOPE]
        if len(ends) == 2 and all(row["status"] == "ok" for row in ends):
            memory, spent = log_slope(*ends, "peak_mib"), log_slope(*ends, "step_time_ms")
            text = f"{variant:15} {who:28} memory {memory:5.2f}  time {spent:5.2f}"
            if who == "memstudy" and not variant.startswith("softmax"):
                met = memory <= LINEAR["memory"] and spent <= LINEAR["time"]
                text += f"  at most {LINEAR['memory']} and {LINEAR['time']}: {'met' if met else 'NOT MET'}"
            found.append(text)
    return found


def main() -> None:
    """Read the arguments, run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", metavar="NAME", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--lengths", nargs="+", metavar="N", type=int, default=[2048, 4096, 8192, 16_384])
    parser.add_argument("--rounds", type=int, default=3, help="how often each layer takes its turn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, as they come")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    lengths = sorted(set(given.lengths))
    if given.rounds < 1:
        parser.error(f"argument --rounds: {given.rounds}: at least 1 is needed")
    if given.json and not os.access(given.json.absolute().parent, os.W_OK):
        parser.error(f"argument --json: {given.json}: its folder is not there or cannot be written")
    try:
        for variant in given.variants:
            for n in lengths:
                plan(variant, "memstudy", n)
    except ValidationError as error:
        parser.error(f"{variant} at {n} tokens: {error.errors()[0]['msg'].removeprefix('Value error, ')}")

    def report(row: dict, rows: list[dict]) -> None:
        tqdm.write(line(row), file=sys.stdout)
        if given.json:
            given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")

    print(f"{machine.device()}, {os.environ['OMP_NUM_THREADS']} threads; medians of {given.rounds} rounds")
    print(f"{'variant':15} {'who':28} {'n':>7} {'time':>7} {'least-most':>11} {'U':>8} {'at most':>14}", flush=True)
    rows = compare(given.variants, lengths, given.rounds, report)
    if found := slopes(rows):
        print(f"\nslopes from {SLOPE[0]:,} to {SLOPE[1]:,} tokens, both axes logarithmic", *found, sep="\n")


if __name__ == "__main__":
    main()
