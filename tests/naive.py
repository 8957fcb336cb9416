"""The definitions, as loops: what the ops in `memstudy.attention` and its allocator are tested against.

Slow, readable, sharing nothing with the package. The ops are transcribed from the papers, one query at a time.
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


class PlainAllocator:
    """PyTorch's caching allocator by default: segments as lists of ``[offset, size, name or None]`` without gaps.

    Where nothing is said of addresses, a segment lies behind all that were made before it.
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
    """The same with expandable segments: of each pool's addresses, which are in use and which have memory."""

    def __init__(self, capacity=math.inf):
        self.used = {True: {}, False: {}}  # by whether the pool is the small one: {name: (start, end)}
        self.mapped = {True: set(), False: set()}  # numbers of granules
        self.granule = {True: 2 * 2**20, False: 20 * 2**20}
        self.capacity, self.refused = capacity, []

    @property
    def allocated(self):
        return sum(end - start for pool in self.used.values() for start, end in pool.values())

    @property
    def reserved(self):
        return sum(len(self.mapped[small]) * self.granule[small] for small in (True, False))

    def gaps(self, small):
        """Addresses that no block has, as ``(start, end)``, lowest first; they end at 200 granules."""
        start = 0
        for used in sorted(self.used[small].values()):
            if start < used[0]:
                yield start, used[0]
            start = used[1]
        yield start, 200 * self.granule[small]

    def touched(self, small, start, end):
        return range(start // self.granule[small], -(-end // self.granule[small]))

    def free_memory(self, small):
        """What of the gaps is mapped, as ``(size, start, size with the unmapped addresses behind)``."""
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
