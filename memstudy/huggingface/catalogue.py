"""Model configurations: of a model known by name, of one on the Hugging Face hub, or of a ``config.json``."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import transformers
import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from memstudy.huggingface.hub import fetch_config

HUB_MODELS = Path(__file__).with_name("hub_models.yaml")


@dataclass(frozen=True)
class HubModel:
    """A model known by name.

    ``hub`` lists the ids on the Hugging Face hub that name the model too. ``parameters`` is the published number of
    parameters, None if such weights were never published; ``source`` says where the settings and the number are from.
    ``config`` holds the settings that differ from the family's defaults in transformers.
    """

    hub: tuple[str, ...]
    parameters: int | None
    source: str
    config: dict[str, object]


@functools.cache
def hub_models() -> dict[str, HubModel]:
    """The models known by name."""
    entries = yaml.safe_load(HUB_MODELS.read_bytes())["models"]
    return {name: HubModel(**entry | {"hub": tuple(entry["hub"])}) for name, entry in entries.items()}


def model_config(model: str) -> transformers.PretrainedConfig:
    """The configuration of ``model``: a name in ``hub_models.yaml``, a hub id, or the path of a ``config.json``.

    A hub id in ``hub_models.yaml`` needs no network; of another only the ``config.json`` is fetched. Of a multimodal
    model, the configuration is that of its language model, where transformers has a class for the language model alone.

    Raises
    ------
    ValueError
        For an unknown name, a ``config.json`` that can't be had (see `fetch_config`), or one that transformers doesn't
        take without remote code or that asks for quantised weights.
    """
    if model.endswith(".json"):
        return _read_config(model, Path(model))
    for name, known in hub_models().items():
        if model in (name, *known.hub):
            return transformers.AutoConfig.for_model(**known.config)
    if "/" in model:
        return _read_config(model, fetch_config(model))
    similar = get_close_matches(model, hub_models(), n=3)
    raise ValueError(
        f"unknown model {model!r}{'; similar: ' + ', '.join(similar) if similar else ''}; `memstudy list models` has "
        "the names; for another model give its hub id (owner/name) or the path of its config.json"
    )


def _read_config(model: str, path: Path) -> transformers.PretrainedConfig:
    # transformers' own reader would look online for a missing file.
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"model {model}: {error.strerror}; the path of a config.json is needed") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"model {model}: not JSON: {error}") from None
    kind = given.get("model_type") if isinstance(given, dict) else None
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        remote = "; the code of its auto_map is never run" if isinstance(given, dict) and "auto_map" in given else ""
        raise ValueError(
            f"model {model}: model_type={kind!r} is unknown to transformers {transformers.__version__}{remote}"
        )
    try:
        config = transformers.CONFIG_MAPPING[kind].from_dict(given)
    except (StrictDataclassError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"model {model}: {' '.join(str(error).split())[:200]}") from None
    config = _language_model(config)
    quantised = given.get("quantization_config") or getattr(config, "quantization_config", None)
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ValueError(
            f"model {model}: quantization_config: the weights are quantised by {method!r}; give the model with whole "
            "weights, and the quantisation as a technique (`memstudy list techniques`)"
        )
    return config


def _language_model(config: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    """The decoder of a multimodal language model, if transformers has a class for it alone; else ``config``."""
    text = getattr(config, "text_config", None)
    family = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(getattr(text, "model_type", None))
    if family is None or config.is_encoder_decoder or config.model_type not in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES:
        return config
    text.architectures = [family]
    return text
