"""Training vision transformers on an RTX 3090, timed by timm (huggingface/pytorch-image-models, 2022)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pandas as pd
import torch
from torch.nn.functional import cross_entropy
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher, ViTConfig, ViTForImageClassification

from memstudy.studies.published.times import HERE, Row

SIZES = {  # width, heads, blocks
    "tiny": (192, 3, 12),
    "small": (384, 6, 12),
    "base": (768, 12, 12),
    "large": (1024, 16, 24),
}


def train(name: str, batch: int, pixels: int) -> Callable[[], None]:
    """A step of timm's benchmark.py with autocast and SGD, by transformers' models of the same sizes.

    timm makes query, key and value by one product, transformers by three. PyTorch 1.12 cleared gradients by zeros and
    updated parameter by parameter.
    """
    _, size, *_, patch, _ = name.split("_")
    width, heads, blocks = SIZES[size]
    sizes = {
        "hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": blocks, "intermediate_size": 4 * width,
        "image_size": pixels, "patch_size": int(patch.removeprefix("patch")), "num_labels": 1000,
        "hidden_dropout_prob": 0.0, "attn_implementation": "eager",
    }  # fmt: skip
    distilled = "_distilled_" in name
    model = (
        DeiTForImageClassificationWithTeacher(DeiTConfig(**sizes))
        if distilled
        else ViTForImageClassification(ViTConfig(**sizes))
    )
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, foreach=False)
    images, targets = torch.randn(batch, 3, pixels, pixels), torch.randint(1000, (batch,))

    def step():
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast("cuda", torch.float16):
            loss = cross_entropy(model(images).logits, targets)
        loss.backward()
        optimizer.step()

    return step


def rows() -> list[Row]:
    """ViTs without further parts, and DeiTs, which are ViTs too; images in the default layout."""
    return [
        Row("vision", row.model, "RTX3090", row.step_ms, partial(train, row.model, row.batch, row.img_size), "step")
        for row in pd.read_csv(HERE / "timm_transformers.csv").itertuples()
    ]
