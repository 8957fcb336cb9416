"""Training steps, described as data, for both the oracle and the predictor.

Nothing here depends on CUDA: ``build(case, "cpu")`` makes the same step as ``build(case, "cuda")``, so

    report = predict(lambda: build(case, "cpu"))

can be compared with the row of ``oracle.csv`` that has the case's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import product
from unittest.mock import patch

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    T5Config,
)

BATCH, VOCAB, LAYERS, HEADS, LONGEST = 3, 1000, 2, 4, 128


@dataclass(frozen=True)
class Case:
    """One training step; its name lists the choices that differ from the defaults.

    Attributes
    ----------
    model : str
        A key of ``MODELS``.
    attention : str
        ``eager`` or ``sdpa``.
    precision : str
        ``fp32``; ``bf16`` (weights and all); ``bf16-autocast`` or ``fp16-autocast`` (weights in fp32).
    padded : bool
        Whether an attention mask with some padding is passed.
    seq_len, head_dim : int
        Tokens per sequence; width of a head (the hidden size is ``HEADS`` times ``head_dim``).
    checkpointing : str
        ``""``, ``"non-reentrant"`` or ``"reentrant"``.
    optimizer : str
        ``adamw`` (PyTorch's default: foreach on CUDA), ``adamw-fused``, ``adamw-loop`` or ``sgd``.
    clipped : bool
        Whether the norm of the gradients is clipped.
    """

    model: str
    attention: str = "sdpa"
    precision: str = "fp32"
    padded: bool = False
    seq_len: int = 100
    head_dim: int = 32
    checkpointing: str = ""
    optimizer: str = "adamw"
    clipped: bool = False

    @property
    def name(self) -> str:
        """Plain words, joined by hyphens."""
        words = [self.model, self.attention, self.precision]
        words += ["padded"] * self.padded
        words += [f"{self.seq_len}-tokens"] * (self.seq_len != 100)
        words += [f"head-dim-{self.head_dim}"] * (self.head_dim != 32)
        words += [f"checkpointing-{self.checkpointing}"] * bool(self.checkpointing)
        words += [self.optimizer] * (self.optimizer != "adamw")
        words += ["clipped"] * self.clipped
        return "-".join(words)


def _bert(hidden: int) -> BertConfig:
    return BertConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * hidden,
        max_position_embeddings=LONGEST,
    )


def _gpt2(hidden: int) -> GPT2Config:
    return GPT2Config(
        vocab_size=VOCAB,
        n_embd=hidden,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=LONGEST,
        bos_token_id=0,
        eos_token_id=0,
    )


def _llama(hidden: int, kv_heads: int = HEADS) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        intermediate_size=3 * hidden,
        max_position_embeddings=LONGEST,
    )


def _t5(hidden: int) -> T5Config:
    return T5Config(
        vocab_size=VOCAB,
        d_model=hidden,
        d_kv=hidden // HEADS,
        d_ff=4 * hidden,
        num_layers=LAYERS,
        num_heads=HEADS,
        decoder_start_token_id=0,
    )


MODELS = {
    "bert": (AutoModelForMaskedLM, _bert),
    "bert-classifier": (AutoModelForSequenceClassification, _bert),
    "gpt2": (AutoModelForCausalLM, _gpt2),
    "llama": (AutoModelForCausalLM, _llama),
    "llama-gqa": (AutoModelForCausalLM, lambda hidden: _llama(hidden, kv_heads=2)),
    "t5": (AutoModelForSeq2SeqLM, _t5),
}
PRECISIONS = ("fp32", "bf16-autocast", "fp16-autocast", "bf16")
OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "adamw-fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "adamw-loop": lambda parameters: torch.optim.AdamW(parameters, foreach=False),
    "sgd": torch.optim.SGD,
}

_LM = Case("gpt2", "sdpa", "bf16-autocast")
CASES = [
    Case(model, attention, precision, padded)
    for model, attention, precision, padded in product(
        ("bert", "gpt2", "llama", "llama-gqa", "t5"), ("eager", "sdpa"), PRECISIONS, (False, True)
    )
] + [
    Case("bert-classifier", "sdpa", "fp32", padded=True),
    Case("bert-classifier", "sdpa", "bf16-autocast", padded=True),
    *(Case(model, "sdpa", "fp32", padded, seq_len=128) for model in ("bert", "gpt2") for padded in (False, True)),
    *(Case(model, "sdpa", "bf16-autocast", True, seq_len=128) for model in ("bert", "llama-gqa", "t5")),
    *(Case("llama", "sdpa", precision, head_dim=30) for precision in PRECISIONS),
    *(Case("gpt2", "sdpa", precision, head_dim=264, seq_len=32) for precision in ("fp32", "bf16")),
    *(
        Case(model, attention, precision, checkpointing="non-reentrant")
        for model, attention, precision in product(
            ("bert", "gpt2", "llama", "t5"), ("eager", "sdpa"), ("fp32", "bf16-autocast")
        )
    ),
    replace(_LM, checkpointing="reentrant"),
    *(replace(_LM, optimizer=name) for name in ("adamw-fused", "adamw-loop", "sgd")),
    Case("gpt2", "sdpa", "bf16", optimizer="adamw-fused"),
    *(Case("gpt2", "sdpa", precision, clipped=True) for precision in PRECISIONS),
    Case("bert", "eager", "fp32", optimizer="adamw-fused", clipped=True),
]


def build(case: Case, device: str) -> Callable[[], None]:
    """Make model, inputs and optimizer of ``case`` on ``device``, and return the callable that runs one update."""
    family, config = MODELS[case.model]
    with torch.device(device):
        model = family.from_config(
            config(HEADS * case.head_dim),
            attn_implementation=case.attention,
            dtype=torch.bfloat16 if case.precision == "bf16" else torch.float32,
        )
        tokens = torch.randint(VOCAB, (BATCH, case.seq_len))
        batch = {"input_ids": tokens, "labels": tokens[:, 0] % 2 if case.model == "bert-classifier" else tokens}
        if case.padded:
            batch["attention_mask"] = torch.ones_like(tokens)
            batch["attention_mask"][0, -10:] = 0
    if case.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": case.checkpointing == "reentrant"})
    model.train()
    optimizer = OPTIMIZERS[case.optimizer](model.parameters())

    def step() -> None:
        with _autocast(case.precision, device), _has_padding() if case.padded else nullcontext():
            loss = model(**batch).loss
        loss.backward()
        if case.clipped:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _autocast(precision: str, device: str):
    if not precision.endswith("-autocast"):
        return nullcontext()
    return torch.autocast(device, torch.bfloat16 if precision.startswith("bf16") else torch.float16)


@contextmanager
def _has_padding() -> Iterator[None]:
    """Make transformers keep the attention mask: a fake mask has no values to decide by."""
    with patch.multiple(
        "transformers.masking_utils",
        _ignore_causal_mask_sdpa=lambda *args, **kwargs: False,
        _ignore_bidirectional_mask_sdpa=lambda *args, **kwargs: False,
    ):
        yield
