"""Put an attention variant into any Hugging Face model, save it and load it.

Importing this module registers the variants as attention functions (`interface`). A parameter-free variant
then needs only ``from_pretrained(..., attn_implementation="memstudy_window")``. Which variant fits which model:

===========================  ===================================================================================
softmax                      BERT, RoBERTa, DistilBERT, GPT-2, Llama, BART, T5, and others with self-attention
window, performer, lsh       the same without T5, whose score bias these variants don't support
linformer, nystrom           BERT, RoBERTa, DistilBERT, and BART's encoder alone:
                             ``convert_attention(model.get_encoder(), config)``
lowrank                      the seven named for softmax: replaces projections, keeps the attention function
memsizer                     none: MemSizer has no queries and keys that could take trained weights
===========================  ===================================================================================

**Cross-attention (BART's decoder to its encoder) stays exact** under a variant without cross-attention
(``config.cross`` is False): only self-attention is converted. lsh shares queries and keys, so the model's key
projection has no effect, and generation needs ``use_cache=False``.

A variant's own weights are attached to each attention module as ``memstudy``. The settings are in
``model.config.memstudy_attention`` and are saved with the config; without settings the variant's defaults hold.
transformers doesn't save the name of the implementation: pass ``attn_implementation`` again when loading, and use
`save_converted` and `load_converted` for a variant that has weights or changes the model's.

The model's own cache keeps all keys and values; a window only reads the part inside the window.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from memstudy.attention import ATTENTION, AttentionConfig
from memstudy.huggingface.families import FAMILIES, attends_elsewhere, known_attentions, ops, replace_projections
from memstudy.huggingface.interface import is_function


def convert_attention(
    model: PreTrainedModel, config: AttentionConfig, *, layers: Sequence[int] | None = None, seed: int = 0
) -> PreTrainedModel:
    """Replace the attention of a model, in place; the model's weights stay, or are factored (lowrank).

    The model gets its own copy of the config, so that a part (``model.get_encoder()``) can be converted alone.

    Parameters
    ----------
    model : PreTrainedModel
        For a parameter-free variant, any model that calls transformers' `AttentionInterface`; for the others, a model
        of a known family, see above.
    config : AttentionConfig
        The variant.
    layers : sequence of int, optional
        Indices of the attentions to convert, from 0 in the order of the model's modules; None for all. Only for
        variants that replace projections: a model has one attention function for all layers.
    seed : int
        Seed of the variant's own weights, if it has any.

    Returns
    -------
    PreTrainedModel
        The same model.

    Raises
    ------
    ValueError
        If the variant fits no trained model or not this one, the model can't change its attention, or the model has
        no such layers.
    """
    if not (config.projections or is_function(type(config))):
        raise ValueError(
            f"{config.name} has no queries and keys, so no trained weight has a place in it; "
            f"take one of {[name for name, c in ATTENTION.items() if c.projections or is_function(c)]}"
        )
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for part in models:
        if not part._can_set_attn_implementation():
            raise ValueError(
                f"{type(part).__name__} doesn't dispatch its attention through transformers' "
                "AttentionInterface, so it can't be converted"
            )
    _check_fit(model, config)
    if layers is not None and not config.projections:
        raise ValueError(f"layers={list(layers)}: {config.name} converts all layers of a model or none")
    if config.projections:
        replace_projections(model, config, layers)
    weights = {} if config.projections or config.parameter_free else _make_weights(model, config, seed)
    copies = {}
    for module in model.modules():
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            module.config = copy.deepcopy(module.config, copies)
        if hasattr(module, "memstudy"):  # from an earlier conversion
            del module.memstudy
    for op, made in weights.items():
        op.memstudy = made
    for part in models:
        part.config.memstudy_attention = config.settings() | ({} if layers is None else {"layers": list(layers)})
    if not config.projections:
        model.set_attn_implementation(f"memstudy_{config.name}")
    return model


def _check_fit(model: PreTrainedModel, config: AttentionConfig) -> None:
    before = (getattr(model.config, "memstudy_attention", None) or {}).get("variant")
    implementation = model.config._attn_implementation or ""
    if (before and ATTENTION[before].projections and before != config.name) or (
        config.projections and implementation.startswith("memstudy_")
    ):
        raise ValueError(
            f"the model is converted to {before or implementation} already, and {config.name} doesn't go with it; "
            "convert a fresh model"
        )
    for op in ops(model):
        family = FAMILIES.get(type(op).__name__)
        if family is not None and family.score_bias and not (config.score_bias or config.projections):
            able = [name for name, c in ATTENTION.items() if c.score_bias or c.projections]
            raise ValueError(
                f"{type(op).__name__} adds a bias to the scores, which {config.name} doesn't do; take one of {able}"
            )
        if not attends_elsewhere(op):
            try:
                config.check_causal(op.is_causal)
            except ValueError as error:
                raise ValueError(
                    f"{type(op).__name__}: {error}, or convert only the part of the model that fits "
                    "(model.get_encoder())"
                ) from None


def _make_weights(model: PreTrainedModel, config: AttentionConfig, seed: int) -> dict[torch.nn.Module, torch.nn.Module]:
    """Make the variant's own weights for each attention op of the model."""
    made = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for attention, family in known_attentions(model):
            op, like = attention.get_submodule(family.op), next(attention.parameters())
            made[op] = config.make_weights(getattr(op, family.head_dim))
            if (like.dtype, like.device.type) != (torch.get_default_dtype(), "cpu"):  # `to` fails on fake tensors
                made[op].to(like)
    return made


