"""Losses in plain PyTorch, as Liger-Kernel's benchmark scripts and their tests have them; see `liger`.

A loss of preferences has its small reductions over sequences left out where they differ between CPO, ORPO and SimPO;
GRPO's metrics are left out too: a few kernels on 16,384 numbers, beside logits of 8 GB.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memstudy.studies.published.times.timed import Timed


def cross_entropy(vocab: int, B: int, T: int) -> Timed:
    logits, target = torch.randn(B * T, vocab, requires_grad=True), torch.randint(vocab, (B * T,))
    return Timed(lambda: F.cross_entropy(logits, target))


def fused_linear_cross_entropy(tokens: int, H: int, V: int, dtype: torch.dtype, mode: str) -> Timed:
    head = nn.Linear(H, V, bias=False, dtype=dtype)
    hidden, target = torch.randn(tokens, H, dtype=dtype, requires_grad=True), torch.randint(V, (tokens,))
    return Timed(lambda: F.cross_entropy(head(hidden), target))


def kl_div(tokens: int, vocab_size: int, reduction: str, **unused) -> Timed:
    """Like the two divergences below, of probabilities that a softmax makes: its backward is in the time."""
    given, target = _logits(tokens, vocab_size).log_softmax(-1), torch.randn(tokens, vocab_size).softmax(-1)
    return Timed(lambda: F.kl_div(given, target, reduction=reduction))


def jsd(tokens: int, vocab_size: int, **unused) -> Timed:
    given, target = _logits(tokens, vocab_size).log_softmax(-1), torch.randn(tokens, vocab_size).log_softmax(-1)

    def forward() -> Tensor:
        mean = torch.lerp(torch.exp(given), torch.exp(target), 0.5)
        one, other = (
            F.kl_div(torch.log(mean), log, reduction="none", log_target=True).sum(-1) for log in (target, given)
        )
        return ((0.5 * one + 0.5 * other) / tokens).sum()

    return Timed(forward)


def jsd_of_vocab(vocab: int, B: int, T: int) -> Timed:
    return jsd(B * T, vocab)


def tvd(vocab: int, B: int, T: int) -> Timed:
    given, target = _logits(B * T, vocab).softmax(-1), torch.randn(B * T, vocab).softmax(-1)
    return Timed(lambda: torch.sum(torch.abs(given - target) / 2.0) / given.size(0))


def preferences(sequences: int, T: int, H: int, V: int, dtype: torch.dtype, mode: str) -> Timed:
    """CPO, ORPO and SimPO: half of the sequences are chosen, the others rejected."""
    head, hidden = nn.Linear(H, V, bias=False, dtype=dtype), _tokens(sequences, T, H, dtype)
    target, chosen = torch.randint(V, (sequences, T)), sequences // 2

    def forward() -> Tensor:
        logits = (hidden @ head.weight.t()).float()
        likely = F.cross_entropy(logits[:chosen].view(-1, V), target[:chosen].view(-1))
        counted = target != -100
        labels = torch.where(target == -100, 0, target)
        each = torch.gather(logits.log_softmax(-1), 2, labels.unsqueeze(2)).squeeze(2)
        mean = (each * counted).sum(-1) / counted.sum(-1)
        return likely - F.logsigmoid(0.1 * (mean[:chosen] - mean[chosen:])).mean()

    return Timed(forward)


def grpo(
    sequences: int,
    T: int,
    importance_sampling_level: str,
    dtype: torch.dtype,
    H: int = 0,
    V: int = 0,
    hidden_size: int = 0,
    vocab_size: int = 0,
    **unused,
) -> Timed:
    """GRPO against a reference head, by token or by sequence."""
    H, V = H or hidden_size, V or vocab_size  # the scripts of 2025 and of 2026
    heads = [nn.Linear(H, V, bias=False, dtype=dtype) for _ in range(2)]
    hidden, reference = _tokens(sequences, T, H, dtype), torch.randn(sequences, T, H, dtype=dtype)
    target, mask = torch.randint(V, (sequences, T)), torch.ones(sequences, T)
    advantage = torch.randn(sequences, dtype=dtype)

    def likelihood(head: nn.Linear, given: Tensor) -> Tensor:
        return F.log_softmax((given @ head.weight.t()).float(), dim=-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)

    def forward() -> Tensor:
        each = likelihood(heads[0], hidden)
        with torch.no_grad():
            expected = likelihood(heads[1], reference)
        ratio = each - each.detach()
        if importance_sampling_level == "sequence":
            ratio = ((ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)
        ratio = torch.exp(ratio)
        loss = -torch.min(*(weight * advantage.unsqueeze(1) for weight in (ratio, torch.clamp(ratio, 0.8, 1.2))))
        loss = loss + 0.1 * (torch.exp(expected - each) - (expected - each) - 1.0)
        return (loss * mask).sum() / mask.sum().clamp(min=1.0)

    return Timed(forward, (hidden,))


def distill_jsd(tokens: int, H: int, V: int, dtype: torch.dtype, **unused) -> Timed:
    """The script's first version, of December 2024: probabilities, whose logarithms it takes."""

    def divergence(student: Tensor, teacher: Tensor) -> Tensor:
        given = [F.softmax(logits / 1.0, dim=-1) for logits in (student, teacher)]
        mean = torch.log((given[0] + given[1]) / 2)
        one, other = (F.kl_div(mean, torch.log(each), reduction="batchmean", log_target=True) for each in given)
        return (one + other) / 2

    return _distilled(tokens, H, V, dtype, divergence)


