"""The study of single attention layers: runs, closed forms, patterns of attention, panels by layer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure

from memstudy.attention import ATTENTION, MemSizerAttention, MemSizerConfig
from memstudy.attention.settings import mixer_of
from memstudy.figures import MARKERS, small_multiples
from memstudy.huggingface.catalogue import model_config
from memstudy.profiler import MIB
from memstudy.studies.attention_layer.peers import PEERS
from memstudy.studies.attention_layer.run import LayerRun
from memstudy.trainers.generation import GenerationRun

# Settings as the papers recommend them.
LAYERS: dict[str, dict] = {
    "softmax": {"variant": "softmax"},
    "softmax_lean": {"variant": "softmax", "recompute": True},
    "window": {"variant": "window", "window": 256},
    "lsh_8": {"variant": "lsh", "num_hashes": 8},
    "lsh_1": {"variant": "lsh", "num_hashes": 1},
    "linformer": {"variant": "linformer", "rank": 128},
    "nystrom": {"variant": "nystrom", "landmarks": 64},
    "lowrank": {"variant": "lowrank", "rank": 64},
    "performer": {"variant": "performer", "features": 256},
    "memsizer": {"variant": "memsizer", "slots": 4},
    "memsizer_cross": {"variant": "memsizer", "slots": 32},
}
CROSS = {"memsizer_cross"}  # attend to a second sequence

# Title, settings and is_causal.
GALLERY = [
    ("softmax, causal", {"variant": "softmax"}, True),
    ("softmax", {"variant": "softmax"}, False),
    ("window 12, causal", {"variant": "window", "window": 12}, True),
    ("window 12", {"variant": "window", "window": 12}, False),
    ("LSH, 1 hash", {"variant": "lsh", "num_hashes": 1, "chunk_length": 8}, True),
    ("LSH, 8 hashes", {"variant": "lsh", "num_hashes": 8, "chunk_length": 8}, True),
    ("Linformer, rank 16", {"variant": "linformer", "rank": 16}, False),
    ("Nyström, 8 landmarks", {"variant": "nystrom", "landmarks": 8}, False),
    ("Performer, 64 feat.", {"variant": "performer", "features": 64}, True),
    ("Performer, 1,024 feat.", {"variant": "performer", "features": 1024}, True),
]


def layer_runs(
    names: Collection[str], seq_lens: Iterable[int], seeds: Iterable[int] = (0,), *, peers: Mapping[str, int],
    **sizes: int,
) -> pd.DataFrame:  # fmt: skip
    """The runs of the layers called ``names``, or of all when empty: every field as a column, and the ``run`` itself.

    ``peers`` are those to be run too, each with its longest length [tokens]; ``sizes`` are fields of `LayerRun`. A
    layer is causal where its variant can be, unless it attends to a second sequence.

    Raises
    ------
    ValueError
        For an unknown name.
    """
    if unknown := set(names) - set(LAYERS):
        raise ValueError(f"unknown layers {sorted(unknown)}; known: {', '.join(LAYERS)}")
    runs = [
        LayerRun(
            experiment=name, who=who, attention=_at_length(settings, seq_len), seq_len=seq_len, seed=seed,
            is_causal=name not in CROSS and True in ATTENTION[settings["variant"]].causal, cross=name in CROSS, **sizes,
        )
        for name, settings in LAYERS.items()
        if not names or name in names
        for seq_len in seq_lens
        for who in ["memstudy", *(who for who, longest in peers.items() if seq_len <= longest)]
        if who == "memstudy" or PEERS[who].variant == settings["variant"]
        for seed in seeds
    ]  # fmt: skip
    return pd.DataFrame([dict(run) | {"run": run} for run in runs])


def kept_mib(run: LayerRun) -> float:
    """Memory that the layer of ``run`` keeps for its backward pass [MiB], in closed form."""
    return 4 * run.mixer().saved_elements(*_shape(run), is_causal=run.is_causal) / MIB


def state_mib(run: LayerRun) -> float:
    """Memory that decoding keeps after ``run.seq_len`` tokens [MiB], in closed form."""
    return 4 * run.mixer().state_elements(*_shape(run)) / MIB


SHORT = (9, 17, 33)  # tokens of text that are followed: a recurrent model takes them one by one


def while_decoding(
    models: Iterable[str],
    variants: Mapping[str, dict],
    lengths: Sequence[int],
    *,
    like: str,
    batch_size: int,
    gpu: str,
) -> pd.DataFrame:
    """Memory [MiB] that decoding keeps beside the weights, a row for each of ``lengths`` [tokens].

    A column for each of ``models``, whose caches of keys and values or states are predicted on ``gpu``, and go on as
    the line through two of `SHORT`: not for a sliding window. And one for each of ``variants``, in fp32 and closed
    form, in as many layers of the shape that the model ``like`` has.

    Raises
    ------
    ValueError
        When a model's third short text is not on the line.
    """
    table = pd.DataFrame(index=pd.Index(lengths, name="seq_len"))
    for model in models:
        run = GenerationRun(experiment="decoding", model=model, seq_len=SHORT[0], new_tokens=2, batch_size=batch_size)
        reports = [run.model_copy(update={"seq_len": length}).foretell(gpu) for length in SHORT]
        kept = [report.timeline[-1][2]["cache"] / MIB for report in reports]
        slopes = np.diff(kept) / np.diff(SHORT)
        if slopes[0] != slopes[1]:
            raise ValueError(f"{model}: what decoding keeps is no line in the length: {kept} MiB at {SHORT} tokens")
        table[model] = kept[0] + slopes[0] * (table.index - SHORT[0])
    config = model_config(like).get_text_config()
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    for name, settings in variants.items():
        kept = [mixer_of(_at_length(settings, n)).state_elements(batch_size, heads, n, width) for n in lengths]
        table[name] = [4 * config.num_hidden_layers * elements / MIB for elements in kept]
    return table


def crossover(table: pd.DataFrame, growing: str, constant: str) -> float:
    """The length [tokens] at which the column ``growing`` of `while_decoding` passes ``constant``, by a line."""
    first, last = table.index[[0, -1]]
    slope = (table[growing][last] - table[growing][first]) / (last - first)
    return first + (table[constant][first] - table[growing][first]) / slope


def patterns(variants: Collection[str], n_tokens: int) -> dict[str, torch.Tensor]:
    """Attention weights of ``variants`` on a slow random walk, ``(n_tokens, n_tokens)`` by title.

    With one-hot values an op returns its weights. MemSizer has a layer only: see `memsizer_weights`.
    """
    torch.manual_seed(0)
    walk = torch.randn(1, 1, n_tokens, n_tokens).cumsum(2)
    walk = 12 * walk / walk.norm(dim=-1, keepdim=True)  # rows of equal length: the score falls off with the distance
    found = {}
    for title, settings, is_causal in GALLERY:
        if settings["variant"] in variants:
            config = mixer_of(_at_length(settings, n_tokens))
            weights = config.make_weights(n_tokens)
            options = {} if weights is None else {"weights": weights}
            found[title] = config.attend(walk, walk, torch.eye(n_tokens)[None, None], is_causal=is_causal, **options)
    if "memsizer" in variants:
        layer = MemSizerAttention(n_tokens, 8, MemSizerConfig(slots=4), is_causal=True)
        found["MemSizer, 4 slots"] = memsizer_weights(layer, walk[0])[None]
    return {title: weights[0, 0].detach() for title, weights in found.items()}


def memsizer_weights(layer: MemSizerAttention, hidden_states: torch.Tensor) -> torch.Tensor:
    """Weights a_t · k_s / √t, ``(batch, seq, seq)``, of the causal ``layer`` on ``hidden_states`` (batch, seq, hidden).

    Multiplied by the layer's normalised values they give its output.
    """
    read = layer.query_proj(hidden_states).unflatten(-1, (layer.num_heads, -1)).softmax(-1).mean(-2)
    keys = layer.key_norm(layer.key_proj(hidden_states))
    return (read @ keys.transpose(1, 2)).tril() / torch.arange(1, hidden_states.shape[1] + 1)[:, None] ** 0.5


def panels(measured: pd.DataFrame, column: str, label: str) -> Figure:
    """Draw ``column`` of ``measured`` against the length: a panel a layer, a line a package, both axes logarithmic.

    The index of ``measured`` is ``experiment``, ``who``, ``seq_len``; ``label`` is that of the vertical axis.
    """
    points = measured.reset_index()
    whose, lengths = points["who"].unique(), sorted(points["seq_len"].unique())
    looks = zip(whose, sns.color_palette("tab10", len(whose)), MARKERS, strict=False)
    look = {who: {"label": who, "color": color, "marker": marker, "markersize": 4} for who, color, marker in looks}
    shared = {"sharex": True, "sharey": True}
    axes_of = small_multiples(points["experiment"].unique(), columns=3, height=1.5, margin=0.7, **shared)
    for (layer, who), line in points.groupby(["experiment", "who"], sort=False):
        axes_of[layer].loglog(line["seq_len"], line[column], **look[who])
    for layer, axes in axes_of.items():
        axes.set_title(layer, loc="left")
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths], fontsize=6)
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    lines = {line.get_label(): line for axes in axes_of.values() for line in axes.lines}
    axes.figure.legend(handles=lines.values(), ncols=3, loc="outside upper center", columnspacing=1.0)
    axes.figure.supxlabel("sequence [tokens]", fontsize=9)
    axes.figure.supylabel(label, fontsize=9)
    return axes.figure


def _at_length(attention: dict, seq_len: int) -> dict:
    """The settings ``attention`` for ``seq_len`` tokens, on which the size of Linformer's matrices depends."""
    return attention | ({"max_len": seq_len} if attention["variant"] == "linformer" else {})


def _shape(run: LayerRun) -> tuple[int, int, int, int]:
    return run.batch_size, run.n_heads, run.seq_len, run.hidden_size // run.n_heads
