"""Definitions as loops, against which the attention ops and the caching allocator of the package are tested.

They are slow and readable, and share no code with the package. The ops are transcribed from the papers, one
query at a time. All take query (batch, heads, query_len, head_dim), key and value (batch, kv_heads, key_len,
head_dim), and give (batch, heads, query_len, head_dim).
"""

import math

import torch


def _attend(query, key, value, *, sees, key_padding_mask, scale):
    """Softmax over the keys j with ``sees(i, j)``, where i is the query's position among the keys."""
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


def window(query, key, value, *, window, is_causal, chunked=False, key_padding_mask=None, scale=None, **_):
    """Causal: Jiang et al. 2023, section 2; bidirectional: Beltagy et al. 2020, 3.1; chunked: Reformer's code."""

    def sees(i, j):
        if chunked:
            return j <= i and i // window - j // window <= 1 if is_causal else abs(i // window - j // window) <= 1
        return i - window < j <= i if is_causal else -window < i - j < window

    return _attend(query, key, value, sees=sees, key_padding_mask=key_padding_mask, scale=scale)


def linformer(query, key, value, *, weights, is_causal, key_padding_mask=None, scale=None, **_):
    """Wang et al. 2020, equation 7, with E and F shared by all heads; padded tokens add nothing to a mixture."""
    batch, kv_heads, key_len, head_dim = key.shape
    rank = len(weights.key)
    mixtures = []
    for matrix, tokens in ((weights.key, key), (weights.value, value)):
        mixed = []
        for b in range(batch):
            for h in range(kv_heads):
                for r in range(rank):
                    total = torch.zeros(head_dim, dtype=key.dtype)
                    for j in range(key_len):
                        if key_padding_mask is None or key_padding_mask[b, j]:
                            total = total + matrix[r, j] * tokens[b, h, j]
                    mixed.append(total)
        mixtures.append(torch.stack(mixed).view(batch, kv_heads, rank, head_dim))
    return _attend(query, *mixtures, sees=lambda i, j: True, key_padding_mask=None, scale=scale)


def lowrank(query, key, value, **options):
    """Exact attention: only the layer's projections have low rank."""
    return softmax(query, key, value, **options)


