"""Decoding with MemSizer's state against GPT-2 with its cache: tokens/s and memory kept, by length.

Two models of the same size, with random weights: 6 layers of width 512, 8 heads, feed-forward width 2,048, 10,000
tokens tied to the head; MemSizer with 4 slots. At each length, both read a prompt of this length (GPT-2 in one pass,
MemSizer in steps) and then take turns at decoding eight tokens greedily; the time is the median of a step. The memory
kept is the storage of all layers' states, or of the cache. For one sequence, decoding is as fast as weights and cache
can be read: at 2,048 tokens, 1.9 times as many bytes for GPT-2. With more sequences or beams, the cache grows and the
weights do not.

  python benchmarks/decoding.py                 a minute
  python benchmarks/decoding.py --batch 4       four sequences, or four beams
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from memstudy.attention import ATTENTION

LAYERS, HIDDEN, HEADS, FEED_FORWARD, VOCABULARY, SLOTS = 6, 512, 8, 2048, 10_000, 4
STEPS = 96  # timed steps at each length
TURN = 8  # consecutive steps of a model, so that the processor's cache is as warm as in real decoding
FASTER = (2048, 2.0)  # target: at this length, MemSizer is this many times as fast
LEVEL = 1.1  # target: the largest ratio between MemSizer's slowest and fastest length


def gpt2_config(positions: int) -> GPT2Config:
    """The configuration that both models follow."""
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_layer=LAYERS,
        n_embd=HIDDEN,
        n_head=HEADS,
        n_inner=FEED_FORWARD,
        n_positions=positions,
        activation_function="gelu_pytorch_tanh",
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
    )


class MemSizerLM(nn.Module):
    """GPT-2's blocks with MemSizer for attention; decodes one token at a time."""

    def __init__(self, positions: int):
        super().__init__()
        config = ATTENTION["memsizer"](slots=SLOTS)
        self.tokens, self.positions = nn.Embedding(VOCABULARY, HIDDEN), nn.Embedding(positions, HIDDEN)
        self.mixers = nn.ModuleList(config.module(HIDDEN, HEADS, config, is_causal=True) for _ in range(LAYERS))
        self.feed_forwards = nn.ModuleList(GPT2MLP(FEED_FORWARD, gpt2_config(positions)) for _ in range(LAYERS))
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(2 * LAYERS + 1))

    def step(self, tokens: torch.Tensor, position: int, states: list) -> tuple[torch.Tensor, list]:
        """Logits (batch, vocabulary) after ``tokens`` (batch, 1), and the layers' new states."""
        hidden, after = self.tokens(tokens) + self.positions.weight[position], []
        for layer, (mixer, feed_forward) in enumerate(zip(self.mixers, self.feed_forwards, strict=True)):
            mixed, state = mixer.step(self.norms[2 * layer](hidden), states[layer])
            after.append(state)
            hidden = hidden + mixed
            hidden = hidden + feed_forward(self.norms[2 * layer + 1](hidden))
        return nn.functional.linear(self.norms[-1](hidden)[:, -1], self.tokens.weight), after


def memsizer_decoder(prompt: torch.Tensor) -> tuple[Callable[[], None], Callable[[], Iterable]]:
    """A step that decodes one more token after ``prompt`` (batch, length), and a function for the tensors kept."""
    model = MemSizerLM(prompt.shape[1] + STEPS + 1).eval()
    logits, states = None, [None] * LAYERS
    for position in range(prompt.shape[1]):
        logits, states = model.step(prompt[:, position : position + 1], position, states)
    now = {"logits": logits, "states": states, "position": prompt.shape[1]}

    def step():
        tokens = now["logits"].argmax(-1, keepdim=True)
        now["logits"], now["states"] = model.step(tokens, now["position"], now["states"])
        now["position"] += 1

    return step, lambda: tree_leaves(now["states"])


def gpt2_decoder(prompt: torch.Tensor) -> tuple[Callable[[], None], Callable[[], Iterable]]:
    """`memsizer_decoder` for GPT-2."""
    model = GPT2LMHeadModel(gpt2_config(prompt.shape[1] + STEPS + 1)).eval()
    now = {"output": model(prompt, use_cache=True, logits_to_keep=1)}

    def step():
        tokens = now["output"].logits[:, -1].argmax(-1, keepdim=True)
        now["output"] = model(tokens, past_key_values=now["output"].past_key_values, use_cache=True)

    def kept():
        return [tensor for layer in now["output"].past_key_values.layers for tensor in (layer.keys, layer.values)]

    return step, kept


