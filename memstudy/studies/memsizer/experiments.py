"""The study's grids of runs, and the tables that only read models and records."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from memstudy.data import place_value
from memstudy.studies.memsizer import pairs
from memstudy.studies.memsizer.run import Seq2SeqRun
from memstudy.studies.seeds import interval, plus_minus
from memstudy.study import verdict

SCORES = {"bleu": "BLEU", "chrf": "chrF", "rouge1": "R-1", "rouge2": "R-2", "rougeL": "R-L", "perplexity": "perplexity"}
PARTS = {"test": "interpolation", "extrapolate": "extrapolation"}  # splits of the questions
_SETTING = {
    "rows trained on": "{train_rows:,.0f}",
    "updates": "{train_steps:,}",
    "epochs": "{epochs:.1f}",
    "batch [sequences]": "{batch_size}",
    "target tokens, padding included": "{target_tokens:,}",
    "source + target [tokens]": "{seq_len} + {target_len}",
    "vocabulary [tokens]": "{vocab_size:,}",
    "layers × width, each side": "{n_layers} × {hidden_size}",
    "learning rate": "{learning_rate:g}",
    "beams": "{num_beams}",
    "judged on": "{part}",
    "rows judged": "{rows:,.0f}",
}


def layer_parameters(models: Mapping[str, dict], **size: int) -> pd.DataFrame:
    """Number of parameters in one layer of encoder and decoder, by part (rows) and model (columns); no embeddings.

    ``models`` maps a model's name to MemSizer's settings by place; ``size`` gives the widths of a `Seq2SeqRun`.
    """
    small = {"n_layers": 1, "vocab_size": 8, "seq_len": 2, "target_len": 2, "batch_size": 1, "measure_steps": 1}
    counts: dict[str, Counter] = {name: Counter() for name in models}
    for name, memsizer in models.items():
        network = Seq2SeqRun(experiment=name, memsizer=memsizer, **small, **size).make_model().model
        for side in ("encoder", "decoder"):
            parts = {"self_attn": f"attention, {side}", "encoder_attn": "attention, cross"}
            parts |= dict.fromkeys(("fc1", "fc2"), "feed-forward")
            for child, module in getattr(network, side).layers[0].named_children():
                counts[name][parts.get(child, "norms")] += sum(weight.numel() for weight in module.parameters())
    order = ["attention, encoder", "attention, decoder", "attention, cross", "feed-forward", "norms"]
    return pd.DataFrame(counts).loc[order]


def published_steps(
    memsizer: dict, lengths: Mapping[str, Sequence], layers: Mapping[str, int], **size: int
) -> pd.DataFrame:
    """Steps of the published sizes: the Transformer, MemSizer, and MemSizer almost without a feed-forward part.

    Parameters
    ----------
    memsizer : dict
        MemSizer's settings by place.
    lengths, layers : mapping
        By task: pairs of source and target length [tokens]; layers of the encoder, as many as of the decoder.

    Returns
    -------
    pd.DataFrame
        ``task``, ``source``, ``target`` [tokens], ``model``, ``run``.
    """
    models = {"Transformer": {}, "MemSizer": {"memsizer": memsizer}}
    models["no feed-forward"] = models["MemSizer"] | {"feed_forward": 1}
    rows = []
    for task, sizes in lengths.items():
        for source, target in sizes:
            same = size | {"n_layers": layers[task], "seq_len": source, "target_len": target}
            for name, choices in models.items():
                run = Seq2SeqRun(experiment=f"{task}: {name}", **same | choices)
                rows.append((task, source, target, name, run))
    return pd.DataFrame(rows, columns=["task", "source", "target", "model", "run"])


def by_length(models: Mapping[str, dict], lengths: Sequence[int], **size: int) -> pd.DataFrame:
    """Steps and decoding without training: ``tokens`` (read, and as many written), ``model``, ``run``."""
    rows = [
        (n, name, Seq2SeqRun(experiment=name, memsizer=memsizer, seq_len=n, target_len=n, generated=n, **size))
        for n in lengths
        for name, memsizer in models.items()
    ]
    return pd.DataFrame(rows, columns=["tokens", "model", "run"])


def trainings(
    models: Mapping[str, dict],
    plans: Mapping[str, dict],
    seeds: Mapping[str, Sequence[int]],
    hashes: Mapping[str, str],
    **size: float,
) -> pd.DataFrame:
    """Trainings: ``dataset``, ``model``, ``seed``, ``run``.

    Parameters
    ----------
    models : mapping
        MemSizer's settings by place, by model.
    plans, hashes : mapping
        By data set: the choices of a `Seq2SeqRun` that differ from ``size``; the content hash.
    seeds : mapping
        The seeds of each model to train.

    Raises
    ------
    ValueError
        For seeds of a model that ``models`` lacks.
    """
    if unknown := seeds.keys() - models.keys():
        raise ValueError(f"unknown models {sorted(unknown)}; known: {', '.join(models)}")
    rows = []
    for dataset, plan in plans.items():
        same = {**size, **plan, "dataset": dataset, "data_hash": hashes[dataset]}
        for name in seeds:
            for seed in seeds[name]:
                own = {"experiment": name, "memsizer": models[name], "seed": seed, "generated": same["target_len"]}
                rows.append((dataset, name, seed, Seq2SeqRun(**same, **own)))
    return pd.DataFrame(rows, columns=["dataset", "model", "seed", "run"])


def judged(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of trainings on texts with the scores on the task's first test split, named as in ``SCORES``.

    Columns ``part`` and ``rows`` are the split and the number of its rows, ``judged`` is a header that names both.
    ROUGE-1 and -2 are left out for instructions.
    """
    found = []
    for row in rows.to_dict("records"):
        part = pairs.TASKS[row["dataset"]].tests[0]
        scores = {title: row.get(f"{part}_{metric}", math.nan) for metric, title in SCORES.items()}
        if part == "validation":
            scores |= {"R-1": math.nan, "R-2": math.nan}
        count = row[f"{part}_rows"]
        found.append({"part": part, "rows": count, "judged": f"{part}, {count:,.0f} rows", **scores})
    return rows.join(pd.DataFrame(found, index=rows.index))


