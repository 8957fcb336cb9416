"""The standard steps: models, techniques and attention variants, each in a few seconds and GiB."""

from __future__ import annotations

from memstudy.trainers.hub_model import HubModelRun
from memstudy.trainers.language_model import LanguageModelRun

_DECODER = {"n_layers": 1, "hidden_size": 512, "n_heads": 4, "feed_forward": 2048, "vocab_size": 16_000}
_LONG = _DECODER | {"seq_len": 1024, "batch_size": 16, "techniques": ("bf16",)}
# Model, sequences, tokens, techniques, other choices. The first of a kind are the quick set.
_HUB: dict[str, tuple[str, int, int, str, dict]] = {
    "BERT, fp32": ("bert-base-uncased", 32, 128, "", {}),
    "BERT, bf16": ("bert-base-uncased", 32, 128, "bf16", {}),
    "BERT, fp16": ("bert-base-uncased", 32, 128, "fp16", {}),
    "BERT, TF32": ("bert-base-uncased", 32, 128, "tf32", {}),
    "BERT, classifier": ("bert-base-uncased", 64, 128, "bf16", {"task": "classification"}),
    "GPT-2, fp32": ("gpt2", 4, 512, "", {}),
    "GPT-2, bf16": ("gpt2", 8, 1024, "bf16", {}),
    "GPT-2, weights in bf16": ("gpt2", 8, 1024, "pure_bf16", {}),
    "GPT-2, eager attention": ("gpt2", 4, 1024, "bf16", {"attention": "eager"}),
    "GPT-2, checkpointing": ("gpt2", 16, 1024, "bf16,checkpointing", {}),
    "GPT-2, selective checkpointing": ("gpt2", 8, 1024, "bf16,selective_checkpointing=0.5", {}),
    "GPT-2, chunked loss": ("gpt2", 8, 1024, "bf16,chunked_loss", {}),
    "GPT-2, accumulation": ("gpt2", 16, 1024, "bf16,accumulation=4", {}),
    "GPT-2, AdamW in a loop": ("gpt2", 8, 512, "bf16", {"optimizer": "adamw_torch"}),
    "GPT-2, AdamW in 8 bits": ("gpt2", 8, 512, "bf16,adamw_8bit", {}),
    "GPT-2, Adafactor": ("gpt2", 8, 512, "bf16,adafactor", {}),
    "GPT-2, SGD": ("gpt2", 8, 512, "bf16,sgd", {}),
    "GPT-2, update in backward": ("gpt2", 8, 512, "bf16,optimizer_in_backward", {}),
    "GPT-2, offloaded activations": ("gpt2", 4, 512, "bf16,offload_activations", {}),
    "GPT-2 medium, checkpointing": ("gpt2-medium", 16, 1024, "bf16,checkpointing", {}),
    "SmolLM2": ("smollm2-135m", 8, 1024, "bf16", {}),
    "T5": ("t5-small", 16, 512, "bf16", {}),
    "ViT": ("vit-base", 64, 197, "bf16", {"task": "classification"}),
}
_VARIANTS: dict[str, dict] = {
    "decoder, eager": {"variant": "softmax", "implementation": "eager"},
    "decoder, SDPA": {"variant": "softmax", "implementation": "sdpa"},
    "decoder, sliding window": {"variant": "window", "window": 256},
    "decoder, LSH": {"variant": "lsh", "num_hashes": 2},
    "decoder, Performer": {"variant": "performer", "features": 128},
}
QUICK = (
    "BERT, fp32", "GPT-2, bf16", "GPT-2, checkpointing", "GPT-2, accumulation", "SmolLM2", "decoder, SDPA",
    "decoder, sliding window",
)  # fmt: skip


def standard_steps(*, quick: bool = False) -> dict[str, HubModelRun | LanguageModelRun]:
    """The steps by name; with ``quick`` those that take a minute."""
    steps: dict[str, HubModelRun | LanguageModelRun] = {
        name: HubModelRun(
            experiment=name,
            model=model,
            batch_size=batch,
            seq_len=seq_len,
            techniques=tuple(filter(None, texts.split(","))),
            **others,
        )
        for name, (model, batch, seq_len, texts, others) in _HUB.items()
    }
    for name, attention in _VARIANTS.items():
        steps[name] = LanguageModelRun(experiment=name, attention=attention, measure_steps=1, **_LONG)
    return {name: steps[name] for name in QUICK} if quick else steps
