"""MemSizer's causal layer against the formula as written in the authors' released code: time and peak memory.

The released code makes k_s v_sᵀ for every token, (seq, batch, slots, hidden), sums over tokens by a product with a
lower triangle (seq, seq), and multiplies by the weights: two tensors of seq × batch × slots × hidden, and work that
grows with the square of the length. Both use the same weights and give the same results (compared first); fp32, width
512, 8 heads, 32 slots. Memory is the peak of forward and backward without the layer and its input (measured, allocation
by allocation); times are medians of alternating steps.

  python benchmarks/memsizer.py                     two minutes
  python benchmarks/memsizer.py --lengths 256 512   a quick look
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from tqdm import tqdm

from memstudy.attention import MemSizerConfig
from memstudy.attention.memsizer import MemSizerAttention
from memstudy.profiler import MIB, measure

HIDDEN, HEADS, SLOTS, BATCH = 512, 8, 32, 1
FASTER, LEANER = 20, 10  # least factors in time and memory, from 2,048 tokens on


def layer() -> MemSizerAttention:
    """The project's layer."""
    torch.manual_seed(0)
    return MemSizerAttention(HIDDEN, HEADS, MemSizerConfig(SLOTS), is_causal=True)


def straightforward(layer: MemSizerAttention, hidden_states: torch.Tensor) -> torch.Tensor:
    """The formula as in the released code; input and output are (batch, seq, hidden)."""
    seq = hidden_states.shape[1]
    tokens = hidden_states.transpose(0, 1)  # (seq, batch, hidden)
    weights = layer.query_proj(tokens).unflatten(-1, (layer.num_heads, -1)).softmax(-1).mean(-2)
    key, value = layer.key_norm(layer.key_proj(tokens)), layer.value_norm(layer.value_proj(tokens))
    outer = torch.einsum("tbk,tbd->tbkd", key, value)
    triangle = torch.ones(seq, seq).tril() / torch.arange(1, seq + 1).sqrt()[:, None]
    sums = torch.einsum("ts,sbkd->tbkd", triangle, outer)
    return torch.einsum("tbk,tbkd->tbd", weights, sums).transpose(0, 1)


WAYS: dict[str, Callable[[MemSizerAttention, torch.Tensor], torch.Tensor]] = {
    "memstudy": lambda layer, hidden_states: layer(hidden_states),
    "straightforward": straightforward,
}


def build(way: Callable, length: int) -> Callable[[], None]:
    """Make layer and input, and return a step of forward and backward."""
    made, hidden_states = layer(), torch.randn(BATCH, length, HIDDEN, requires_grad=True)

    def step():
        way(made, hidden_states).sum().backward()
        hidden_states.grad = None
        made.zero_grad()

    return step


def compare(length: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Seconds per step (median), and MiB without layer and input, by implementation."""
    same, hidden_states = layer(), torch.randn(BATCH, length, HIDDEN)
    torch.testing.assert_close(*(way(same, hidden_states) for way in WAYS.values()), rtol=1e-3, atol=1e-3)
    held = sum(p.numel() for p in same.parameters()) * 4 + hidden_states.nbytes
    peaks = {who: measure(partial(build, way, length), iterations=1) for who, way in WAYS.items()}
    steps = {who: build(way, length) for who, way in WAYS.items()}
    times: dict[str, list[float]] = {who: [] for who in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for who, step in steps.items():
            began = time.perf_counter()
            step()
            times[who].append(time.perf_counter() - began)
    return {who: (statistics.median(times[who]), max(peaks[who].iteration_peaks) / MIB - held / MIB) for who in steps}


def main() -> None:
    """Read the arguments, run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", metavar="N", type=int, default=[512, 1024, 2048], help="[tokens]")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each")
    given = parser.parse_args()
    if min(*given.lengths, given.rounds) < 1:
        parser.error("arguments --lengths and --rounds: at least 1 is needed")
    print(f"{torch.get_num_threads()} threads; medians of {given.rounds} steps in turn")
    print(f"{'length':>7}  {'':16} {'step [ms]':>10} {'beside [MiB]':>13}   this / ours: time, memory")
    for length in tqdm(given.lengths, unit="length", mininterval=1):
        found = compare(length, given.rounds)
        seconds, peak = found["memstudy"]
        for who, (other, more) in found.items():
            line = f"{length:7,}  {who:16} {1e3 * other:10.1f} {more:13.1f}"
            if who != "memstudy":
                line += f"   {other / seconds:.0f}, {more / peak:.0f}"
                if length >= 2048:
                    met = other >= FASTER * seconds and more >= LEANER * peak
                    line += f" (≥ {FASTER}, ≥ {LEANER}): {'met' if met else 'NOT MET'}"
            tqdm.write(line)


if __name__ == "__main__":
    main()
