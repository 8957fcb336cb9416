"""The training levers, by name: each changes how a step is run, and composes with the others.

A :class:`Technique` says what it is as flags of Hugging Face's ``TrainingArguments``, as a change made to the
model before training, as a context around forward and backward, or as any of these together. ``trainers`` uses the
same objects for training, for measuring and for predicting.

A run names its techniques in text, with the setting after ``=`` where there is one: ``"bf16"``,
``"accumulation=4"``. :func:`parse` turns the text into the object.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from memstudy.attention.base import Unavailable


@dataclass(frozen=True)
class Technique:
    """Base of all levers.

    Attributes
    ----------
    summary : str
        One sentence for ``memstudy list techniques``.
    exact : bool
        Whether the loss stays the baseline's up to rounding.
    group : str
        Two techniques of the same group exclude each other.
    requires : str
        ``"cuda"`` where the lever means nothing without a GPU; else empty.
    capability : tuple of int
        The least compute capability of a GPU that it needs.
    """

    summary = ""
    exact = True
    group = ""
    requires = ""
    capability = (0, 0)

    def flags(self) -> dict[str, object]:
        """Flags for ``transformers.TrainingArguments``."""
        return {}

    def prepare(self, model: torch.nn.Module) -> None:
        """Change ``model`` in place, before its optimizer is made."""

    def around_loss(self) -> AbstractContextManager:
        """A context for the forward pass; what autograd saves, it saves in here."""
        return nullcontext()

    def attach(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Tie the optimizer to the model; it has just been made."""


@dataclass(frozen=True)
class Bf16(Technique):
    """Mixed precision: products in bfloat16, weights and optimizer in fp32 (Micikevicius et al. 2018)."""

    summary = "bfloat16 autocast; weights, gradients and optimizer state stay fp32"
    exact = False
    group = "precision"

    def flags(self):
        return {"bf16": True}


@dataclass(frozen=True)
class Tf32(Technique):
    """TF32 products: fp32 storage, 10-bit mantissa inside the GPU's tensor cores."""

    summary = "TF32 tensor-core products for fp32 tensors; saves time, not memory"
    exact = False
    group = "precision"
    requires = "cuda"
    capability = (8, 0)

    def flags(self):
        return {"tf32": True}


@dataclass(frozen=True)
class Checkpointing(Technique):
    """Keep each block's input only and recompute the block in backward (Chen et al. 2016)."""

    summary = "recompute every block in backward, keep only the blocks' inputs"
    group = "checkpointing"

    def prepare(self, model):
        model.activation_checkpointing_enable({"use_reentrant": False})


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
    """Recompute the cheap, keep the dear: selective recomputation (Korthikanti et al. 2022), by budget.

    The outputs of a block's matrix products and attentions are ranked by the work that one element costs
    (2 K for a product over K, 4 N for attention over N keys); the dearest are kept as long as they are
    within ``budget``, a fraction of the bytes of them all. Everything else is recomputed, and so is the last
    product of a block, whose output backward does not need.
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

            # The first block that runs is recomputed whole; what it does is the plan for the others.
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


@dataclass(frozen=True)
class Accumulation(Technique):
    """Split the batch into ``steps`` parts, add their gradients, and update once."""

    steps: int = 4
    summary = "the same batch in several parts, one update"

    def __post_init__(self):
        if self.steps < 1 or not float(self.steps).is_integer():
            raise ValueError(f"accumulation={self.steps}: a whole number from 1 is needed")

    def flags(self):
        return {"gradient_accumulation_steps": int(self.steps)}


@dataclass(frozen=True)
class ChunkedLoss(Technique):
    """Loss and its gradient in chunks of rows, so that the (tokens, vocabulary) logits never exist.

    ``torch.nn.functional.linear_cross_entropy``; it ignores autocast, so the head's product stays fp32.
    """

    summary = "the language-model loss in chunks of tokens; no tensor of all logits"

    def prepare(self, model):
        native = model.forward

        @functools.wraps(native)
        def forward(input_ids=None, labels=None, num_items_in_batch=None, **kwargs):
            if labels is None or not model.training:
                return native(input_ids=input_ids, labels=labels, num_items_in_batch=num_items_in_batch, **kwargs)
            output = model.base_model(input_ids, **kwargs)
            head = model.get_output_embeddings()
            mean = num_items_in_batch is None
            loss = F.linear_cross_entropy(
                output.last_hidden_state[:, :-1].flatten(0, 1).to(head.weight.dtype),
                head.weight,
                labels[:, 1:].flatten(),
                linear_bias=head.bias,
                reduction="mean" if mean else "sum",
                options=torch.nn.LinearCrossEntropyOptions(),
            )
            return {"loss": loss if mean else loss / num_items_in_batch}

        model.forward = forward


@dataclass(frozen=True)
class AdamW8bit(Technique):
    """AdamW with block-wise 8-bit states (Dettmers et al. 2022), by bitsandbytes; embeddings stay 32-bit."""

    summary = "AdamW with 8-bit states (bitsandbytes)"
    exact = False
    group = "optimizer"

    def flags(self):
        return {"optim": "adamw_bnb_8bit"}


@dataclass(frozen=True)
class OffloadActivations(Technique):
    """Move what backward needs to the host's pinned memory, and back when it is needed."""

    summary = "saved activations wait in the host's memory"
    requires = "cuda"

    def around_loss(self):
        return torch.autograd.graph.save_on_cpu(pin_memory=True)


