"""Changes of a training step: batch in parts, loss in chunks, activations in the host's memory, update in backward."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from memstudy.techniques.base import Technique


@dataclass(frozen=True)
class Accumulation(Technique):
    """Split the batch into ``steps`` parts, add their gradients, and update once."""

    steps: int = 4
    summary = "the same batch in several parts, one update"

    def __post_init__(self):
        if self.steps < 1 or not float(self.steps).is_integer():
            raise ValueError(f"accumulation={self.steps}: a whole number from 1 is needed")

    def flags(self):
        return {"gradient_accumulation_steps": int(self.steps)}


@dataclass(frozen=True)
class ChunkedLoss(Technique):
    """Loss and its gradient in chunks of rows, so that the (tokens, vocabulary) logits never exist.

    Uses ``torch.nn.functional.linear_cross_entropy``, which ignores autocast: the head's product stays fp32.
    """

    summary = "the language-model loss in chunks of tokens; no tensor of all logits"

    def prepare(self, model):
        native = model.forward

        @functools.wraps(native)
        def forward(input_ids=None, labels=None, num_items_in_batch=None, **kwargs):
            if labels is None or not model.training:
                return native(input_ids=input_ids, labels=labels, num_items_in_batch=num_items_in_batch, **kwargs)
            head, targets = model.get_output_embeddings(), labels[:, 1:]
            bias, tokens = head.bias, slice(-1)
            if model.config.is_encoder_decoder:  # Marian
                kwargs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
                targets, bias, tokens = labels, model.final_logits_bias.flatten(), slice(None)
            hidden_states = model.base_model(input_ids, **kwargs).last_hidden_state[:, tokens]
            mean = num_items_in_batch is None
            loss = F.linear_cross_entropy(
                hidden_states.flatten(0, 1).to(head.weight.dtype),
                head.weight,
                targets.flatten(),
                linear_bias=bias,
                reduction="mean" if mean else "sum",
                options=torch.nn.LinearCrossEntropyOptions(),
            )
            return {"loss": loss if mean else loss / num_items_in_batch}

        model.forward = forward


@dataclass(frozen=True)
class OffloadActivations(Technique):
    """Move saved activations to the host's pinned memory, and back when backward needs them."""

    summary = "saved activations wait in the host's memory"
    requires = "cuda"

    def around_loss(self):
        return torch.autograd.graph.save_on_cpu(pin_memory=True)


@dataclass(frozen=True)
class OptimizerInBackward(Technique):
    """Update each parameter as soon as its gradient is complete, and free the gradient (Lv et al. 2023).

    One ordinary optimizer is enough: while a parameter's gradient exists, no other gradient does, so ``step``
    updates that parameter alone. The optimizer's state is saved and restored as usual.
    """

    summary = "update each parameter inside backward; gradients never exist together"

    def attach(self, model, optimizer):
        def update(parameter):
            optimizer.step()
            parameter.grad = None

        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(update)
