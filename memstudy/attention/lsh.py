"""Attention among tokens that hash alike (Reformer; Kitaev et al. 2020, arXiv:2001.04451).

Queries and keys are the same vectors, the keys normalised: k_j = q_j / rms(q_j). Each of several rounds hashes every
token into a bucket by random rotations R::

    bucket(x) = argmax([x R; -x R])                                    (section 2; Andoni et al. 2015)

A round sorts the tokens by bucket, then by position, and cuts them into chunks. A token attends to its own chunk and
the chunk before, but to itself only if it sees no other token. The rounds' softmaxes are merged by their log-sum-exps
(appendix A). The first chunk looks back at the last chunk of the round before, as in the authors' code and in
transformers; here at the last chunk with real tokens, so that padding changes nothing. A large number of buckets is
split into two factors, hashed separately with few rotations each, as in transformers.

A round gathers the sorted tokens of a group of chunks, attends to these chunks as one batch, and writes the results
back. Backward recomputes the weights from the scores S, P = exp(S - L): besides the op's inputs only the outputs, the
total log-sum-exps L and the order of each round are kept.

Not implemented: decoding with cached buckets; another number of chunks before or after.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from memstudy.attention.base import AttentionConfig, check_heads, check_inputs, check_padding, in_autocasts_dtype
from memstudy.attention.heads import attend_by_heads
from memstudy.attention.scan import drawing_again, rng_state

EPSILON = 1e-6  # added to the mean square of a vector before its root, as in transformers
LARGEST_FACTOR = 16  # buckets hashed at once; more are a product of two factors
GROUP = 2048  # sorted tokens attended at once: their scratch fits into a core's cache


def lsh_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    num_hashes: int,
    chunk_length: int,
    num_buckets: int | None = None,
    hash_seed: int | None = None,
    is_causal: bool,
    key_padding_mask: torch.Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attend within buckets; see `AttentionConfig.attend` for the tensors and `LSHConfig` for the rest.

    The queries serve as keys; the values of ``key`` are not read. Differentiable once; hashing has no gradient.

    Raises
    ------
    ValueError
        For settings out of range, tensors that don't fit, or unequal numbers of queries and keys.
    """
    config = LSHConfig(num_hashes, chunk_length, num_buckets, hash_seed)
    check_inputs(query, key, value, is_causal=is_causal, key_padding_mask=key_padding_mask)
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"lsh: {query.shape[2]} queries against {key.shape[2]} keys; it attends within one sequence, "
            "so generate with use_cache=False"
        )
    query, value = in_autocasts_dtype(query, value)
    if value.shape[1] < query.shape[1]:
        value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    with torch.autocast(query.device.type, enabled=False):
        kernel = _Rounds(config, is_causal, key_padding_mask, scale, dropout)
        return _Hashed.apply(kernel, query, value)


def hash_buckets(vectors: torch.Tensor, rotations: list[torch.Tensor]) -> torch.Tensor:
    """Hash vectors into buckets, in several rounds.

    Parameters
    ----------
    vectors : torch.Tensor
        (batch, seq, head_dim).
    rotations : list of torch.Tensor
        For each factor of the number of buckets, (num_hashes, factor / 2, head_dim).

    Returns
    -------
    torch.Tensor
        (batch, num_hashes, seq) int32 bucket numbers from 0; without rotations (batch, 1, seq) zeros.
    """
    buckets = vectors.new_zeros(vectors.shape[0], 1, vectors.shape[1], dtype=torch.int32)
    for rotation in rotations:
        half = rotation.shape[1]
        rotated = (rotation.flatten(0, 1) @ vectors.transpose(1, 2)).unflatten(1, (-1, half))
        largest = rotated.abs().max(2, keepdim=True).indices  # (batch, num_hashes, 1, seq)
        negative = rotated.gather(2, largest) < 0
        buckets = buckets * 2 * half + (largest + half * negative).squeeze(2).int()
    return buckets