@dataclass(frozen=True)
class OptimizerInBackward(Technique):
    """Update each parameter as soon as its gradient is whole, and drop the gradient (Lv et al. 2023).

    One ordinary optimizer does: when a parameter's gradient is done, no other exists, so a step of the
    optimizer updates that parameter alone. Its state is saved and restored as ever.
    """

    summary = "update each parameter inside backward; gradients never exist together"

    def attach(self, model, optimizer):
        def update(parameter):
            optimizer.step()
            parameter.grad = None

        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(update)


TECHNIQUES: dict[str, type[Technique]] = {
    "bf16": Bf16,
    "tf32": Tf32,
    "checkpointing": Checkpointing,
    "selective_checkpointing": SelectiveCheckpointing,
    "accumulation": Accumulation,
    "chunked_loss": ChunkedLoss,
    "adamw_8bit": AdamW8bit,
    "offload_activations": OffloadActivations,
    "optimizer_in_backward": OptimizerInBackward,
}


def parse(texts: Sequence[str]) -> tuple[Technique, ...]:
    """The techniques that ``texts`` name, in order.

    Raises
    ------
    ValueError
        For an unknown name, a setting that is not a number or out of range, a setting where there is none,
        and for techniques that exclude each other.
    """
    techniques = tuple(_parse_one(text) for text in texts)
    for group, count in Counter(t.group or type(t).__name__ for t in techniques).items():
        if count > 1:
            raise ValueError(f"techniques {list(texts)}: only one of kind {group!r} can be used")
    if any(isinstance(t, OptimizerInBackward) for t in techniques) and any(
        isinstance(t, Accumulation) for t in techniques
    ):
        raise ValueError("optimizer_in_backward drops each gradient at once and so excludes accumulation")
    return techniques


def check_available(techniques: Sequence[Technique], *, capability: tuple[int, int] | None = None) -> None:
    """Raise :class:`Unavailable` for the first technique that cannot run.

    Parameters
    ----------
    techniques : sequence of Technique
    capability : tuple of int, optional
        Compute capability of the GPU in question; None asks for this machine.
    """
    if capability is None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
    for technique in techniques:
        name = next(name for name, lever in TECHNIQUES.items() if lever is type(technique))
        if technique.requires == "cuda" and capability is None:
            raise Unavailable(f"{name} needs a CUDA device, and there is none")
        if capability is not None and technique.capability > capability:
            needed, had = (".".join(map(str, c)) for c in (technique.capability, capability))
            raise Unavailable(f"{name} needs compute capability {needed}, and this GPU has {had}")


def _parse_one(text: str) -> Technique:
    name, has_setting, setting = text.partition("=")
    if name not in TECHNIQUES:
        raise ValueError(f"unknown technique {name!r}; known: {', '.join(TECHNIQUES)}")
    if not has_setting:
        return TECHNIQUES[name]()
    try:
        return TECHNIQUES[name](float(setting))
    except TypeError:
        raise ValueError(f"technique {name!r} has no setting, but got {setting!r}") from None
    except ValueError as error:
        reason = "a number is needed" if "could not convert" in str(error) else str(error)
        raise ValueError(f"technique {text!r}: {reason}") from None