def distill_cosine(tokens: int, H: int, V: int, dtype: torch.dtype, **unused) -> Timed:
    def distance(student: Tensor, teacher: Tensor) -> Tensor:
        student /= 1.0  # by the temperature
        teacher /= 1.0
        given = [F.normalize(logits, p=2, dim=-1) for logits in (student, teacher)]
        return (1 - F.cosine_similarity(*given, dim=-1)).mean()

    return _distilled(tokens, H, V, dtype, distance)


def _distilled(tokens: int, H: int, V: int, dtype: torch.dtype, soft_loss: Callable[[Tensor, Tensor], Tensor]) -> Timed:
    """A student of half the teacher's width; the loss is half that of the labels, half that of the teacher."""
    student, teacher = nn.Linear(H // 2, V, bias=False, dtype=dtype), nn.Linear(H, V, bias=False, dtype=dtype)
    hidden, taught = torch.rand(tokens, H // 2, dtype=dtype, requires_grad=True), torch.rand(tokens, H, dtype=dtype)
    target = torch.randint(V, (tokens,))

    def forward() -> Tensor:
        logits = (hidden @ student.weight.t()).float()
        with torch.no_grad():
            expected = (taught @ teacher.weight.t()).float()
        return 0.5 * F.cross_entropy(logits, target) + 0.5 * soft_loss(logits, expected)

    return Timed(forward)


def megatron_cross_entropy(vocab: int, S: int, B: int, TP: int) -> Timed:
    logits = torch.randn(S, B, vocab, dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(vocab, (S, B))
    return Timed(lambda: _VocabParallelCrossEntropy.apply(logits, target), (logits,))


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Megatron's loss on one GPU, unfused (megatron/core/tensor_parallel/cross_entropy.py), in place where it is."""

    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor) -> Tensor:
        logits = logits.float()
        logits -= torch.max(logits, dim=-1)[0].unsqueeze(-1)
        outside = (target < 0) | (target >= logits.shape[-1])
        ids = target.clone() - 0
        ids[outside] = 0
        rows, ids = torch.arange(target.numel()), ids.view(-1)
        predicted = logits.view(-1, logits.shape[-1])[rows, ids].clone().view_as(target)
        predicted[outside] = 0.0
        torch.exp(logits, out=logits)
        total = logits.sum(dim=-1)
        loss = torch.log(total) - predicted
        logits.div_(total.unsqueeze(-1))
        ctx.save_for_backward(logits, outside, ids)
        return loss

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        softmax, outside, ids = ctx.saved_tensors
        flat, rows = softmax.view(-1, softmax.shape[-1]), torch.arange(ids.numel())
        flat[rows, ids] -= 1.0 - outside.view(-1).float()
        return softmax.mul_(gradient.unsqueeze(-1)), None


def _logits(tokens: int, vocab: int) -> Tensor:
    return torch.randn(tokens, vocab, requires_grad=True)


def _tokens(sequences: int, T: int, H: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(sequences, T, H, dtype=dtype, requires_grad=True)


LOSSES = {loss.__name__: loss for loss in (
    cross_entropy, fused_linear_cross_entropy, kl_div, jsd, tvd, megatron_cross_entropy,
)}  # fmt: skip
LOSSES |= {f"fused_linear_{name}_loss": preferences for name in ("cpo", "orpo", "simpo")}
LOSSES |= {f"fused_linear_grpo_loss_{level}": grpo for level in ("token", "sequence")}
LOSSES |= {"distill_jsd_loss": distill_jsd, "distill_cosine_loss": distill_cosine}
