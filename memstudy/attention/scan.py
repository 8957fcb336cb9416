"""Recurrences over the segments of a sequence that keep little besides their input.

A variant whose output depends on the past through a state of fixed size runs as::

    y_i, state_i = function(x_i, state_{i-1}, parameters)        for segments i = 1, 2, ...

`scan` keeps x and the state before each segment. Backward goes through the segments in reverse,
recomputes each under autograd (checkpointing, segment by segment) and writes its gradients into those
of the whole sequence, so that scratch is one segment's whatever the length.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch.autograd.function import once_differentiable

# A group has batch // BATCH_GROUPS sequences: scratch is an eighth of the batch's, and larger batches don't call
# ever more kernels. Short sequences are grouped until they have a segment's tokens.
BATCH_GROUPS = 8

Tensors = tuple[torch.Tensor | None, ...]


def scan(
    function: Callable[[Tensors, Tensors, Tensors], tuple[torch.Tensor | None, Tensors]],
    inputs: Tensors,
    state: Tensors,
    params: Tensors,
    *,
    segment: int,
    random: bool = False,
) -> tuple[torch.Tensor | None, Tensors]:
    """Run ``output, state = function(inputs, state, params)`` over segments. Differentiable once.

    Gradients flow to ``inputs``, ``params`` and the first ``state``, from the output and the last state.

    Parameters
    ----------
    function : callable
        Takes a segment of each input, the state before it and the parameters. Must depend on
        these alone; tensors in its closure get no gradient.
    inputs : tuple of torch.Tensor or None
        (batch, seq, ...) each; None for an absent input (no padding mask).
    state : tuple of torch.Tensor
        (batch, ...) each, before the first segment.
    params : tuple of torch.Tensor
        The same for every segment and sequence.
    segment : int [tokens]
    random : bool
        Whether the function draws random numbers, which backward must draw again.

    Returns
    -------
    torch.Tensor or None, tuple of torch.Tensor
        The output, (batch, seq, ...), None if the function gives none; the state after the last segment.
    """
    tensors = (*inputs, *state, *params)
    sizes = (len(inputs), len(state), segment)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        output, *state = _Scan.apply(function, sizes, random, *tensors)
    else:
        output, state = _run(function, sizes, tensors)
    return output, tuple(state)


def _split(sizes: tuple[int, int, int], tensors: Tensors) -> tuple[Tensors, Tensors, Tensors]:
    """Split a flat tuple into inputs, state and parameters."""
    middle = sizes[0] + sizes[1]
    return tuple(tensors[: sizes[0]]), tuple(tensors[sizes[0] : middle]), tuple(tensors[middle:])


def _plan(inputs: Tensors, segment: int) -> list[tuple[slice, slice]]:
    """List the sequences and tokens of each step: for each group of the batch, its segments in order."""
    batch, seq = inputs[0].shape[:2]
    size = max(1, batch // BATCH_GROUPS, segment // seq)
    return [
        (slice(row, min(row + size, batch)), slice(start, min(start + segment, seq)))
        for row in range(0, batch, size)
        for start in range(0, seq, segment)
    ]


def _part(tensors: Tensors, *where: slice) -> Tensors:
    return tuple(None if t is None else t[where] for t in tensors)


def _run(function, sizes, tensors, keep=None) -> tuple[torch.Tensor | None, Tensors]:
    """Go through the plan; call ``keep(state)`` before each step."""
    inputs, first, params = _split(sizes, tensors)
    output, last = None, []
    for rows, columns in _plan(inputs, sizes[2]):
        if columns.start == 0:
            state = _part(first, rows)
            last.append(state)
        if keep is not None:
            keep(state)
        piece, state = function(_part(inputs, rows, columns), state, params)
        if piece is not None:
            if output is None:
                output = piece.new_empty(*inputs[0].shape[:2], *piece.shape[2:])
            output[rows, columns] = piece
        last[-1] = state
    return output, last[0] if len(last) == 1 else tuple(torch.cat(states) for states in zip(*last, strict=True))


class _Scan(torch.autograd.Function):
    """The recurrence with its backward: the plan in reverse, each step recomputed."""

    @staticmethod
    def forward(ctx, function, sizes, random, *tensors):
        states, ctx.rng = [], []
        device = tensors[0].device

        def keep(state):
            states.extend(state)
            if random:
                ctx.rng.append(rng_state(device))

        ctx.function, ctx.sizes = function, sizes
        # No cache: parameters cast here without gradients must not be reused where gradients are needed.
        enabled, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        ctx.autocast = {"device_type": device.type, "dtype": dtype, "enabled": enabled, "cache_enabled": False}
        with torch.autocast(**ctx.autocast):
            output, state = _run(function, sizes, tensors, keep)
        ctx.save_for_backward(*tensors, *states)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t in state if not t.is_floating_point()))
        return output, *state

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, *grad_last):
        needed = ctx.needs_input_grad[3:]
        saved = ctx.saved_tensors  # read once: checkpointing lets each be unpacked only once
        tensors, states = saved[: len(needed)], saved[len(needed) :]
        inputs, first, params = _split(ctx.sizes, tensors)
        grads = [None] * len(tensors)
        for at, (tensor, need) in enumerate(zip(tensors, needed, strict=True)):
            if need and at < len(inputs) + len(first):
                grads[at] = torch.empty_like(tensor)
            elif need:  # at least in float32: half precision would round the sum at every step
                grads[at] = torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
        plan = _plan(inputs, ctx.sizes[2])
        grad_state = None
        for step in reversed(range(len(plan))):
            rows, columns = plan[step]
            if grad_state is None:
                grad_state = _part(grad_last, rows)
            state = states[step * len(first) : (step + 1) * len(first)]
            parts = (*_part(inputs, rows, columns), *state, *params)
            need = list(needed)
            if columns.start:
                need[len(inputs) : len(inputs) + len(first)] = [t.is_floating_point() for t in first]
            grad_piece = None if grad_output is None else grad_output[rows, columns]
            found = _step_backward(ctx, parts, need, ctx.rng[step] if ctx.rng else None, grad_piece, grad_state)
            for at, (whole, part) in enumerate(zip(grads, found, strict=True)):
                if whole is None:
                    continue
                if at < len(inputs):
                    whole[rows, columns] = 0.0 if part is None else part
                elif at >= len(inputs) + len(first):
                    whole.add_(0.0 if part is None else part)
                elif columns.start == 0:
                    whole[rows] = 0.0 if part is None else part
            grad_state = _split(ctx.sizes, found)[1] if columns.start else None
        return None, None, None, *(g if g is None else g.to(t.dtype) for g, t in zip(grads, tensors, strict=True))


def _step_backward(ctx, parts, need, rng, grad_piece, grad_state) -> list[torch.Tensor | None]:
    """Recompute one step under autograd; return the gradient of each part that needs one."""
    leaves = [t if t is None else t.detach().requires_grad_(n) for t, n in zip(parts, need, strict=True)]
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(**ctx.autocast))
        if rng is not None:
            stack.enter_context(drawing_again(parts[0].device, rng))
        piece, state = ctx.function(*_split(ctx.sizes, leaves))
    pairs = zip((piece, *state), (grad_piece, *grad_state), strict=True)
    pairs = [(t, grad) for t, grad in pairs if grad is not None and t.requires_grad]
    wanted = [leaf for leaf, n in zip(leaves, need, strict=True) if n]
    if not pairs or not wanted:
        return [None] * len(parts)
    outputs, grads = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))
    return [next(found) if n else None for n in need]


def rng_state(device: torch.device) -> torch.Tensor:
    """The state of the generator that ``device`` draws from."""
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


@contextmanager
def drawing_again(device: torch.device, state: torch.Tensor) -> Iterator[None]:
    """Draw from the generator's ``state`` inside the context; restore the generator afterwards."""
    set_state = torch.set_rng_state
    if device.type != "cpu":
        set_state = partial(torch.get_device_module(device).set_rng_state, device=device)
    before = rng_state(device)
    set_state(state)
    try:
        yield
    finally:
        set_state(before)
