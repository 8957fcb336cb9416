"""An encoder-decoder whose attention is chosen place by place: exact, or MemSizer's memory of fixed size.

The model is Hugging Face's Marian, the Transformer of Vaswani et al. (2017, arXiv:1706.03762): norms after the residual
sums, sinusoidal positions, the output tied to the decoder's embeddings. A place is ``encoder``, ``decoder`` or
``cross``. The places named in ``memsizer`` have `MemSizerAttention` (Zhang & Cai 2022, arXiv:2203.12644) instead of
projections for queries, keys, values and output.

``generate`` is Hugging Face's. The cache's layers hold MemSizer's state between tokens: sum and count of the decoder's
tokens, and the summary of the encoder's. The state's size does not depend on the length; beam search reorders it.
"""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, Cache, EncoderDecoderCache, MarianConfig, MarianMTModel
from transformers.cache_utils import CacheLayerMixin

from memstudy.attention import MemSizerConfig
from memstudy.attention.memsizer import MemSizerAttention, MemSizerState
from memstudy.huggingface.decoder import LossInTraining

PLACES = ("encoder", "decoder", "cross")


class Seq2SeqConfig(MarianConfig):
    """A Marian config whose ``memsizer`` maps places to the settings of a `MemSizerConfig`; other places are exact."""

    model_type = "memstudy_encoder_decoder"
    memsizer: dict | None = None
    forced_eos_token_id: int | None = None


class StateLayer(CacheLayerMixin):
    """Decoding state of one MemSizer layer: tensors ``(beams, ...)`` whose size does not depend on the length.

    Attributes
    ----------
    tensors : tuple of torch.Tensor
        Sum and count of a `MemSizerState`, or the encoder's summary; empty before the first token.
    length : int
        Number of tokens summed up in ``tensors``.
    """

    is_sliding = False
    is_croppable = False

    def __init__(self):
        super().__init__()
        self.tensors: tuple[torch.Tensor, ...] = ()
        self.length = 0

    def lazy_initialization(self, key_states, value_states):
        raise NotImplementedError("MemSizer keeps no keys and values")

    update = lazy_initialization

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.tensors = tuple(tensor.index_select(0, beam_idx.to(tensor.device)) for tensor in self.tensors)


class PlacedMemSizer(MemSizerAttention):
    """MemSizer with the call signature of Marian's attention, which it replaces."""

    def __init__(self, hidden_size: int, num_heads: int, config: MemSizerConfig, *, is_causal: bool, layer_idx: int):
        super().__init__(hidden_size, num_heads, config, is_causal=is_causal)
        self.layer_idx = layer_idx

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        attention_mask: torch.Tensor | None = None,
        **_,
    ) -> tuple[torch.Tensor, None]:
        """Attend within the sequence, or to the encoder's outputs; see `MemSizerAttention.forward`.

        Parameters
        ----------
        hidden_states : torch.Tensor
            (batch, seq, hidden_size).
        key_value_states : torch.Tensor, optional
            (batch, source_len, hidden_size), the encoder's outputs.
        past_key_values : EncoderDecoderCache, optional
            State of the earlier tokens; with a cache, tokens are decoded one at a time.
        attention_mask : torch.Tensor, optional
            (batch, key_len) bool, True for a real token.

        Raises
        ------
        ValueError
            For padding among decoded tokens, which the running sum could not leave out.
        """
        if past_key_values is None:
            return super().forward(hidden_states, attention_mask, memory=key_value_states), None
        if key_value_states is not None:
            kept = _kept(past_key_values.cross_attention_cache, self.layer_idx)
            if not kept.tensors:
                kept.tensors = (self.summarise(key_value_states, attention_mask),)
                kept.length = key_value_states.shape[1]
            return self.read(hidden_states, *kept.tensors), None
        if attention_mask is not None and not attention_mask.all():
            raise ValueError(
                "memsizer decodes without padding: give decoder_input_ids of one length, or use_cache=False"
            )
        kept, outputs = _kept(past_key_values.self_attention_cache, self.layer_idx), []
        for token in hidden_states.split(1, 1):
            output, kept.tensors = self.step(token, MemSizerState(*kept.tensors) if kept.tensors else None)
            outputs.append(output)
        kept.length += hidden_states.shape[1]
        return torch.cat(outputs, 1), None


def _kept(cache: Cache, layer_idx: int) -> StateLayer:
    """MemSizer's layer of ``cache``; replaces the layer for keys and values that Hugging Face makes."""
    while len(cache.layers) <= layer_idx:
        cache.layers.append(StateLayer())
    if not isinstance(cache.layers[layer_idx], StateLayer):
        cache.layers[layer_idx] = StateLayer()
    return cache.layers[layer_idx]


def state_bytes(cache: EncoderDecoderCache) -> int:
    """Size of the decoding state [bytes]: keys and values, or MemSizer's sums."""
    layers = [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
    tensors = [t for layer in layers for t in getattr(layer, "tensors", (layer.keys, layer.values)) if t is not None]
    return sum(tensor.nbytes for tensor in tensors)


class Seq2SeqLM(LossInTraining, MarianMTModel):
    """Encoder-decoder language model with the attention that its config names; ``forward`` and outputs are Marian's."""

    config_class = Seq2SeqConfig

    def __init__(self, config: Seq2SeqConfig):
        super().__init__(config)
        self.set_attn_implementation("memstudy_softmax")  # masks are then (batch, key_len), which MemSizer reads too
        placed = {place: MemSizerConfig(**settings) for place, settings in (config.memsizer or {}).items()}
        layers = {"encoder": self.model.encoder.layers, "decoder": self.model.decoder.layers}
        for place, mixer in placed.items():
            for index, layer in enumerate(layers["encoder" if place == "encoder" else "decoder"]):
                name = "encoder_attn" if place == "cross" else "self_attn"
                heads = getattr(layer, name).num_heads
                causal = place == "decoder"
                new = PlacedMemSizer(config.d_model, heads, mixer, is_causal=causal, layer_idx=index)
                setattr(layer, name, new)


AutoConfig.register(Seq2SeqConfig.model_type, Seq2SeqConfig)
AutoModelForSeq2SeqLM.register(Seq2SeqConfig, Seq2SeqLM)
