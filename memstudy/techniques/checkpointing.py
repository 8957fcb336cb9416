"""Activations that are dropped in the forward pass and recomputed in backward."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from memstudy.techniques.base import Technique


@dataclass(frozen=True)
class Checkpointing(Technique):
    """Keep only the input of each ``every``-th block and recompute the block in backward (Chen et al. 2016).

    ``every=2`` recomputes every second block: half the extra time and about half the saving.
    """

    every: int = 1
    summary = "recompute every block (=2: every second) in backward, keep only its input"
    group = "checkpointing"

    def __post_init__(self):
        if self.every < 1 or not float(self.every).is_integer():
            raise ValueError(f"checkpointing={self.every}: a whole number from 1 is needed (2: every second block)")

    def prepare(self, model):
        model.activation_checkpointing_enable({"use_reentrant": False})
        if self.every == 1:
            return
        blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not blocks:
            raise ValueError(f"checkpointing={self.every:g}: {type(model).__name__} recomputes all blocks or none")
        for number, block in enumerate(blocks):
            block.gradient_checkpointing = number % int(self.every) == 0


_ATEN = torch.ops.aten
_ATTENTIONS = {
    _ATEN._scaled_dot_product_flash_attention,
    _ATEN._scaled_dot_product_efficient_attention,
    _ATEN._scaled_dot_product_cudnn_attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu,
}
_PRODUCTS = {_ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm} | _ATTENTIONS


@dataclass(frozen=True)
class SelectiveCheckpointing(Technique):
    """Recompute cheap ops and keep expensive outputs: selective recomputation (Korthikanti et al. 2022) by budget.

    The outputs of a block's matrix products and attentions are ranked by the work per element (2 K for a
    product over K, 4 N for attention over N keys). The most expensive outputs are kept, up to ``budget``, a
    fraction of the bytes of all these outputs. Everything else is recomputed, including the last product of a
    block, whose output backward does not need.
    """

    budget: float = 0.5
    summary = "recompute the cheap ops of every block; keep products up to a share of their bytes"
    group = "checkpointing"

    def __post_init__(self):
        if not 0 <= self.budget <= 1:
            raise ValueError(f"selective_checkpointing={self.budget}: a share, 0 to 1, is needed")

    def prepare(self, model):
        keep: set | None = None

        def contexts():
            nonlocal keep
            made: list[tuple[tuple, int, int]] = []  # (op and shapes, work per element, bytes)
            kept = frozenset(keep or ())

            def policy(ctx, op, *args, **kwargs):
                if op.overloadpacket not in _PRODUCTS:
                    return CheckpointPolicy.PREFER_RECOMPUTE
                key, work, size = _product(op, args)
                if not ctx.is_recompute:
                    made.append((key, work, size))
                saved = key in kept
                return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

            # The first block that runs is recomputed completely; its ops decide which outputs the other blocks keep.
            forward, recompute = create_selective_checkpoint_contexts(policy)
            return _Then(forward, lambda: plan(made)), recompute

        def plan(made):
            nonlocal keep
            if keep is None:
                keep = _dearest(made, self.budget)

        model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})


class _Then:
    """A context manager that runs ``after`` when the one it wraps has ended."""

    def __init__(self, context, after):
        self._context, self._after = context, after

    def __enter__(self):
        return self._context.__enter__()

    def __exit__(self, *exc):
        self._after()
        return self._context.__exit__(*exc)


def _product(op, args) -> tuple[tuple, int, int]:
    """``(identity, work per element of the output, bytes of the output)`` of a product or an attention."""
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    key = (op, tuple(tensor.shape for tensor in tensors))
    if op.overloadpacket in _ATTENTIONS:
        query, key_states, value = tensors[:3]
        elements = query.numel() // query.shape[-1] * value.shape[-1]
        return key, 4 * key_states.shape[-2], elements * query.element_size()
    left, right = tensors[-2:]
    elements = left.numel() // left.shape[-1] * right.shape[-1]
    return key, 2 * left.shape[-1], elements * left.element_size()


def _dearest(made: list[tuple[tuple, int, int]], budget: float) -> set[tuple]:
    room = budget * sum(size for _, _, size in made)
    times = Counter(key for key, _, _ in made)
    last = made[-1][0] if made else None
    keep = set()
    for key, _, size in sorted(set(made), key=lambda row: (-row[1], row[2])):
        if key != last and size * times[key] <= room:
            room -= size * times[key]
            keep.add(key)
    return keep
