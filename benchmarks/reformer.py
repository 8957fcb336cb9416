"""One training step of our Reformer, transformers' and reformer-pytorch's, at the same size: time and peak memory.

Six layers of width 256, two heads of 64, feed-forward width 512, a vocabulary of 320, chunks of 64, axial positions,
reversible layers, no dropout, AdamW, fp32, 16,384 tokens per step (one sequence of 16,384, or four of 4,096). Ours and
transformers' alternate local and LSH attention; in reformer-pytorch, each layer has one local and one hashed head,
which is the same share of each.

The peak is of a whole step with parameters and optimizer state (measured, allocation by allocation). Steps are timed in
turn, and medians are compared. The matrix products alone are timed too (projections, feed-forward parts and head): no
reversible model can be faster.

  python benchmarks/reformer.py                                   ten minutes
  python benchmarks/reformer.py --lengths 1024 --rounds 2         a quick look
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable

import torch
from tqdm import tqdm
from transformers import ReformerModelWithLMHead
from transformers import logging as transformers_logging

from memstudy.attention import Unavailable
from memstudy.profiler import measure
from memstudy.studies.attention_layer.peers import installed
from memstudy.studies.reformer.run import ReformerRun

LAYERS, HIDDEN, HEADS, HEAD_DIM, FEED_FORWARD, VOCABULARY, CHUNK = 6, 256, 2, 64, 512, 320, 64
TOKENS = 16_384  # tokens per step; a longer sequence is a batch of one
FASTER, LEANER = 0.6, 0.5  # targets: our time and peak, at most this share of each other model's
PRODUCTS = "products alone"


def axial(length: int) -> tuple[int, int]:
    """Rows and columns of the axial positions: powers of two, as close to a square as possible."""
    rows = 1 << ((length.bit_length() - 1) // 2)
    return rows, length // rows


def ours(length: int, hashes: int) -> torch.nn.Module:
    """The project's Reformer."""
    return ReformerRun(
        experiment="benchmark", n_layers=LAYERS, hidden_size=HIDDEN, n_heads=HEADS, head_dim=HEAD_DIM,
        feed_forward=FEED_FORWARD, vocab_size=VOCABULARY, seq_len=length, batch_size=1, measure_steps=1, dropout=0.0,
        attention={"variant": "lsh", "num_hashes": hashes, "chunk_length": CHUNK},
        axial_shape=axial(length), axial_widths=(HIDDEN // 4, HIDDEN - HIDDEN // 4),
    ).make_model()  # fmt: skip


def transformers(length: int, hashes: int) -> torch.nn.Module:
    """transformers' Reformer with the same configuration."""
    return ReformerModelWithLMHead(ours(length, hashes).config)


def reformer_pytorch(length: int, hashes: int) -> torch.nn.Module:
    """reformer-pytorch's Reformer, with a loss, which the package does not compute."""
    package = installed("reformer-pytorch", "reformer_pytorch")

    class WithLoss(package.ReformerLM):
        def forward(self, input_ids, labels):
            logits = super().forward(input_ids)
            return {"loss": torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}

    return WithLoss(
        num_tokens=VOCABULARY, dim=HIDDEN, depth=LAYERS, max_seq_len=length, heads=HEADS, dim_head=HEAD_DIM,
        bucket_size=CHUNK, n_hashes=hashes, ff_mult=FEED_FORWARD // HIDDEN, causal=True, n_local_attn_heads=1,
        axial_position_emb=True, axial_position_shape=axial(length),
    )  # fmt: skip


MODELS = {"memstudy": ours, "transformers": transformers, "reformer-pytorch": reformer_pytorch}


def build(make: Callable[[int, int], torch.nn.Module], length: int, hashes: int) -> Callable[[], Callable[[], None]]:
    """A function that makes model and optimizer and returns a step on random tokens."""

    def made():
        torch.manual_seed(0)
        model = make(length, hashes).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        tokens = torch.randint(VOCABULARY, (max(1, TOKENS // length), length))

        def step():
            model(tokens, labels=tokens)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return made


def products() -> Callable[[], None]:
    """The matrix products of a step: forward, recomputed in backward (except the head's), and for two gradients."""
    heads = HEADS * HEAD_DIM
    common = [(heads, HIDDEN), (HIDDEN, FEED_FORWARD), (FEED_FORWARD, HIDDEN)]
    local, hashed = ([*[(HIDDEN, heads)] * n, *common] for n in (3, 2))  # in hashed layers, queries are keys
    shapes = [*(local + hashed) * (LAYERS // 2), (2 * HIDDEN, VOCABULARY)]
    sizes = {size for shape in shapes for size in shape}
    rows = {size: torch.randn(TOKENS, size) for size in sizes}
    weights = {shape: torch.randn(shape) for shape in shapes}

    def step():
        for first, last in shapes:
            for _ in range(1 if last == VOCABULARY else 2):
                rows[first] @ weights[first, last]
            rows[last] @ weights[first, last].T
            rows[first].T @ rows[last]

    return step


def compare(length: int, hashes: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Seconds per step (median) and peak [MiB] of each installed model.

    ``PRODUCTS`` has the seconds of the matrix products alone.
    """
    steps, peaks = {}, {}
    for who, make in MODELS.items():
        try:
            peaks[who] = measure(build(make, length, hashes), iterations=2).peak_allocated_mib
        except Unavailable as error:
            print(f"{who}: {error}", file=sys.stderr)
            continue
        steps[who] = build(make, length, hashes)()
        steps[who]()
    steps[PRODUCTS], peaks[PRODUCTS] = products(), math.nan
    times: dict[str, list[float]] = {who: [] for who in steps}
    for _ in range(rounds):
        for who, step in steps.items():
            began = time.perf_counter()
            step()
            times[who].append(time.perf_counter() - began)
    return {who: (statistics.median(times[who]), peaks[who]) for who in steps}


def main() -> None:
    """Read the arguments, run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", metavar="N", type=int, default=[4096, 16384], help="powers of two")
    parser.add_argument("--hashes", nargs="+", metavar="N", type=int, default=[1, 8], help="rounds of hashing")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each")
    given = parser.parse_args()
    for length in given.lengths:
        if length < 2 * CHUNK or length & (length - 1):
            parser.error(f"argument --lengths: {length}: a power of two from {2 * CHUNK} on is needed")
    if min(*given.hashes, given.rounds) < 1:
        parser.error("arguments --hashes and --rounds: at least 1 is needed")
    transformers_logging.set_verbosity_error()
    print(f"{torch.get_num_threads()} threads; medians of {given.rounds} steps in turn")
    print(f"{'length':>7} {'hashes':>6}  {'model':16} {'step [s]':>9} {'peak [MiB]':>11}   ours / this: time, peak")
    cases = [(length, hashes) for length in given.lengths for hashes in given.hashes]
    for length, hashes in tqdm(cases, unit="case", mininterval=1):
        found = compare(length, hashes, given.rounds)
        seconds, peak = found["memstudy"]
        for who, (other, more) in found.items():
            line = f"{length:7,} {hashes:6}  {who:16} {other:9.3f} {more:11.1f}"
            if who == PRODUCTS:
                line = f"{length:7,} {hashes:6}  {who:16} {other:9.3f}"
            elif who != "memstudy":
                met = seconds <= FASTER * other and peak <= LEANER * more
                verdict = "met" if met else "NOT MET"
                line += f"   {seconds / other:.2f} (≤ {FASTER:g}), {peak / more:.2f} (≤ {LEANER:g}): {verdict}"
            tqdm.write(line, file=sys.stdout)


if __name__ == "__main__":
    main()
