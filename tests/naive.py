"""The definitions, as loops: what the ops in `memstudy.attention` are tested against.

Transcribed from the papers, one query at a time; slow, readable, sharing nothing with the package.
All take query (batch, heads, query_len, head_dim), key and value (batch, kv_heads, key_len,
head_dim), and give (batch, heads, query_len, head_dim).
"""

import math

import torch


def _attend(query, key, value, *, sees, key_padding_mask, scale):
    """Softmax over the keys j with ``sees(i, j)``, i being the query's position among the keys."""
    batch, heads, query_len, head_dim = query.shape
    key_len = key.shape[2]
    heads_per_key = heads // key.shape[1]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    output = []
    for b in range(batch):
        for h in range(heads):
            for row in range(query_len):
                i = row + key_len - query_len
                scores, values = [], []
                for j in range(key_len):
                    real = key_padding_mask is None or key_padding_mask[b, j]
                    if real and sees(i, j):
                        k = key[b, h // heads_per_key, j]
                        scores.append((query[b, h, row] * k).sum() * scale)
                        values.append(value[b, h // heads_per_key, j])
                if scores:
                    exponentials = torch.stack(scores).exp()
                    weights = exponentials / exponentials.sum()
                    output.append((weights[:, None] * torch.stack(values)).sum(0))
                else:
                    output.append(0 * query[b, h, row])
    return torch.stack(output).view(batch, heads, query_len, head_dim)


def softmax(query, key, value, *, is_causal, key_padding_mask=None, scale=None, **_):
    """Vaswani et al. 2017, equation 1; causal: section 3.2.3."""

    def sees(i, j):
        return j <= i or not is_causal

    return _attend(query, key, value, sees=sees, key_padding_mask=key_padding_mask, scale=scale)


def window(query, key, value, *, window, is_causal, key_padding_mask=None, scale=None, **_):
    """Causal: Jiang et al. 2023, section 2; bidirectional: Beltagy et al. 2020, section 3.1."""

    def sees(i, j):
        return i - window < j <= i if is_causal else -window < i - j < window

    return _attend(query, key, value, sees=sees, key_padding_mask=key_padding_mask, scale=scale)
