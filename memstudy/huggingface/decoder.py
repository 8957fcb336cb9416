"""The small Transformers of the studies; the mixer is chosen by the config.

The decoder is Hugging Face's GPT-2 in the Lab-4 study's shape (pre-norm, learned positions, tied embeddings,
fused tanh-GELU, no dropout), so that Hugging Face's ``generate``, checkpointing, saving and ``Trainer`` work.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from memstudy.attention import ATTENTION, AttentionConfig
from memstudy.huggingface.convert import convert_attention


class DecoderConfig(GPT2Config):
    """A GPT-2 config whose ``memstudy_attention`` names the mixer and its settings.

    For example ``{"variant": "window", "window": 256}``; ``memstudy.attention.ATTENTION`` has the names.
    """

    model_type = "memstudy_decoder"
    memstudy_attention: dict | None = None
    # The fused kernel: the unfused "gelu_new" keeps six more tensors of (batch, seq, feed_forward).
    activation_function: str = "gelu_pytorch_tanh"
    resid_pdrop: float = 0.0
    embd_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    use_cache: bool = False
    bos_token_id: int | None = 0
    eos_token_id: int | None = 0


class LossInTraining:
    """Mixin for Hugging Face's causal language models: the training step keeps no logits.

    ``forward(input_ids, labels=None, attention_mask=None)`` with Hugging Face's outputs. In training with labels the
    output carries only the loss: logits would stay in memory, and Accelerate would copy them to fp32, which at Lab 4's
    batch is 1.3 GB that no step needs.
    """

    def forward(self, input_ids=None, labels=None, attention_mask=None, **kwargs):
        output = super().forward(input_ids, labels=labels, attention_mask=attention_mask, **kwargs)
        if self.training and labels is not None:
            output.logits = None
        return output


class DecoderLM(LossInTraining, GPT2LMHeadModel):
    """Causal language model with the mixer that its config names."""

    config_class = DecoderConfig

    def __init__(self, config: DecoderConfig):
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # transformers guesses it from the class's name, and warns
        self.generation_config.use_cache = True
        if config.memstudy_attention:
            settings = dict(config.memstudy_attention)
            convert_attention(self, ATTENTION[settings.pop("variant")](**settings))


AutoConfig.register(DecoderConfig.model_type, DecoderConfig)
AutoModelForCausalLM.register(DecoderConfig, DecoderLM)


def decoder(
    *,
    vocab_size: int,
    n_layers: int,
    hidden_size: int,
    n_heads: int,
    feed_forward: int,
    max_len: int,
    attention: AttentionConfig,
) -> DecoderLM:
    """A decoder with random weights (from torch's global generator).

    Parameters
    ----------
    vocab_size, n_layers, hidden_size, n_heads, feed_forward : int
        The shape; ``hidden_size`` must be a multiple of ``n_heads``.
    max_len : int
        Longest sequence [tokens]; there is one learned position for each.
    attention : AttentionConfig
        The mixer of every block.
    """
    return DecoderLM(
        DecoderConfig(
            vocab_size=vocab_size,
            n_layer=n_layers,
            n_embd=hidden_size,
            n_head=n_heads,
            n_inner=feed_forward,
            n_positions=max_len,
            memstudy_attention=attention.settings(),
        )
    )
