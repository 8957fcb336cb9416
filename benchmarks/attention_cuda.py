"""The attention variants on a GPU against what PyTorch and flash-attn offer: time and memory of forward and backward.

The op alone on (batch, heads, seq, 64) in bf16, each in turn: SDPA, a sliding window by FlexAttention (compiled) and by
flash-attn where it is installed, and our variants. Times are medians of CUDA's events; memory is the peak above the
inputs. An op that does not fit, or does not run on the card, gets a row that says so. Needs CUDA.

  python benchmarks/attention_cuda.py                                  some minutes
  python benchmarks/attention_cuda.py --lengths 4096 --json rows.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from memstudy.attention import ATTENTION
from memstudy.studies.validation.run import event_times_ms

HEADS, HEAD_DIM, WINDOW, WARM_UP = 8, 64, 256, 3
# Settings of our variants, causal where the variant can be.
VARIANTS = {
    "softmax, eager": ("softmax", {"implementation": "eager"}),
    "window": ("window", {"window": WINDOW}),
    "window, flash-attn": ("window", {"window": WINDOW, "implementation": "flash_attention_2"}),
    "lsh, 2 hashes": ("lsh", {"num_hashes": 2}),
    "linformer": ("linformer", {"rank": 128}),
    "nystrom": ("nystrom", {"landmarks": 64}),
    "performer": ("performer", {"features": 256}),
}
Op = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def ours(variant: str, settings: dict, length: int) -> Op:
    """The op of one of our variants, with weights if it has any."""
    longest = {"max_len": length} if variant == "linformer" else {}
    config = ATTENTION[variant](**settings, **longest)
    is_causal = True in config.causal
    weights = config.make_weights(HEAD_DIM)
    given = {} if weights is None else {"weights": weights.to("cuda", torch.bfloat16)}
    return lambda query, key, value: config.attend(query, key, value, is_causal=is_causal, **given)


def sdpa(length: int) -> Op:
    """PyTorch's choice of kernel."""
    return lambda *tensors: torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=True)


def flex_window(length: int) -> Op:
    """FlexAttention's kernel of a causal sliding window."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def near(batch, head, query, key):
        return (query >= key) & (query - key < WINDOW)

    mask = create_block_mask(near, B=None, H=None, Q_LEN=length, KV_LEN=length, device="cuda")
    compiled = torch.compile(flex_attention)
    return lambda query, key, value: compiled(query, key, value, block_mask=mask)


def flash_window(length: int) -> Op:
    """flash-attn's kernel of a causal sliding window."""
    from flash_attn import flash_attn_func

    def attend(*tensors):
        by_token = (tensor.transpose(1, 2) for tensor in tensors)
        return flash_attn_func(*by_token, causal=True, window_size=(WINDOW - 1, 0)).transpose(1, 2)

    return attend


def measured(make: Callable[[int], Op], length: int, batch: int, steps: int) -> dict:
    """Median time [ms] and peak memory [MiB] of the op's forward and backward pass, or why there is none."""
    shape = (batch, length, HEADS, HEAD_DIM)
    tensors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)]
    for tensor in tensors:
        tensor.requires_grad_()
    direction = torch.randn_like(tensors[0])
    try:
        op = make(length)

        def step():
            torch.autograd.grad(op(*tensors), tensors, direction)

        for _ in range(WARM_UP):
            step()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        return {"time_ms": statistics.median(event_times_ms(step, steps)), "peak_mib": peak}
    except (ImportError, RuntimeError, ValueError) as error:
        return {"reason": f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"}


def main() -> None:
    """Read the arguments, run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", metavar="N", type=int, default=[1024, 4096, 16_384])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each op")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: attention_cuda.py times CUDA kernels, and PyTorch finds no CUDA device here")
    ops: dict[str, Callable[[int], Op]] = {
        "SDPA": sdpa, "FlexAttention, window": flex_window, "flash-attn, window": flash_window
    }  # fmt: skip
    for name, (variant, settings) in VARIANTS.items():
        ops[f"memstudy: {name}"] = lambda length, v=variant, s=settings: ours(v, s, length)
    rows = []
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, batch {given.batch}, {HEADS} heads")
    print(f"{'op':30} {'n':>7} {'ms':>9} {'× SDPA':>7} {'MiB':>9}")
    for length in tqdm(given.lengths, unit="length", file=sys.stderr):
        reference = None
        for name, make in ops.items():
            row = {"op": name, "n": length} | measured(make, length, given.batch, given.steps)
            rows.append(row)
            torch.cuda.empty_cache()
            reference = row.get("time_ms") if name == "SDPA" else reference
            said = row.get("reason")
            if said is None:
                ratio = f"{row['time_ms'] / reference:7.2f}" if reference else f"{'–':>7}"
                said = f"{row['time_ms']:9.3f} {ratio} {row['peak_mib']:9.1f}"
            tqdm.write(f"{name:30} {length:>7,} {said}", file=sys.stdout)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