def save_converted(model: PreTrainedModel, folder: str | Path) -> None:
    """Save a converted model as ``config.json``, with the variant's settings, and ``model.safetensors``.

    Load the folder with `load_converted`. A plain ``from_pretrained`` returns the unconverted model: it drops the
    variant's weights and makes replaced projections random, and only a line in its report says so.

    Raises
    ------
    ValueError
        If the model is not converted, or only a part of it is.
    """
    if not getattr(model.config, "memstudy_attention", None):
        raise ValueError(
            f"this {type(model).__name__} is not converted as a whole; convert it with convert_attention, or save the "
            "part that is"
        )
    model.save_pretrained(folder, max_shard_size="1000TB")  # one file, whatever the size


def load_converted(folder: str | Path, model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """Load a model that `save_converted` saved: build, convert, then load every weight.

    Parameters
    ----------
    folder : str or Path
    model_class : type
        The class of the model that was saved.

    Returns
    -------
    PreTrainedModel
        In evaluation mode.

    Raises
    ------
    ValueError
        If the folder holds no settings or no readable weights, or if weights are missing, left over, or of another
        shape.
    """
    folder = Path(folder)
    config = model_class.config_class.from_pretrained(folder)
    settings = getattr(config, "memstudy_attention", None)
    if not settings:
        raise ValueError(
            f"{folder / 'config.json'} has no memstudy_attention: the model was not converted; use from_pretrained"
        )
    if settings.get("variant") not in ATTENTION:
        raise ValueError(
            f"{folder / 'config.json'}: unknown variant {settings.get('variant')!r}; known are {', '.join(ATTENTION)}"
        )
    config.memstudy_attention = None  # DecoderLM would convert itself
    model = model_class._from_config(config)
    own = {name: value for name, value in settings.items() if name not in ("variant", "layers")}
    convert_attention(model, ATTENTION[settings["variant"]](**own), layers=settings.get("layers"))
    path = folder / "model.safetensors"
    try:
        missing, unexpected = load_model(model, path, strict=False)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} can't be read ({error}); save the model again with save_converted") from error
    except RuntimeError as error:  # shapes differ
        raise ValueError(f"{path} doesn't fit {model_class.__name__} with {settings}: {error}") from error
    if missing or unexpected:
        raise ValueError(
            f"{path} doesn't fit {model_class.__name__} as converted: missing {sorted(missing)}, "
            f"unexpected {sorted(unexpected)}; give the class that was saved"
        )
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()
