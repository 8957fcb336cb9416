"""The models that are known by name, and those of a ``config.json``."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import transformers
import yaml
from huggingface_hub.errors import StrictDataclassError

HUB_MODELS = Path(__file__).with_name("hub_models.yaml")


def read_config(path: str) -> transformers.PretrainedConfig:
    """The configuration in a file; read here, for transformers would look for a missing one on the internet."""
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"model {path}: {error.strerror}; the path of a config.json is needed") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"model {path}: not JSON: {error}") from None
    kind = given.get("model_type") if isinstance(given, dict) else None
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise ValueError(f"model {path}: model_type={kind!r} is none that transformers knows")
    try:
        return transformers.CONFIG_MAPPING[kind].from_dict(given)
    except (StrictDataclassError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"model {path}: {' '.join(str(error).split())[:200]}") from None


@functools.cache
def hub_models() -> dict[str, dict]:
    """The models known by name, and what of their configuration differs from the family's defaults."""
    return yaml.safe_load(HUB_MODELS.read_bytes())
