"""Model configurations: known by name, or read from a ``config.json``."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import transformers
import yaml
from huggingface_hub.errors import StrictDataclassError

HUB_MODELS = Path(__file__).with_name("hub_models.yaml")


def read_config(path: str) -> transformers.PretrainedConfig:
    """Read a ``config.json`` from disk; transformers' own reader would look online for a missing file."""
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"model {path}: {error.strerror}; the path of a config.json is needed") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"model {path}: not JSON: {error}") from None
    kind = given.get("model_type") if isinstance(given, dict) else None
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise ValueError(f"model {path}: model_type={kind!r} is unknown to transformers")
    try:
        return transformers.CONFIG_MAPPING[kind].from_dict(given)
    except (StrictDataclassError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"model {path}: {' '.join(str(error).split())[:200]}") from None


@functools.cache
def hub_models() -> dict[str, dict]:
    """The models known by name, each with the settings that differ from its family's defaults in transformers."""
    return yaml.safe_load(HUB_MODELS.read_bytes())