def setting(rows: pd.DataFrame) -> pd.DataFrame:
    """The choices of each data set's trainings (columns), as texts, from `judged` rows."""
    columns = {}
    for row in rows.drop_duplicates("dataset").to_dict("records"):
        row["target_tokens"] = row["train_steps"] * row["batch_size"] * row["target_len"]
        columns[row["dataset"]] = {title: text.format(**row) for title, text in _SETTING.items()}
    return pd.DataFrame(columns)


def samples(rows: pd.DataFrame) -> pd.DataFrame:
    """The first text of each data set, as wanted and as each model wrote it (200 characters), from `judged` rows."""
    return pd.DataFrame(
        [
            (row.dataset, row.experiment, *(text[:200] for text in row.curves[f"{row.part}_texts"][0]))
            for row in rows.drop_duplicates(["dataset", "experiment"]).itertuples()
        ],
        columns=["data", "model", "source", "wanted", "written"],
    )


def by_place(rows: pd.DataFrame) -> pd.DataFrame:
    """Each run's answers by place asked for: ``part`` (of ``PARTS``), ``place``, ``model``, ``right``, ``asked``."""
    counts = [
        (called, place, row.experiment, *right_of)
        for row in rows.itertuples()
        for part, called in PARTS.items()
        for place, right_of in row.curves[f"{part}_by_place"].items()
    ]
    frame = pd.DataFrame(counts, columns=["part", "place", "model", "right", "asked"])
    return frame.astype({"place": pd.CategoricalDtype(place_value.PLACES, ordered=True)})


def timed(rows: pd.DataFrame, share: float) -> pd.DataFrame:
    """The rows of trainings on questions with the time of an epoch and until a ``share`` of the answers was right.

    Columns ``epoch_s``, ``updates_to``, ``seconds_to``; the last two are missing where no evaluation found the share.
    """
    first = [next((look for look in curves["right"] if look[2] >= share), [math.nan] * 3) for curves in rows["curves"]]
    updates, seconds, _ = zip(*first, strict=True)
    return rows.assign(epoch_s=rows["train_time_s"] / rows["epochs"], updates_to=updates, seconds_to=seconds)


def gap(rows: pd.DataFrame, column: str, form: str) -> str | None:
    """``column`` of MemSizer less that of the Transformer with the same seed: `seeds.plus_minus` with ``form``."""
    of_model = rows.set_index(["experiment", "seed"])[[column]].astype(float)
    return plus_minus(interval(of_model.loc["MemSizer"] - of_model.loc["Transformer"]), form)[column]


def speed_claims(said: pd.Series, predicted: pd.Series, tolerance: float) -> list[tuple[str, str, str, str, str]]:
    """Rows of the ledger: the published ratio of speeds by task, and the range ``predicted`` over lengths, by GPU.

    ``predicted`` has the levels ``task`` and ``gpu`` in its index, and no value where a step does not fit. The value of
    the range that is nearest to the published one is judged, with ``tolerance`` as a share of it.
    """
    rows = []
    for (task, gpu), (low, high) in predicted.groupby(["task", "gpu"], sort=False).agg(["min", "max"]).iterrows():
        claimed, nearest = (100 * (ratio - 1) for ratio in (said[task], np.clip(said[task], low, high)))
        found = f"{low:.2f} to {high:.2f}" if low < high else "does not fit" if np.isnan(low) else f"{low:.2f}"
        judged = verdict(nearest, claimed, claimed, 100 * tolerance * said[task])
        claim = f"speed, {task}, in training, predicted for the {gpu}: MemSizer / Transformer"
        rows.append((claim, f"{said[task]:.2f}", found, "–", judged))
    return rows
