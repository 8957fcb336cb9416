"""Random batches of what a model reads: tokens, images, images with texts, or sound with its text.

Memory and time depend on shapes alone.
"""

from __future__ import annotations

import torch
from transformers import PretrainedConfig, PreTrainedModel


def random_batch(
    family: type[PreTrainedModel], config: PretrainedConfig, *, task: str, batch_size: int, seq_len: int
) -> dict[str, torch.Tensor]:
    """A batch for a model of class ``family``, from torch's global generator; no padding.

    Images have the size that the model was trained on. Sound has the length of Whisper's encoder, 30 seconds (Radford
    et al. 2022, arXiv:2212.04356, section 2.2). ``seq_len`` is the number of tokens in each text; no text goes with the
    images of task classification.
    """
    if family.main_input_name == "pixel_values":
        return {"pixel_values": _images(config, batch_size), "labels": torch.randint(config.num_labels, (batch_size,))}
    tokens = torch.randint(config.get_text_config().vocab_size, (batch_size, seq_len))
    if task == "contrastive":
        return {"input_ids": tokens, "pixel_values": _images(config.vision_config, batch_size)}
    if family.main_input_name == "input_features":
        frames = 2 * config.max_source_positions  # the second convolution halves them
        return {"input_features": torch.randn(batch_size, config.num_mel_bins, frames), "labels": tokens}
    return {"input_ids": tokens, "labels": tokens[:, 0] % 2 if task == "classification" else tokens}


def _images(config: PretrainedConfig, batch_size: int) -> torch.Tensor:
    return torch.randn(batch_size, config.num_channels, config.image_size, config.image_size)
