"""Caches of quantised keys and values; that of optimum-quanto by its rules, so the package is not needed.

optimum-quanto 0.2.7 without its compiled extension: ``tensor/optimizers/max_optimizer.py``, ``library/quantize.py``,
``tensor/packed.py``, ``library/unpack.py`` and ``tensor/qbits.py``, each of whose tensors is made here. Groups of
elements that follow one another in memory share a scale and a shift in the dtype of the states.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from transformers import Cache, PretrainedConfig
from transformers.cache_utils import Fp8QuantizedLayer, QuantizedLayer, get_layer_types_and_kwargs


class QuantoLayer(QuantizedLayer):
    """As ``QuantoQuantizedLayer`` of transformers, at its default axis, group size and residual length."""

    def _quantize(self, tensor: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor, torch.Size]:
        if tensor.numel() % self.q_group_size:
            raise ValueError(
                f"cache quanto{self.nbits}: {tensor.numel():,} elements of keys are no multiple of the "
                f"{self.q_group_size} that share a scale: take another batch or prompt"
            )
        grouped = tensor.reshape(-1, self.q_group_size)
        least, most = grouped.amin(1, keepdim=True), grouped.amax(1, keepdim=True)
        scale, shift = (most - least) / (2**self.nbits - 1), -least
        del least, most
        rounded = torch.round((grouped + shift) / scale)
        whole = torch.clamp(rounded, 0, 2**self.nbits - 1).to(torch.uint8)
        del rounded
        rows = -(-len(whole) * self.nbits // 8)
        packed = torch.zeros(rows, self.q_group_size, dtype=torch.uint8, device=tensor.device)
        for place, part in enumerate(whole.split(rows)):
            packed[: len(part)] |= part << self.nbits * place
        return packed, scale, shift, tensor.shape

    def _dequantize(self, q_tensor: tuple[Tensor, Tensor, Tensor, torch.Size]) -> Tensor:
        packed, scale, shift, shape = q_tensor
        mask = 2**self.nbits - 1
        parts = [(packed & mask << at) >> at for at in range(0, 8, self.nbits)]
        whole = torch.cat(parts)
        del parts
        states = scale * whole[: len(scale)]
        states -= shift
        return states.reshape(shape)


def quantised_cache(config: PretrainedConfig, kind: str) -> Cache:
    """An empty cache of ``kind`` (fp8, quanto4 or quanto2) for a model of ``config``, as ``QuantizedCache`` is one.

    Raises
    ------
    ValueError
        For layers of another kind than full attention, which ``QuantizedCache`` refuses.
    """
    text = config.get_text_config(decoder=True)
    others = set(get_layer_types_and_kwargs(text)[0]) - {"full_attention"}
    if others:
        raise ValueError(
            f"cache {kind}: is for full attention alone, and the model has {', '.join(sorted(others))}: take growing"
        )
    made = Fp8QuantizedLayer if kind == "fp8" else partial(QuantoLayer, nbits=int(kind.removeprefix("quanto")))
    return Cache(layers=[made() for _ in range(text.num_hidden_layers)])