def nystrom(query, key, value, *, landmarks, iterations, is_causal, key_padding_mask=None, scale=None, **_):
    """Xiong et al. 2021, equations 11 and 13; exact if there are no more tokens than landmarks."""
    batch, heads, _, head_dim = query.shape
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    output = []
    for b in range(batch):
        real = [j for j in range(key.shape[2]) if key_padding_mask is None or key_padding_mask[b, j]]
        if len(real) <= landmarks:
            mask = None if key_padding_mask is None else key_padding_mask[b : b + 1]
            one = (t[b : b + 1] for t in (query, key, value))
            output.append(softmax(*one, is_causal=False, key_padding_mask=mask, scale=scale)[0])
            continue
        for h in range(heads):
            g = h // (heads // key.shape[1])
            query_means, key_means = [], []
            for segment in range(landmarks):
                members = [j for place, j in enumerate(real) if place * landmarks // len(real) == segment]
                query_means.append(sum(query[b, h, j] for j in members) / len(members))
                key_means.append(sum(key[b, g, j] for j in members) / len(members))
            query_means, key_means = torch.stack(query_means), torch.stack(key_means)
            first = (scale * query[b, h] @ key_means.T).softmax(-1)
            kernel = (scale * query_means @ key_means.T).softmax(-1)
            last = (scale * query_means @ key[b, g, real].T).softmax(-1)
            z = kernel.T / (kernel.abs().sum(0).max() * kernel.abs().sum(1).max())
            identity = torch.eye(landmarks, dtype=kernel.dtype)
            for _ in range(iterations):
                az = kernel @ z
                z = z @ (13 * identity - az @ (15 * identity - az @ (7 * identity - az))) / 4
            output.append((first @ z @ last @ value[b, g, real])[None])
    return torch.cat(output).view(query.shape)


def lsh_orders(vectors, *, num_hashes, chunk_length, num_buckets, hash_seed, key_padding_mask=None, **_):
    """Kitaev et al. 2020, section 2: for each sequence and head, each round's tokens in chunks, filled up with None.

    Rotations are drawn head by head; within a head, the first factor of the number of buckets comes first.
    """
    batch, heads, seq, dim = vectors.shape
    if num_buckets is None:
        num_buckets = 1
        while 2 * num_buckets <= 2 * seq // chunk_length:
            num_buckets *= 2
    factors = [num_buckets]
    if num_buckets > 16:
        first = 2 ** (int(math.log2(num_buckets)) // 2)
        factors = [first, num_buckets // first]
    generator = torch.Generator().manual_seed(hash_seed)
    orders = {}
    for h in range(heads):
        rotations = [torch.randn(num_hashes, f // 2, dim, generator=generator) for f in factors if f > 1]
        for b in range(batch):
            for r in range(num_hashes if seq > chunk_length else 1):
                tokens = []
                for i in range(seq):
                    bucket = 0
                    for rotation in rotations:
                        rotated = [(row.to(vectors.dtype) * vectors[b, h, i]).sum().item() for row in rotation[r]]
                        both = rotated + [-x for x in rotated]
                        bucket = bucket * len(both) + both.index(max(both))
                    padding = key_padding_mask is not None and not key_padding_mask[b, i]
                    tokens.append((padding, 0 if padding else bucket, i))
                order = [i for _, _, i in sorted(tokens)]
                order += [None] * (-len(order) % chunk_length)
                chunks = [order[at : at + chunk_length] for at in range(0, len(order), chunk_length)]
                orders.setdefault((b, h), []).append(chunks)
    return orders


def lsh(query, key, value, *, is_causal, key_padding_mask=None, scale=None, orders=None, **settings):
    """Kitaev et al. 2020, section 2 and appendix A; keys are the queries, scaled to a root mean square of one."""
    batch, heads, seq, dim = query.shape
    heads_per_value = heads // value.shape[1]
    scale = 1 / math.sqrt(dim) if scale is None else scale
    orders = orders or lsh_orders(query, key_padding_mask=key_padding_mask, **settings)

    def real(b, i):
        return i is not None and (key_padding_mask is None or bool(key_padding_mask[b, i]))

    rows = {}
    for (b, h), rounds in orders.items():
        seen = {i: [] for i in range(seq)}  # each token's keys, once for each round that shows them
        for r, chunks in enumerate(rounds):
            last = max([c for c, chunk in enumerate(rounds[r - 1]) if any(real(b, i) for i in chunk)], default=0)
            for c, chunk in enumerate(chunks):
                before = chunks[c - 1] if c else rounds[r - 1][last] if len(chunks) > 1 else []
                for i in chunk:
                    for j in before + chunk:
                        if i is not None and real(b, j) and (j < i if is_causal else j != i):
                            seen[i].append(j)
        units = [x / ((x**2).sum() / dim + 1e-6).sqrt() for x in query[b, h]]
        for i, keys in seen.items():
            v = value[b, h // heads_per_value]
            if keys:
                exponentials = torch.stack([(query[b, h, i] * units[j]).sum() * scale for j in keys]).exp()
                weights = exponentials / exponentials.sum()
                rows[b, h, i] = (weights[:, None] * torch.stack([v[j] for j in keys])).sum(0)
            else:
                rows[b, h, i] = v[i] if real(b, i) else 0 * v[i]
    output = [rows[b, h, i] for b in range(batch) for h in range(heads) for i in range(seq)]
    return torch.stack(output).view(batch, heads, seq, dim)


def performer(query, key, value, *, weights, is_causal, key_padding_mask=None, scale=None, **_):
    """Choromanski et al. 2021, equations 4-5 with the features of lemma 1."""
    batch, heads, query_len, head_dim = query.shape
    key_len, heads_per_key = key.shape[2], heads // key.shape[1]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale

    def phi(x):
        x = x * math.sqrt(scale)
        return torch.stack([torch.exp((w.to(x.dtype) * x).sum() - (x * x).sum() / 2) for w in weights.features])

    phi_query, phi_key = ([[[phi(x) for x in head] for head in tokens] for tokens in t] for t in (query, key))
    output = []
    for b in range(batch):
        for h in range(heads):
            for row in range(query_len):
                i = row + key_len - query_len
                numerator, denominator = 0 * query[b, h, row], 0
                for j in range(key_len):
                    if (key_padding_mask is None or key_padding_mask[b, j]) and (j <= i or not is_causal):
                        weight = (phi_query[b][h][row] * phi_key[b][h // heads_per_key][j]).sum()
                        numerator = numerator + weight * value[b, h // heads_per_key, j]
                        denominator = denominator + weight
                output.append(numerator / denominator if torch.is_tensor(denominator) else numerator)
    return torch.stack(output).view(batch, heads, query_len, head_dim)


def memsizer(queries, memory, weights, *, heads, is_causal, key_padding_mask=None):
    """Zhang & Cai 2022, section 3; queries, memory and result are (batch, seq, hidden).

    ``weights`` are Φ, W_l and W_r, each (matrix, bias), and the two normalisations, each (factor, shift).
    """
    (phi, phi_bias), (left, left_bias), (right, right_bias), of_key, of_value = weights

    def normalise(x, factor, shift):
        mean = x.sum() / len(x)
        variance = ((x - mean) ** 2).sum() / len(x)
        return (x - mean) / (variance + 1e-5).sqrt() * factor + shift

    output = []
    for b in range(len(queries)):
        for t in range(queries.shape[1]):
            total, count = torch.zeros(len(left), queries.shape[2], dtype=queries.dtype), 0
            for s in range(t + 1 if is_causal else memory.shape[1]):
                if key_padding_mask is None or key_padding_mask[b, s]:
                    key = normalise(left @ memory[b, s] + left_bias, *of_key)
                    value = normalise(right @ memory[b, s] + right_bias, *of_value)
                    total = total + key[:, None] * value
                    count = count + 1
            logits = phi @ queries[b, t] + phi_bias
            a = 0
            for head in logits.view(heads, -1):
                a = a + head.exp() / head.exp().sum() / heads
            output.append(a @ total / math.sqrt(max(count, 1)))
    return torch.stack(output).view_as(queries)


class PlainAllocator:
    """PyTorch's default caching allocator: segments as gapless lists of ``[offset, size, name or None]``.

    Each new segment is assumed to lie behind all earlier ones.
    """

    def __init__(self, capacity=math.inf):
        self.segments = []  # (whether small, its pieces)
        self.capacity, self.refused = capacity, []

    @property
    def allocated(self):
        return sum(size for _, pieces in self.segments for _, size, name in pieces if name is not None)

    @property
    def reserved(self):
        return sum(size for _, pieces in self.segments for _, size, _ in pieces)

    def malloc(self, name, requested):
        size = 512
        while size < requested:
            size += 512
        small = size <= 2**20
        place = self.best_fit(small, size)
        if place is None:
            length = 2 * 2**20 if small else 20 * 2**20
            if size >= 10 * 2**20:
                length = 10 * 2**20
                while length < size:
                    length += 2 * 2**20
            if self.reserved + length > self.capacity:
                self.empty_cache()
                if self.reserved + length > self.capacity:
                    self.refused.append(size)
            self.segments.append((small, [[0, length, None]]))
            place = self.best_fit(small, size)
        _, pieces = self.segments[place[0]]
        piece = pieces[place[1]]
        rest = piece[1] - size
        if rest >= 512 if small else rest > 2**20:
            pieces.insert(place[1] + 1, [piece[0] + size, rest, None])
            piece[1] = size
        piece[2] = name
        return piece[1]

    def best_fit(self, small, size):
        fits = [
            (piece[1], number, place)
            for number, (kind, pieces) in enumerate(self.segments)
            for place, piece in enumerate(pieces)
            if kind == small and piece[2] is None and piece[1] >= size
        ]
        return min(fits)[1:] if fits else None

    def free(self, name):
        for _, pieces in self.segments:
            for piece in pieces:
                if piece[2] == name:
                    piece[2] = None
            for place in reversed(range(len(pieces) - 1)):
                if pieces[place][2] is None and pieces[place + 1][2] is None:
                    pieces[place][1] += pieces.pop(place + 1)[1]

    def empty_cache(self):
        self.segments = [(kind, p) for kind, p in self.segments if any(name is not None for _, _, name in p)]


class ExpandableAllocator:
    """PyTorch's caching allocator with expandable segments: each pool's addresses in use, and its mapped granules."""

    def __init__(self, capacity=math.inf):
        self.used = {True: {}, False: {}}  # {name: (start, end)}; True is the pool of small blocks
        self.mapped = {True: set(), False: set()}  # numbers of the mapped granules
        self.granule = {True: 2 * 2**20, False: 20 * 2**20}
        self.capacity, self.refused = capacity, []

    @property
    def allocated(self):
        return sum(end - start for pool in self.used.values() for start, end in pool.values())

    @property
    def reserved(self):
        return sum(len(self.mapped[small]) * self.granule[small] for small in (True, False))

    def gaps(self, small):
        """Addresses without a block, as ``(start, end)``, lowest first; the last gap ends at 200 granules."""
        start = 0
        for used in sorted(self.used[small].values()):
            if start < used[0]:
                yield start, used[0]
            start = used[1]
        yield start, 200 * self.granule[small]

    def touched(self, small, start, end):
        return range(start // self.granule[small], -(-end // self.granule[small]))

    def free_memory(self, small):
        """Mapped parts of the gaps, as ``(size, start, size including the unmapped addresses behind)``."""
        granule = self.granule[small]
        for start, end in self.gaps(small):
            runs = []
            for number in self.touched(small, start, end):
                mapped, following = number in self.mapped[small], min(end, (number + 1) * granule)
                if runs and runs[-1][0] == mapped:
                    runs[-1][2] = following
                else:
                    runs.append([mapped, max(start, number * granule), following])
            for (mapped, first, last), behind in zip(runs, [*runs[1:], [False, 0, 0]], strict=True):
                if mapped:
                    yield last - first, first, last - first + behind[2] - behind[1]

    def malloc(self, name, requested):
        size = 512
        while size < requested:
            size += 512
        small = size <= 2**20
        fits = sorted(free for free in self.free_memory(small) if free[0] >= size)
        while len(fits) > 1 and fits[1][2] < fits[0][2]:
            fits.pop(0)
        start = fits[0][1] if fits else self.map(small, size)
        self.used[small][name] = start, start + size
        return size

    def map(self, small, size):
        for attempt in ("as it is", "with all that is cached given back", "beyond the capacity"):
            start = next(
                start
                for start, end in self.gaps(small)
                if end - start >= size and not self.mapped[small].issuperset(self.touched(small, start, end))
            )
            missing = set(self.touched(small, start, start + size)) - self.mapped[small]
            if self.reserved + len(missing) * self.granule[small] <= self.capacity:
                break
            if attempt == "as it is":
                self.empty_cache()
            elif attempt == "with all that is cached given back":
                self.refused.append(size)
        self.mapped[small] |= missing
        return start

    def free(self, name):
        for pool in self.used.values():
            pool.pop(name, None)

    def empty_cache(self):
        for small, pool in self.used.items():
            self.mapped[small] = {
                number for start, end in pool.values() for number in self.touched(small, start, end)
            } & self.mapped[small]