class _Rounds:
    """Attention in rounds, forward and backward, on queries and values; a `memstudy.attention.heads.Kernel`.

    Works on one head of one sequence at a time: a round's tensors are small then, and its chunks are the batch of
    each product.
    """

    def __init__(self, config, is_causal, key_padding_mask, scale, dropout):
        self.config, self.is_causal, self.key_padding_mask = config, is_causal, key_padding_mask
        self.scale, self.dropout = scale, dropout
        self.generator = None if config.hash_seed is None else torch.Generator().manual_seed(config.hash_seed)

    def forward(self, output, query, value):
        batch, heads, seq, _ = query.shape
        total = query.new_empty(batch, heads, seq, dtype=torch.promote_types(query.dtype, torch.float32))
        # Hash all heads before the first dropout: backward draws the dropout again, but no rotations.
        orders = torch.stack([self._orders(query[:, head]) for head in range(heads)], 1)
        kept = (rng_state(query.device),) if self.dropout else ()
        for head in range(heads):
            for i in range(batch):
                self._attend(i, orders[i, head], query[i, head], value[i, head], output[i, head], total[i, head])
        return total, orders, *kept

    def backward(self, grad_output, output, kept, query, value):
        total, orders, *drawn = kept
        grad_query, grad_value = torch.empty_like(query), torch.empty_like(value)
        with drawing_again(query.device, *drawn) if drawn else nullcontext():
            for head in range(query.shape[1]):
                for i in range(query.shape[0]):
                    at = i, head
                    tensors = (
                        t[at] for t in (orders, query, value, output, total, grad_output, grad_query, grad_value)
                    )
                    self._differentiate(i, *tensors)
        return grad_query, grad_value

    def _orders(self, query: torch.Tensor) -> torch.Tensor:
        """Sort the tokens of one head, query (batch, seq, head_dim), by bucket and position.

        Returns
        -------
        torch.Tensor
            (batch, rounds, seq rounded up to whole chunks) int32 positions, padding last.
        """
        (_, seq, head_dim), config = query.shape, self.config
        shapes = [(config.num_hashes, factor // 2, head_dim) for factor in config.factors(seq)]
        rotations = [torch.randn(shape, generator=self.generator).to(query) for shape in shapes]
        buckets = hash_buckets(query, rotations).expand(-1, config.num_hashes, -1)
        if seq <= config.chunk_length:  # one chunk, the same in each round
            buckets = buckets[:, :1]
        if self.key_padding_mask is not None:
            buckets = buckets.masked_fill(~self.key_padding_mask[:, None], config.buckets(seq))
        buckets = F.pad(buckets, (0, -seq % config.chunk_length), value=config.buckets(seq))
        return buckets.argsort(dim=-1, stable=True).int()

    def _groups(self, i: int, orders: torch.Tensor, number: int, seq: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield the queries and keys of round ``number`` of sequence ``i``, some chunks at a time.

        Yields
        ------
        order, extended : torch.Tensor
            Positions of the sorted tokens, (group,); ``extended`` starts with the chunk before the group.
        hidden : torch.Tensor
            (chunks, chunk_length, keys of a chunk) bool, True for a key that the query doesn't see.
        """
        chunk, order = self.config.chunk_length, orders[number].long()
        length, positions = len(order), torch.arange(len(order), device=order.device)
        places = positions.masked_fill(positions >= seq, length)  # padding comes after every token
        tokens = positions[seq - 1] + 1
        if self.key_padding_mask is not None:
            real = self.key_padding_mask[i]
            places[:seq].masked_fill_(~real, length)
            tokens = real.sum()
        extended, back = order, 0
        if length > chunk:
            last = (tokens - 1).clamp(min=0) // chunk * chunk
            extended = torch.cat([orders[number - 1].index_select(0, last + positions[:chunk]).long(), order])
            back = chunk
        size = max(1, GROUP // chunk) * chunk
        for queries, keys in zip(order.split(size), _overlapping(extended, size, back), strict=True):
            seen = places.index_select(0, keys).unfold(0, chunk + back, chunk)[:, None]
            own = queries.view(-1, chunk, 1)
            yield queries, keys, seen >= own if self.is_causal else (seen == own) | (seen == length)

    def _attend(self, i, orders, query, value, output, total):
        """Write the output of one head of sequence ``i`` and its log-sum-exps, inf for a token that sees no other."""
        (seq, dim), (rounds, length), chunk = query.shape, orders.shape, self.config.chunk_length
        inverse_rms = _inverse_rms(query)
        table = _rows(length, query * inverse_rms, value)
        factors = _rows(length, self._scale(query) / inverse_rms)
        lowest = torch.finfo(query.dtype).min / 2
        merged, sums = table.new_empty(length, dim, dtype=total.dtype), total.new_empty(length)
        for number in range(rounds):
            for order, extended, hidden in self._groups(i, orders, number, seq):
                rows = table.index_select(0, extended)
                windows = rows.unfold(0, hidden.shape[-1], chunk)  # (chunks, 2 * head_dim, keys)
                queries = (rows[-len(order) :, :dim] * factors.index_select(0, order)).view(-1, chunk, dim)
                # Not in place: selective checkpointing may be keeping the product.
                scores = torch.bmm(queries, windows[:, :dim]).masked_fill(hidden, lowest)
                weights = scores.softmax(-1, dtype=total.dtype)
                found = (scores.amax(-1) - weights.amax(-1).log()).view(-1)  # the log-sum-exps
                if self.dropout:
                    weights.mul_(self._dropout(weights))
                context = torch.bmm(weights.to(value.dtype), windows[:, dim:].transpose(1, 2))
                context = context.view(-1, dim).to(total.dtype)
                if number:
                    before = sums.index_select(0, order)
                    both = torch.logaddexp(before, found)
                    context = context * (found - both).exp_()[:, None]
                    context += merged.index_select(0, order).mul_((before - both).exp_()[:, None])
                    found = both
                merged.index_copy_(0, order, context)
                sums.index_copy_(0, order, found)
        total.copy_(sums[:seq])
        alone = total < lowest / 2
        total.masked_fill_(alone, torch.inf)
        output.copy_(merged[:seq]).masked_fill_(alone[:, None], 0.0).add_(value * self._own(i, alone, value))

    def _own(self, i: int, alone: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Each token's weight for itself, (seq, 1): nonzero only for a real token that sees no other."""
        own = (alone if self.key_padding_mask is None else alone & self.key_padding_mask[i])[:, None].to(value.dtype)
        return own * self._dropout(own) if self.dropout else own

    def _dropout(self, like: torch.Tensor) -> torch.Tensor:
        """Factors on the weights: 0 for a dropped weight, 1 / (1 - dropout) for the others."""
        return torch.empty_like(like).bernoulli_(1 - self.dropout).div_(1 - self.dropout)

    def _scale(self, query: torch.Tensor) -> float:
        return query.shape[-1] ** -0.5 if self.scale is None else self.scale

    def _differentiate(self, i, orders, query, value, output, total, grad_output, grad_query, grad_value):
        """Write the gradients of one head of sequence ``i``."""
        (seq, dim), (rounds, length), chunk = query.shape, orders.shape, self.config.chunk_length
        inverse_rms, scale = _inverse_rms(query), self._scale(query)
        table = _rows(length, query * inverse_rms, value, grad_output)
        # rowsum(weights * grad_weights) = rowsum(grad * output), as in any softmax's backward, but not for lone tokens.
        rowsum = (grad_output.to(total.dtype) * output).sum(-1)
        numbers = _rows(length, (scale / inverse_rms).to(total.dtype), total[:, None], rowsum[:, None])
        grads = table.new_zeros(length, 3 * dim, dtype=total.dtype)  # of query, unit key, value
        for number in range(rounds):
            for order, extended, hidden in self._groups(i, orders, number, seq):
                rows = table.index_select(0, extended)
                windows = rows.unfold(0, hidden.shape[-1], chunk)  # (chunks, 3 * head_dim, keys)
                factors, sums, rowsums = numbers.index_select(0, order).view(-1, chunk, 3, 1).unbind(2)
                queries = rows[-len(order) :, :dim].view(-1, chunk, dim) * factors.to(query.dtype)
                grad = rows[-len(order) :, 2 * dim :].view(-1, chunk, dim)
                weights = torch.bmm(queries, windows[:, :dim]).to(total.dtype)
                weights = used = weights.sub_(sums).exp_().masked_fill_(hidden, 0.0)
                grad_weights = torch.bmm(grad, windows[:, dim : 2 * dim]).to(total.dtype)
                if self.dropout:
                    dropout = self._dropout(weights)
                    used = weights * dropout
                    grad_weights.mul_(dropout)
                grad_scores = grad_weights.sub_(rowsums).mul_(weights).to(query.dtype)
                of_queries = torch.bmm(grad_scores, windows[:, :dim].transpose(1, 2)).mul_(scale)
                of_keys = torch.bmm(grad_scores.transpose(1, 2), queries)
                of_values = torch.bmm(used.to(value.dtype).transpose(1, 2), grad)
                parts = [of_queries, of_keys[:, -chunk:], of_values[:, -chunk:]]
                if len(extended) > len(order):  # each chunk is also seen by the next; ``back`` lies before the group
                    for own, of_both in zip(parts[1:], (of_keys, of_values), strict=True):
                        own[:-1] += of_both[1:, :chunk]
                    back = torch.cat([of_keys[0, :chunk], of_values[0, :chunk]], -1).to(grads.dtype)
                    grads[:, dim:].index_add_(0, extended[:chunk], back)
                added = grads.index_select(0, order).add_(torch.cat(parts, -1).view(-1, 3 * dim))
                grads.index_copy_(0, order, added)
        of_query, of_unit, of_value = grads[:seq].split(dim, -1)
        along = (of_unit * query).sum(-1, keepdim=True) * inverse_rms**3 / dim
        grad_query.copy_(of_query + of_unit * inverse_rms - along * query)
        grad_value.copy_(of_value + grad_output * self._own(i, total.isinf(), value))


def _overlapping(extended: torch.Tensor, size: int, back: int) -> Iterator[torch.Tensor]:
    """Cut into pieces of ``size``, each with the ``back`` elements before it."""
    for start in range(back, len(extended), size):
        yield extended[start - back : start + size]


def _inverse_rms(query: torch.Tensor) -> torch.Tensor:
    """1 / rms of each vector, (..., 1)."""
    return (query.square().mean(-1, keepdim=True) + EPSILON).rsqrt()


def _rows(length: int, *columns: torch.Tensor) -> torch.Tensor:
    """Put (seq, ...) tensors side by side, with rows of zeros up to ``length``."""
    table = torch.cat(columns, -1)
    return F.pad(table, (0, 0, 0, length - len(table))) if len(table) < length else table


class _Hashed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rounds, query, value):
        output = torch.empty_like(value)
        kept = rounds.forward(output, query, value)
        ctx.rounds = rounds
        ctx.save_for_backward(query, value, output, *kept)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        query, value, output, *kept = ctx.saved_tensors
        with torch.autocast(query.device.type, enabled=False):
            return None, *ctx.rounds.backward(grad_output, output, kept, query, value)


class LSHAttention(nn.Module):
    """LSH attention with its three projections: of queries and keys, of values, of the output.

    Parameters as in `memstudy.attention.SelfAttention`. Keeps its input, the heads' outputs, a log-sum-exp for each
    query and the token order of each round; with one or two rounds also queries and values.
    """

    def __init__(self, hidden_size: int, num_heads: int, config: "LSHConfig", *, is_causal: bool) -> None:
        super().__init__()
        check_heads(hidden_size, num_heads)
        self.num_heads, self.config, self.is_causal = num_heads, config, is_causal
        self.qk_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.o_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor, key_padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Attend within each sequence; tensors as in `memstudy.attention.SelfAttention.forward`."""
        check_padding(key_padding_mask, hidden_states.shape[:2])
        kernel = _Rounds(self.config, self.is_causal, key_padding_mask, None, 0.0)
        return attend_by_heads(
            kernel,
            hidden_states,
            (self.qk_proj, self.v_proj),
            self.o_proj,
            heads=self.num_heads,
            at_once=1,
            recompute=self.config.recompute,
        )


@dataclass(frozen=True)
class LSHConfig(AttentionConfig):
    """Attention among tokens that hash alike.

    Parameters
    ----------
    num_hashes : int
        Rounds of hashing.
    chunk_length : int [tokens]
        Length of a chunk; a sequence of one chunk is attended to as a whole.
    num_buckets : int, optional
        A power of two; by default the largest with half a chunk or more in an average bucket.
    hash_seed : int, optional
        Seed that draws the same rotations at each call; by default torch's generator draws new ones.
    """

    num_hashes: int = 8
    chunk_length: int = 64
    num_buckets: int | None = None
    hash_seed: int | None = None

    name: ClassVar[str] = "lsh"
    paper: ClassVar[str] = "Kitaev et al. 2020, arXiv:2001.04451"
    causal: ClassVar[tuple[bool, ...]] = (False, True)
    parameter_free: ClassVar[bool] = True
    module: ClassVar[type[nn.Module]] = LSHAttention

    def __post_init__(self) -> None:
        for name in ("num_hashes", "chunk_length"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"lsh: {name}={value}; take at least 1")
        if self.num_buckets is not None and (self.num_buckets < 1 or self.num_buckets & (self.num_buckets - 1)):
            raise ValueError(f"lsh: num_buckets={self.num_buckets}; take a power of two")

    def buckets(self, seq: int) -> int:
        """Number of buckets for a sequence of ``seq`` tokens."""
        if self.num_buckets is not None:
            return self.num_buckets
        return 1 << (max(1, 2 * seq // self.chunk_length).bit_length() - 1)

    @property
    def recompute(self) -> bool:
        """Whether the layer projects again in backward; with one or two rounds that costs too much of the time."""
        return self.num_hashes > 2

    def factors(self, seq: int) -> list[int]:
        """Factors of the number of buckets, which are hashed separately; none for one bucket."""
        power = self.buckets(seq).bit_length() - 1
        if 2**power <= LARGEST_FACTOR:
            return [2**power] if power else []
        return [2 ** (power // 2), 2 ** (power - power // 2)]

    def attend(self, query, key, value, **options) -> torch.Tensor:
        return lsh_attention(query, key, value, **asdict(self), **options)

    def saved_elements(self, batch: int, heads: int, seq: int, head_dim: int, *, is_causal: bool = True) -> int:
        chunks = -(-seq // self.chunk_length)
        orders = (self.num_hashes if chunks > 1 else 1) * chunks * self.chunk_length
        tensors = 2 if self.recompute else 4  # input and heads' outputs; queries and values
        return batch * heads * (tensors * seq * head_dim + seq + orders)  # log-sum-exps, each round's order
