"""Reformer (Kitaev et al. 2020, arXiv:2001.04451): a language model whose layers can be run backwards.

A layer takes two streams and gives two (section 3; Gomez et al. 2017, arXiv:1707.04585),

    y1 = x1 + attention(x2)          y2 = x2 + feed_forward(y1)

so that its inputs follow from its outputs, x2 = y2 - feed_forward(y1) and x1 = y1 - attention(x2). Only the last
layer's outputs are kept; backward goes through the layers in reverse, finds each one's inputs and computes it once
more. The feed-forward part runs a chunk of the tokens at a time, in backward too.

Parameters, embeddings and head are those of transformers' ``ReformerModelWithLMHead``, whose checkpoints load; the
layers run here, on the project's `lsh` and chunked `window` attention. With ``exact`` every token attends to all before
it instead, and without ``reversible`` autograd keeps what each layer computes: what the two buy can be told apart.

Not implemented: decoding with cached buckets and states (generate with ``use_cache=False``); layers not causal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, ReformerConfig, ReformerModelWithLMHead
from transformers.models.reformer.modeling_reformer import ReformerEncoder, ReformerEncoderOutput, ReformerLayer

from memstudy.attention import AttentionConfig, LSHConfig, SoftmaxConfig, WindowConfig


class ReversibleConfig(ReformerConfig):
    """A Reformer config that also says whether attention is exact, and whether layers are run backwards.

    ``exact`` needs ``attn_layers`` that are all ``local``, for queries of their own.
    """

    model_type = "memstudy_reformer"
    exact: bool = False
    reversible: bool = True
    is_decoder: bool = True
    use_cache: bool = False


class ReformerLM(ReformerModelWithLMHead):
    """Causal language model: ``forward(input_ids, labels=None, attention_mask=None)`` with Hugging Face's outputs.

    In training with labels the output carries the loss only, as `memstudy.models.DecoderLM`'s does.
    """

    config_class = ReversibleConfig

    def __init__(self, config: ReversibleConfig):
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # transformers guesses it from the class's name, and warns
        self.reformer.encoder = Encoder(self.reformer.encoder, config)

    def forward(self, input_ids=None, labels=None, attention_mask=None, **kwargs):
        output = super().forward(input_ids, labels=labels, attention_mask=attention_mask, **kwargs)
        if self.training and labels is not None:
            output.logits = None
        return output


AutoConfig.register(ReversibleConfig.model_type, ReversibleConfig)
AutoModelForCausalLM.register(ReversibleConfig, ReformerLM)


class Encoder(nn.Module):
    """The layers of ``encoder``, run on the project's attention, and its last norm over both streams."""

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
        """Run all layers on (batch, seq, hidden_size); give both streams (batch, seq, 2 * hidden_size).

        Raises
        ------
        ValueError
            When asked for a cache, other hashes than the config's, or what only single layers know.
        """
        if use_cache or past_buckets_states is not None:
            raise ValueError("this Reformer keeps no cache: set use_cache=False")
        if output_hidden_states or output_attentions or num_hashes is not None:
            raise ValueError("output_hidden_states, output_attentions and num_hashes are not supported: leave them out")
        padding = None if attention_mask is None else attention_mask.bool()
        if not self.config.reversible:
            streams = torch.cat(self._run(hidden_states, hidden_states, padding), -1)
        elif torch.is_grad_enabled():
            if not hidden_states.requires_grad:  # frozen embeddings: the layers' parameters may learn all the same
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
            first = first + attend(layer, mixer, second, padding)
            second = second + torch.cat([layer.feed_forward.forward_chunk(x) for x in self.chunks(first)], 1)
        return first, second

    def run_in_place(self, first, second, padding, seed: int | None = None) -> None:
        """Turn the streams that the first layer takes into those that the last one gives.

        With ``seed`` each part of a layer draws from a generator of its own, see `drawing_from`.
        """
        for number, (layer, mixer) in enumerate(zip(self.layers, self.mixers, strict=True)):
            with drawing_from(seed, 2 * number, first.device):
                first.add_(attend(layer, mixer, second, padding))
            with drawing_from(seed, 2 * number + 1, first.device):
                for x, y in zip(self.chunks(first), self.chunks(second), strict=True):
                    y.add_(layer.feed_forward.forward_chunk(x))

    def chunks(self, stream: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Cut (batch, seq, hidden_size) into what the feed-forward part takes at once."""
        return stream.split(self.config.chunk_size_feed_forward or stream.shape[1], 1)


def _mixer(config: ReversibleConfig, kind: str) -> AttentionConfig:
    if config.exact:
        return SoftmaxConfig("sdpa")
    if kind == "local":
        return WindowConfig(config.local_attn_chunk_length, chunked=True)
    buckets = config.num_buckets
    if isinstance(buckets, (list, tuple)):
        buckets = int(torch.Size(buckets).numel())
    return LSHConfig(config.num_hashes, config.lsh_attn_chunk_length, buckets, config.hash_seed)


def attend(
    layer: ReformerLayer, mixer: AttentionConfig, hidden_states: torch.Tensor, padding: torch.Tensor | None
) -> torch.Tensor:
    """The attention part of ``layer``, norm and dropout included.

    Parameters
    ----------
    layer : ReformerLayer
    mixer : AttentionConfig
    hidden_states : torch.Tensor
        (batch, seq, hidden_size).
    padding : torch.Tensor, optional
        (batch, seq) bool, True for a real token.

    Returns
    -------
    torch.Tensor
        (batch, seq, hidden_size).
    """
    part = layer.attention
    own = part.self_attention
    hidden_states = part.layer_norm(hidden_states)

    def heads(projection):
        return projection(hidden_states).unflatten(-1, (own.num_attention_heads, -1)).transpose(1, 2)

    value = heads(own.value)
    query, key = (2 * (heads(own.query_key),)) if mixer.name == "lsh" else (heads(own.query), heads(own.key))
    dropout = own.dropout if layer.training else 0.0
    context = mixer.attend(query, key, value, is_causal=True, key_padding_mask=padding, dropout=dropout)
    return part.output(context.transpose(1, 2).flatten(2))


@contextmanager
def drawing_from(seed: int | None, number: int, device: torch.device) -> Iterator[None]:
    """Draw what ``seed`` and ``number`` say, and leave the generators as they were; without a seed change nothing.

    A number in place of the generators' state, 5 KB and more, which would be kept for each part of each layer.
    """
    if seed is None:
        yield
        return
    with torch.random.fork_rng([] if device.type == "cpu" else [device]):
        torch.manual_seed(seed + number)
        yield


class _Reversible(torch.autograd.Function):
    """All layers; keeps the streams that the last one gives, and works backwards from them in place.

    Parameters get their gradients as each part of a layer is done with, once, so that hooks on them can use and free
    these at once; ``torch.autograd.grad`` with regard to them therefore finds nothing, as with transformers' own.
    """

    @staticmethod
    def forward(ctx, encoder, padding, hidden_states):
        ctx.encoder, ctx.padding = encoder, padding
        # Only what is dropped or hashed at random has to be drawn again.
        ctx.seed = int(torch.randint(2**48, ()))
        device_type = hidden_states.device.type
        # What is cast without gradients must not be found in the cache by what needs them.
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
        # In place: both belong to this function and to the norm behind it, which is done with them.
        first, second = streams.chunk(2, -1)
        grad_first, grad_second = grad.chunk(2, -1)
        for number in reversed(range(len(encoder.layers))):
            layer, mixer = encoder.layers[number], encoder.mixers[number]
            with drawing_from(ctx.seed, 2 * number + 1, streams.device):
                tensors = map(encoder.chunks, (first, second, grad_first, grad_second))
                chunks = zip(*tensors, strict=True)
                _undo(ctx, layer.feed_forward, layer.feed_forward.forward_chunk, chunks)
            with drawing_from(ctx.seed, 2 * number, streams.device):
                function = partial(attend, layer, mixer, padding=ctx.padding)
                _undo(ctx, layer.attention, function, [(second, first, grad_second, grad_first)])
        return None, None, grad_first + grad_second


def _undo(ctx, part: nn.Module, function: Callable, pieces: Iterable[tuple[torch.Tensor, ...]]) -> None:
    """Undo ``y = y + function(x)``, the gradient of x and those of the part's parameters included.

    ``pieces`` are x, y and their gradients, changed in place, for one chunk of the tokens after another.
    """
    parameters = [parameter for parameter in part.parameters() if parameter.requires_grad]
    sums: list[torch.Tensor] = []
    for x, y, grad_x, grad_y in pieces:
        leaf = x.detach().requires_grad_()
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            change = function(leaf)
        of_leaf, *found = torch.autograd.grad(change, [leaf, *parameters], grad_y.to(change.dtype))
        y.sub_(change.detach())
        grad_x.add_(of_leaf)
        del change, leaf, of_leaf  # before the next piece makes its own
        sums = torch._foreach_add(sums, found) if sums else found
    torch.autograd.backward(parameters, sums)
