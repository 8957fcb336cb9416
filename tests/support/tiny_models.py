"""Configurations of small Hugging Face models, and their config.json files for runs and predictions."""

from collections.abc import Callable
from pathlib import Path

import transformers as hf

SIZES = {
    "vocab_size": 1000, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256,
    "max_position_embeddings": 64,
}  # fmt: skip
TINY = {
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=1000, n_embd=128, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0,
        architectures=["GPT2LMHeadModel"],
    ),
    "llama": lambda: hf.LlamaConfig(**SIZES, num_key_value_heads=2, architectures=["LlamaForCausalLM"]),
    "bert": lambda: hf.BertConfig(**SIZES, architectures=["BertForMaskedLM"]),
    "roberta": lambda: hf.RobertaConfig(
        **SIZES | {"max_position_embeddings": 66}, type_vocab_size=1, architectures=["RobertaForMaskedLM"]
    ),
    "t5": lambda: hf.T5Config(
        vocab_size=1000, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, decoder_start_token_id=0,
        architectures=["T5ForConditionalGeneration"],
    ),
}  # fmt: skip

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = {"image_size": 32, "patch_size": 8}
SEEING_AND_HEARING = {
    "vit": lambda: hf.ViTConfig(**TOWER, **IMAGE, num_labels=5, architectures=["ViTForImageClassification"]),
    "clip": lambda: hf.CLIPConfig(
        text_config=TOWER | {"vocab_size": 100, "max_position_embeddings": 24}, vision_config=TOWER | IMAGE,
        projection_dim=16, architectures=["CLIPModel"],
    ),
    "whisper": lambda: hf.WhisperConfig(
        vocab_size=100, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=48,
        max_target_positions=24, decoder_start_token_id=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        architectures=["WhisperForConditionalGeneration"],
    ),
}  # fmt: skip


def config_file(folder, family: str, **changes) -> str:
    """Write the config.json of the tiny model of `family`, with `changes`, and return its path."""
    config = (TINY | SEEING_AND_HEARING)[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    path = folder / f"{family}-{len(list(folder.iterdir()))}.json"
    config.to_json_file(path, use_diff=False)
    return str(path)


def write_configs(models: dict[str, Callable[[], hf.PretrainedConfig]], folder: Path) -> dict[str, str]:
    """The path of each model's config.json, written under ``folder``."""
    for name, config in models.items():
        config().to_json_file(folder / f"{name}.json", use_diff=False)
    return {name: str(folder / f"{name}.json") for name in models}