def kept_mib(tensors: Iterable) -> float:
    """Size of the distinct storages of ``tensors`` [MiB]."""
    storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, torch.Tensor)]
    if not storages:
        raise RuntimeError("the decoder keeps no tensor: its state is of no kind that torch's pytree knows")
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()) / 2**20


def compare(length: int, batch: int) -> dict[str, tuple[float, float]]:
    """Milliseconds per step and MiB kept, by model, after ``length`` tokens."""
    torch.manual_seed(0)
    prompt = torch.randint(VOCABULARY, (batch, length))
    with torch.inference_mode():
        decoders = {"MemSizer": memsizer_decoder(prompt), "GPT-2": gpt2_decoder(prompt)}
        kept = {name: kept_mib(tensors()) for name, (_, tensors) in decoders.items()}
        times: dict[str, list[float]] = {name: [] for name in decoders}
        for _ in range(-(-STEPS // TURN)):
            for name, (step, _) in decoders.items():
                for _ in range(min(TURN, STEPS)):
                    began = time.perf_counter()
                    step()
                    times[name].append(1e3 * (time.perf_counter() - began))
    return {name: (statistics.median(times[name]), kept[name]) for name in decoders}


def spread(lengths: list[int], batch: int) -> float:
    """Ratio of MemSizer's step times at the slowest and the fastest of ``lengths``, timed in turn."""
    times: dict[int, list[float]] = {length: [] for length in lengths}
    with torch.inference_mode():
        steps = {length: memsizer_decoder(torch.randint(VOCABULARY, (batch, length)))[0] for length in lengths}
        for _ in range(-(-STEPS // TURN)):
            for length, step in steps.items():
                for _ in range(min(TURN, STEPS)):
                    began = time.perf_counter()
                    step()
                    times[length].append(time.perf_counter() - began)
    medians = [statistics.median(some) for some in times.values()]
    return max(medians) / min(medians)


def main() -> None:
    """Read the arguments, run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    lengths = [64, 128, 256, 512, 1024, 2048, 4096]
    parser.add_argument("--lengths", nargs="+", metavar="N", type=int, default=lengths)
    parser.add_argument("--batch", type=int, default=1, help="sequences, or beams")
    given = parser.parse_args()
    for name, values in (("lengths", given.lengths), ("batch", [given.batch])):
        if min(values) < 1:
            parser.error(f"argument --{name}: {min(values)}: at least 1 is needed")
    print(f"batch {given.batch}, {torch.get_num_threads()} threads")
    print(f"{'length':>7} {'MemSizer':>21} {'GPT-2':>21}")
    print(f"{'':7} {'tokens/s':>10} {'MiB':>10} {'tokens/s':>10} {'MiB':>10}  ratio")
    found = {}
    for length in tqdm(sorted(set(given.lengths)), unit="length", mininterval=1):
        found[length] = compare(length, given.batch)
        (ours, state), (theirs, cache) = found[length]["MemSizer"], found[length]["GPT-2"]
        speeds = [1e3 * given.batch / ms for ms in (ours, theirs)]
        text = f"{length:7,} {speeds[0]:10,.0f} {state:10.3f} {speeds[1]:10,.0f} {cache:10.3f} {theirs / ours:6.2f}"
        tqdm.write(text, file=sys.stdout)
    if FASTER[0] in found:
        ratio = found[FASTER[0]]["GPT-2"][0] / found[FASTER[0]]["MemSizer"][0]
        met = "met" if ratio >= FASTER[1] else "NOT MET"
        print(f"at {FASTER[0]:,} tokens {ratio:.2f} times GPT-2's speed; at least {FASTER[1]:g}: {met}")
    ratio = spread(sorted({min(found), max(found)}), given.batch)
    met = "met" if ratio <= LEVEL and len({row["MemSizer"][1] for row in found.values()}) == 1 else "NOT MET"
    print(f"between shortest and longest, in turn, {ratio:.2f}; at most {LEVEL:g}, and one size of state: {met}")


if __name__ == "__main__":
    main()
