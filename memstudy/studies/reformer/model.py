"""Reformer (Kitaev et al. 2020, arXiv:2001.04451): a language model with reversible layers.

A layer maps two streams to two (section 3; Gomez et al. 2017, arXiv:1707.04585)::

    y1 = x1 + attention(x2)          y2 = x2 + feed_forward(y1)

Its inputs follow from its outputs: x2 = y2 - feed_forward(y1) and x1 = y1 - attention(x2). Only the last layer's
outputs are kept; backward goes through the layers in reverse, restores each layer's inputs and recomputes the layer.
Operations on single tokens run on one piece of the sequence at a time, in backward too (chunking, section 3).

Parameters, embeddings and head are those of transformers' ``ReformerModelWithLMHead``, whose checkpoints load; the
layers run here, on memstudy's `lsh` and chunked `window` attention. With ``exact`` every token attends to all tokens
before it instead; without ``reversible`` autograd keeps each layer's activations. So the two savings can be told apart.

Not implemented: decoding with cached buckets and states (generate with ``use_cache=False``); non-causal layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, ReformerConfig, ReformerModelWithLMHead
from transformers.models.reformer.modeling_reformer import (
    LSHSelfAttention,
    ReformerEncoder,
    ReformerEncoderOutput,
    ReformerLayer,
)

from memstudy.attention import AttentionConfig, LSHConfig, SoftmaxConfig, WindowConfig
from memstudy.huggingface.decoder import LossInTraining

TOKENS = 2048  # in one piece for operations on single tokens: norms, projections, feed-forward


class ReversibleConfig(ReformerConfig):
    """A Reformer config that also says whether attention is exact, and whether layers are reversible.

    ``exact`` needs ``attn_layers`` that are all ``local``, since LSH layers share queries and keys.
    """

    model_type = "memstudy_reformer"
    exact: bool = False
    reversible: bool = True
    is_decoder: bool = True
    use_cache: bool = False


class ReformerLM(LossInTraining, ReformerModelWithLMHead):
    """Causal language model whose layers are run by `Encoder`."""

    config_class = ReversibleConfig

    def __init__(self, config: ReversibleConfig):
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # transformers would guess it from the class name and warn
        self.reformer.encoder = Encoder(self.reformer.encoder, config)


AutoConfig.register(ReversibleConfig.model_type, ReversibleConfig)
AutoModelForCausalLM.register(ReversibleConfig, ReformerLM)


class Encoder(nn.Module):
    """The layers of ``encoder``, run on memstudy's attention, and its last norm over both streams."""

    def __init__(self, encoder: ReformerEncoder, config: ReversibleConfig):
        super().__init__()
        self.config = config
        self.layers, self.layer_norm = encoder.layers, encoder.layer_norm
        kinds = config.attn_layers
        if not config.is_decoder:
            raise ValueError("is_decoder=False: this Reformer is causal; take transformers' own")
        if config.exact and set(kinds) != {"local"}:
            raise ValueError(f"exact=True with attn_layers={kinds}: take 'local' throughout")
        if config.lsh_num_chunks_before != 1 or config.local_num_chunks_before != 1:
            raise ValueError("a token sees its own chunk and the one before: set lsh_ and local_num_chunks_before to 1")
        self.mixers = [_mixer(config, kind) for kind in kinds]

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        num_hashes: None = None,
        past_buckets_states: None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        **_,
    ) -> ReformerEncoderOutput:
        """Run all layers on (batch, seq, hidden_size); return both streams (batch, seq, 2 * hidden_size).

        Raises
        ------
        ValueError
            For a cache, another number of hashes than the config's, or outputs of single layers.
        """
        if use_cache or past_buckets_states is not None:
            raise ValueError("this Reformer keeps no cache: set use_cache=False")
        if output_hidden_states or output_attentions or num_hashes is not None:
            raise ValueError("output_hidden_states, output_attentions and num_hashes are not supported: leave them out")
        padding = None if attention_mask is None else attention_mask.bool()
        if not self.config.reversible:
            streams = torch.cat(self._run(hidden_states, hidden_states, padding), -1)
        elif torch.is_grad_enabled():
            if not hidden_states.requires_grad:  # with frozen embeddings the layers may still train
                hidden_states = hidden_states.detach().requires_grad_()
            streams = _Reversible.apply(self, padding, hidden_states)
        else:
            streams = torch.cat([hidden_states, hidden_states], -1)
            self.run_in_place(*streams.chunk(2, -1), padding)
        streams = self.layer_norm(streams)
        streams = F.dropout(streams, self.config.hidden_dropout_prob, self.training)
        return ReformerEncoderOutput(streams, None, None, None)

    def _run(self, first: torch.Tensor, second: torch.Tensor, padding: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        for layer, mixer in zip(self.layers, self.mixers, strict=True):
            first = first + layer.attention.output(mix(layer, mixer, project(layer, second), padding))
            second = second + layer.feed_forward.forward_chunk(first)
        return first, second

    def run_in_place(self, first, second, padding, seed: int | None = None) -> None:
        """Run all layers and overwrite the two streams.

        With ``seed`` each part of a layer draws from its own seed, see `drawing_from`.
        """
        for number, (layer, mixer) in enumerate(zip(self.layers, self.mixers, strict=True)):
            with drawing_from(seed, 2 * number, first.device):
                context = mix(layer, mixer, project(layer, second), padding)
                for x, y in zip(*map(self.pieces, (context, first)), strict=True):
                    y.add_(layer.attention.output(x))
                del context
            with drawing_from(seed, 2 * number + 1, first.device):
                for x, y in zip(*map(self.pieces, (first, second)), strict=True):
                    y.add_(layer.feed_forward.forward_chunk(x))

    def pieces(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Cut (batch, seq, ...) into pieces of the sequence for operations on single tokens."""
        return tensor.split(self.config.chunk_size_feed_forward or max(1, TOKENS // len(tensor)), 1)


def _mixer(config: ReversibleConfig, kind: str) -> AttentionConfig:
    if config.exact:
        return SoftmaxConfig("sdpa")
    if kind == "local":
        return WindowConfig(config.local_attn_chunk_length, chunked=True)
    buckets = config.num_buckets
    if isinstance(buckets, (list, tuple)):
        buckets = int(torch.Size(buckets).numel())
    return LSHConfig(config.num_hashes, config.lsh_attn_chunk_length, buckets, config.hash_seed)


def project(layer: ReformerLayer, hidden_states: torch.Tensor) -> list[torch.Tensor]:
    """Queries, keys unless shared, and values of normed hidden states, each (batch, seq, heads * head_dim)."""
    hidden_states, own = layer.attention.layer_norm(hidden_states), layer.attention.self_attention
    shared = isinstance(own, LSHSelfAttention)
    return [p(hidden_states) for p in ((own.query_key, own.value) if shared else (own.query, own.key, own.value))]


def mix(
    layer: ReformerLayer, mixer: AttentionConfig, projected: list[torch.Tensor], padding: torch.Tensor | None
) -> torch.Tensor:
    """Attention outputs of all heads.

    Parameters
    ----------
    layer : ReformerLayer
    mixer : AttentionConfig
    projected : list of torch.Tensor
        From `project`.
    padding : torch.Tensor, optional
        (batch, seq) bool, True for a real token.

    Returns
    -------
    torch.Tensor
        (batch, seq, heads * head_dim).
    """
    own = layer.attention.self_attention
    heads = [t.unflatten(-1, (own.num_attention_heads, -1)).transpose(1, 2) for t in projected]
    dropout = own.dropout if layer.training else 0.0
    context = mixer.attend(heads[0], heads[-2], heads[-1], is_causal=True, key_padding_mask=padding, dropout=dropout)
    return context.transpose(1, 2).flatten(2)


@contextmanager
def drawing_from(seed: int | None, number: int, device: torch.device) -> Iterator[None]:
    """Draw from ``seed + number``, then restore the generators; no effect without a seed.

    A seed replaces the generators' state, 5 KB and more, which would otherwise be kept for each part of each layer.
    """
    if seed is None:
        yield
        return
    with torch.random.fork_rng([] if device.type == "cpu" else [device]):
        torch.manual_seed(seed + number)
        yield


class _Reversible(torch.autograd.Function):
    """All layers; saves only the last layer's streams, and backward restores the inputs from them in place.

    A parameter's gradient is accumulated once, as soon as its part of a layer is done, so that hooks can use and free
    it early. ``torch.autograd.grad`` with respect to parameters therefore finds nothing, as in transformers' Reformer.
    """

    @staticmethod
    def forward(ctx, encoder, padding, hidden_states):
        ctx.encoder, ctx.padding = encoder, padding
        # Backward has to repeat the random numbers of dropout and hashing.
        ctx.seed = int(torch.randint(2**48, ()))
        device_type = hidden_states.device.type
        # No autocast cache: weights cast without gradients must not be reused where gradients are needed.
        enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
        ctx.autocast = {"device_type": device_type, "dtype": dtype, "enabled": enabled, "cache_enabled": False}
        streams = torch.cat([hidden_states, hidden_states], -1)
        with torch.autocast(**ctx.autocast):
            encoder.run_in_place(*streams.chunk(2, -1), padding, ctx.seed)
        ctx.save_for_backward(streams)
        return streams

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (streams,) = ctx.saved_tensors
        encoder = ctx.encoder
        # In place: only this function and the norm after it use both tensors, and the norm's backward is done.
        first, second = streams.chunk(2, -1)
        grad_first, grad_second = grad.chunk(2, -1)
        for number in reversed(range(len(encoder.layers))):
            layer, mixer = encoder.layers[number], encoder.mixers[number]
            with drawing_from(ctx.seed, 2 * number + 1, streams.device):
                part = layer.feed_forward
                _differentiate(ctx, part, part.forward_chunk, first, [grad_second], grad_first, undo=second)
            with drawing_from(ctx.seed, 2 * number, streams.device):
                with torch.autocast(**ctx.autocast):
                    projected = [t.requires_grad_() for t in project(layer, second)]
                    with torch.enable_grad():
                        context = mix(layer, mixer, projected, ctx.padding)
                grad_context = torch.zeros_like(context)
                output = layer.attention.output
                _differentiate(ctx, output, output, context, [grad_first], grad_context, undo=first)
            grads = torch.autograd.grad(context, projected, grad_context)
            del context, grad_context, projected
            parts = nn.ModuleList([layer.attention.layer_norm, layer.attention.self_attention])
            _differentiate(ctx, parts, partial(project, layer), second, grads, grad_second)
            del grads
        return None, None, grad_first + grad_second


def _differentiate(
    ctx,
    part: nn.Module,
    function: Callable[[torch.Tensor], torch.Tensor | list[torch.Tensor]],
    x: torch.Tensor,
    grads: Sequence[torch.Tensor],
    grad_x: torch.Tensor,
    *,
    undo: torch.Tensor | None = None,
) -> None:
    """Recompute ``function(x)``, a piece of the tokens at a time; add to ``grad_x`` and the part's gradients.

    ``grads`` are the gradients of the function's outputs. The output is subtracted from ``undo``.
    """
    parameters = [parameter for parameter in part.parameters() if parameter.requires_grad]
    sums: list[torch.Tensor] = []
    cut = zip(*map(ctx.encoder.pieces, (x, grad_x, x if undo is None else undo, *grads)), strict=True)
    for piece, grad_piece, undone, *grads_piece in cut:
        leaf = piece.detach().requires_grad_()
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            given = function(leaf)
        given = given if isinstance(given, list) else [given]
        grads_piece = [g.to(t.dtype) for g, t in zip(grads_piece, given, strict=True)]
        of_leaf, *found = torch.autograd.grad(given, [leaf, *parameters], grads_piece)
        if undo is not None:
            undone.sub_(given[0].detach())
        grad_piece.add_(of_leaf)
        sums = torch._foreach_add(sums, found) if sums else found
    if parameters:
        torch.autograd.backward(parameters, sums)
