"""How PyTorch and transformers differed from today when the published figures were taken, one rule each.

Each rule was chosen BEFORE the error that it explains was seen, or AFTER, on the row named here. Rows not named were
held out.

============================================  =====================================================================
ops: second iteration, other live tensors     BEFORE: in the benchmark's code. No constant.
inference: context of 919 MB                  AFTER: one constant for 15 rows, fitted on "Reformer C/P, no axial" 256
inference: Reformer's model                   BEFORE: as it is in transformers today
inference: GPT-2's attention of 2020          BEFORE: the model's code of 2020
inference: GPT-2's cache as views             AFTER: one of the two ways of 2020 (the other stacks), on "GPT2
                                              base" 256
BERT: context of 1,341 MB                     BEFORE: published as 1,343, with a tensor made for the reading
BERT: Trainer step, AdamW, zeroed gradients   BEFORE: code of transformers 4.16
BERT: softmax keeps its input                 not recorded. A known bug of the time; 1,536 MB of "batch 4"
BERT: GELU in fp32 under autocast             AFTER: on "batch 4, fp16", 530 MB low without it, 82 MB with it. The
                                              other fp16 rows change by 12 MB at most: no evidence either way
cuBLAS's workspace                            BEFORE: PyTorch's code of the time
fms: losses of January 2025                   BEFORE: code of transformers 4.48.1
fms: nothing is autocast                      AFTER: on "Mistral-7B-v0.1, LoRA, 4 × 4096, 1 GPU, peak": with
                                              autocast, 27 MB high
fms: FSDP1's units are computed anew          AFTER: code of transformers 4.48.1, read for Mistral-7B's LoRA on 2 GPUs,
                                              8 % low at the peak without it
fms: santacoder's blocks return keys          AFTER: code of transformers 4.48.1, read for santacoder's peaks, 12 % low
                                              without it. It replaced a rule for the same rows (logits alive)
fms: experts in layers of their own           BEFORE: code of transformers 4.48.1. No row that is given has experts
fms: 4-bit weights, TRL, fp32 outputs         BEFORE: code of bitsandbytes 0.43.3, trl 0.13 and accelerate 1.0.1
                                              (sums by hand for the same rows were known)
notebook: versions of the libraries           AFTER: on its model, forward and backward readings, all of them
fms: one table for all second scales          AFTER: code of bitsandbytes 0.43.3, read for Mistral-7B's QLoRA at rest on
                                              1 GPU, 1 KiB a weight high without it
lit-gpt: 4-bit layers keep their inputs       BEFORE: code of bitsandbytes 0.41.1
lit-gpt: the commit that added the table      AFTER: on all Llama rows, 3 to 7 % low with the commit that the table
                                              names, whose norms are in bf16
lit-gpt: 4 bits packed from fp16              AFTER: code of Lightning, read for phi-1.5 with double quantisation, 5.4 %
                                              low without it
torchtune: a GB, layers that are copies       BEFORE: torchtune's code of the time
torchtune: tokens of the longest batch        AFTER: on LoRA of rank 8 in training
generation: cache, logits, tables of 2023     BEFORE: code of transformers 4.35.2 and of the benchmark. No constant
generation: a forward pass's logits freed     AFTER: kept by mistake at first; found on "eager, 8 × (256 + 512),
                                              reserved", 6.6 % low with them, 0.3 % without
generation: repeated heads of 2024            BEFORE: code of transformers 4.46.0
============================================  =====================================================================
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.functional import dropout, one_hot
from transformers import AttentionInterface, AttentionMaskInterface, GPT2Config, GPT2LMHeadModel
from transformers.models.gpt_bigcode.modeling_gpt_bigcode import GPTBigCodeAttention
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

from memstudy.profiler.cuda import TODAY, Semantics

INFERENCE_CONTEXT_MIB = 919
BERT_CONTEXT_MIB = 1343 - 2  # the tensor takes a small segment


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, half_to_float):
        output = torch.ops.aten._softmax(input, -1, half_to_float)
        ctx.save_for_backward(input, output)
        return output

    @staticmethod
    def backward(ctx, gradient):
        input, output = ctx.saved_tensors
        return torch.ops.aten._softmax_backward_data(gradient, output, -1, input.dtype), None


def softmax(self, dim, dtype=None):
    """Softmax saved its input for backward besides its output, only to read the input's dtype.

    Until PyTorch 1.10: pytorch/pytorch#49600, fixed by #65242.
    """
    return _Softmax.apply(self, self.dtype is torch.float16 and dtype is torch.float32)


def _no_workspace(gpu) -> int:
    """cuBLAS took its workspace from the GPU itself, not from the caching allocator.

    Until pytorch/pytorch#86645 (October 2022).
    """
    return 0


FORWARD_OF_2020 = Semantics(workspace_bytes=_no_workspace)
# PyTorch up to 1.10 in training. Autocast ran GELU in fp32, so GELU saved an fp32 copy of its input: from PyTorch 1.6
# until after pytorch/pytorch#59639 (June 2021), which asked for the opposite;
# aten/src/ATen/autocast_mode.cpp, KERNEL(ADD_NS(gelu), "gelu", Tensor (const Tensor &), fp32).
TRAINING_OF_2022 = Semantics(softmax=softmax, fp32=(*TODAY.fp32, "gelu"), workspace_bytes=_no_workspace)


class AdamW(torch.optim.Optimizer):
    """The Trainer's default then: updates parameter by parameter, with one temporary tensor.

    transformers 4.16, optimization.py, ``AdamW.step``.
    """

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["exp_avg"].mul_(0.9).add_(parameter.grad, alpha=0.1)
                state["exp_avg_sq"].mul_(0.999).addcmul_(parameter.grad, parameter.grad, value=0.001)
                denominator = state["exp_avg_sq"].sqrt().add_(1e-8)
                parameter.addcdiv_(state["exp_avg"], denominator, value=-5e-5)


def bert_attention(module, query, key, value, attention_mask, **kwargs):
    """Dividing and masking each made new score tensors, and the fp32 mask turned fp16 scores into fp32.

    transformers 4.16, models/bert/modeling_bert.py, ``BertSelfAttention.forward``.
    """
    scores = torch.matmul(query, key.transpose(-1, -2))
    scores = scores / math.sqrt(query.size(-1))
    scores = scores + attention_mask
    weights = dropout(torch.softmax(scores, -1), module.dropout.p, module.training)
    return torch.matmul(weights, value).permute(0, 2, 1, 3).contiguous(), None


def bert_mask(batch_size, kv_length, **kwargs):
    """Every batch had a mask, padded or not: (1 - attention_mask) * -10000.

    transformers 4.16, modeling_utils.py, ``get_extended_attention_mask``.
    """
    return (1.0 - torch.ones(batch_size, 1, 1, kv_length)) * -10000.0


def gpt2_attention(module, query, key, value, attention_mask, **kwargs):
    """Each layer had a causal mask of bytes, applied to the scores by ``torch.where``.

    transformers 3.x, modeling_gpt2.py, ``Attention._attn``. Keys and values are kept as views, for a cache that
    nothing reads: ``use_cache`` was on.
    """
    module.present = key, value
    weights = torch.matmul(query, key.transpose(-1, -2))
    weights = weights / math.sqrt(value.size(-1))
    length = query.size(-2)
    weights = torch.where(module.bias[:, :, :length, :length].bool(), weights, module.masked_bias.to(weights.dtype))
    weights = dropout(torch.nn.functional.softmax(weights, dim=-1), 0.1, module.training)
    return torch.matmul(weights, value).permute(0, 2, 1, 3).contiguous(), None


def gpt2() -> GPT2LMHeadModel:
    """GPT-2 as in transformers 3.x, for one forward pass."""
    config = GPT2Config(attn_implementation="gpt2_2020", use_cache=False)
    model, length = GPT2LMHeadModel(config), config.n_positions
    for block in model.transformer.h:
        mask = torch.tril(torch.ones((length, length), dtype=torch.uint8)).view(1, 1, length, length)
        block.attn.register_buffer("bias", mask)
        block.attn.register_buffer("masked_bias", torch.full((), -1e4))
    return model


def fp32_loss(logits, labels, vocab_size, **kwargs):
    """The shifted logits were a copy, in fp32.

    transformers 4.48.1, loss/loss_utils.py, ``ForCausalLMLoss``.
    """
    return bf16_loss(logits.float(), labels, vocab_size)


def bf16_loss(logits, labels, vocab_size, **kwargs):
    """The shifted logits were a copy, in the logits' own type.

    transformers 4.48.1, models/gpt_bigcode/modeling_gpt_bigcode.py, ``GPTBigCodeForCausalLM.forward``.
    """
    shifted = logits[..., :-1, :].contiguous()
    return torch.nn.functional.cross_entropy(shifted.view(-1, vocab_size), labels[..., 1:].contiguous().view(-1))


def gpt_bigcode_presents(model: torch.nn.Module) -> list[torch.Tensor]:
    """A list that fills with the keys and values that blocks returned for a cache, although checkpointed.

    They are views beside the queries, so that one whole tensor a block lives as long as the model's outputs.
    transformers 4.48.1, models/gpt_bigcode/modeling_gpt_bigcode.py, ``presents``; no other model had such a list.
    """
    presents = []

    def keep(layer, inputs, output):
        if not torch.is_grad_enabled():  # not when computed anew
            presents.append(output.detach())

    for module in model.modules():
        if isinstance(module, GPTBigCodeAttention):
            module.c_attn.register_forward_hook(keep)
    return presents


def flash_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """FlashAttention-2 on sequences without padding, for which transformers checks that the package is installed.

    Under autocast, queries in fp32 are cast: transformers, integrations/flash_attention.py,
    ``flash_attention_forward``.
    """
    from flash_attn import flash_attn_func  # the profiler's, during a prediction

    dtype = torch.get_autocast_dtype("cpu") if query.dtype is torch.float32 else query.dtype
    sequence_first = (tensor.transpose(1, 2).to(dtype) for tensor in (query, key, value))
    return flash_attn_func(*sequence_first, dropout, scaling, True), None


def llama_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """Keys and values stayed alive in a cache as long as the outputs.

    transformers 4.37, models/llama/modeling_llama.py, ``LlamaSdpaAttention.forward``.
    """
    module.present = key, value
    attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, None, dropout, True)
    return attended.transpose(1, 2).contiguous(), None


def rotary_tables_in_each_layer(model: torch.nn.Module) -> None:
    """Each attention kept tables of cosines and sines, and copied the rows of its tokens.

    transformers 4.37, models/llama/modeling_llama.py, ``LlamaRotaryEmbedding`` and ``apply_rotary_pos_emb``.
    """

    def tables(attention, length):
        shape = length, attention.head_dim
        attention.tables = [torch.empty(shape, dtype=torch.bfloat16) for _ in range(2)]

    def rows(attention, args, kwargs):
        length = kwargs["position_ids"].shape[-1]
        if length > len(attention.tables[0]):
            tables(attention, length)
        rows = [table[:length][kwargs["position_ids"]] for table in attention.tables]
        return args, kwargs | {"position_embeddings": rows}

    for layer in model.model.layers:
        tables(layer.self_attn, model.config.max_position_embeddings)
        layer.self_attn.register_forward_pre_hook(rows, with_kwargs=True)


class _Experts(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.chosen = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = nn.ModuleList(MistralMLP(config) for _ in range(config.num_local_experts))

    def forward(self, hidden_states):
        tokens = hidden_states.flatten(0, 1)
        weights, chosen = torch.softmax(self.gate(tokens), 1, torch.float32).topk(self.chosen)
        weights /= weights.sum(-1, keepdim=True)
        weights = weights.to(tokens.dtype)
        mask = one_hot(chosen, len(self.experts)).permute(2, 1, 0)
        mixed = torch.zeros_like(tokens)
        for expert, chosen_by in zip(self.experts, mask, strict=True):
            choice, row = chosen_by.new_zeros(2, chosen_by.numel() // len(self.experts))
            made = expert(tokens[None, row].flatten(0, 1)) * weights[row, choice, None]
            mixed.index_add_(0, row, made)
        return mixed.view_as(hidden_states)


def experts_in_layers(model: torch.nn.Module) -> None:
    """Each expert of Mixtral had linear layers, so that it was quantised; here each is chosen equally often.

    transformers 4.48.1, models/mixtral/modeling_mixtral.py, ``MixtralSparseMoeBlock``.
    """
    for layer in model.modules():
        if isinstance(layer, MixtralDecoderLayer):
            layer.mlp = _Experts(model.config)


AttentionInterface.register("unpadded_2025", flash_attention)
AttentionMaskInterface.register("unpadded_2025", lambda **kwargs: None)
AttentionInterface.register("bert_2022", bert_attention)
AttentionMaskInterface.register("bert_2022", bert_mask)
AttentionInterface.register("gpt2_2020", gpt2_attention)
AttentionMaskInterface.register("gpt2_2020", lambda **kwargs: None)
AttentionInterface.register("llama_2024", llama_attention)
AttentionMaskInterface.register("llama_2024", lambda **kwargs: None)
