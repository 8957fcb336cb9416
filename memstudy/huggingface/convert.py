"""Put an attention variant into any Hugging Face model, save it and load it.

Importing this module registers the variants as attention functions (`interface`), so that the parameter-free ones need
no more than ``from_pretrained(..., attn_implementation="memstudy_window")``. What fits which model:

===========================  ===================================================================================
softmax                      BERT, RoBERTa, DistilBERT, GPT-2, Llama, BART, T5, and others with self-attention
window, performer, lsh       the same but T5, whose bias of the scores they don't add
linformer, nystrom           BERT, RoBERTa, DistilBERT, and BART's encoder alone:
                             ``convert_attention(model.get_encoder(), config)``
lowrank                      the seven above: replaces projections, the model's own attention function stays
memsizer                     none: it has no queries and keys, so no trained weight has a place in it
===========================  ===================================================================================

**Attention from one sequence to another (BART's decoder to its encoder) stays exact** under a variant that isn't for
two sequences (``config.cross`` is False), so only self-attention is converted. With lsh, which shares queries and
keys, the model's projection of keys is left without effect, and tokens are generated with ``use_cache=False``.

Weights of a variant's own are attached as ``memstudy`` to each module that attends. The settings stand in
``model.config.memstudy_attention`` and are saved with the config; without them the variant's defaults hold.
transformers doesn't save the name of the implementation: give ``attn_implementation`` again when loading, and use
`save_converted` and `load_converted` where a variant has weights or changes them.

Keys and values in the model's own cache stay complete; a window only reads its part of them.
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
    """Replace the attention of a model, in place; its weights stay as they are, or are factored (lowrank).

    The model gets a config of its own, so that a part (``model.get_encoder()``) can be converted alone.

    Parameters
    ----------
    model : PreTrainedModel
        Parameter-free variants: any whose attention goes through transformers' `AttentionInterface`; the others: a
        known family, see above.
    config : AttentionConfig
        The variant.
    layers : sequence of int, optional
        Which of the model's attentions, counted from 0 in the order of its modules; None for all. Only for variants
        that replace projections: the attention function is one for the whole model.
    seed : int
        For the weights of variants that have some; no effect on the others.

    Returns
    -------
    PreTrainedModel
        The same model.

    Raises
    ------
    ValueError
        For a variant that fits no trained model, or not this one, a model that can't change its attention, or layers
        that it doesn't have.
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
        if hasattr(module, "memstudy"):  # of the variant before
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
    """Make what each op of the model needs beside query, key and value."""
    made = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for attention, family in known_attentions(model):
            op, like = attention.get_submodule(family.op), next(attention.parameters())
            made[op] = config.make_weights(getattr(op, family.head_dim))
            if (like.dtype, like.device.type) != (torch.get_default_dtype(), "cpu"):  # on fake tensors `to` fails
                made[op].to(like)
    return made


def save_converted(model: PreTrainedModel, folder: str | Path) -> None:
    """Save a converted model: ``config.json`` with the variant's settings, ``model.safetensors``.

    Load it with `load_converted`. A plain ``from_pretrained`` of the folder makes the unconverted model: it drops the
    variant's weights, and makes random ones for projections that were replaced, with no more than a line in its report.

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
    """Load what `save_converted` saved: build, convert, then fill in every weight.

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
    config.memstudy_attention = None  # a model of our own would convert itself
    model = model_class._from_config(config)
    own = {name: value for name, value in settings.items() if name not in ("variant", "layers")}
    convert_attention(model, ATTENTION[settings["variant"]](**own), layers=settings.get("layers"))
    path = folder / "model.safetensors"
    try:
        missing, unexpected = load_model(model, path, strict=False)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} can't be read ({error}); save the model again with save_converted") from error
    except RuntimeError as error:  # shapes
        raise ValueError(f"{path} doesn't fit {model_class.__name__} with {settings}: {error}") from error
    if missing or unexpected:
        raise ValueError(
            f"{path} doesn't fit {model_class.__name__} as converted: missing {sorted(missing)}, "
            f"unexpected {sorted(unexpected)}; give the class that was saved"
        )
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()
