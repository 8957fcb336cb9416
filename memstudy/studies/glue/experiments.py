"""The study of low-rank attention in BERT: models, runs, paired differences between models, and a figure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from memstudy.figures import MARKERS, small_multiples
from memstudy.studies.glue.run import FineTuneRun
from memstudy.studies.glue.significance import compare
from memstudy.studies.glue.tasks import TASKS
from memstudy.trainers.hub_model import HubModelRun


def training_steps(model: str, ranks: Iterable[int], mixtures: Iterable[int], **size: int) -> dict[str, HubModelRun]:
    """A training step of the classifier ``model`` with each attention, by name, at the ``size`` of a `HubModelRun`.

    ``unchanged``; ``lowrank_<rank>``, projections of each of ``ranks``, and ``lowrank_full`` of full rank;
    ``linformer_<k>``, Linformer with each number k of ``mixtures``.
    """
    options = {"model": model, "task": "classification", **size}
    width = HubModelRun(experiment="width", **options).config().hidden_size
    models: dict[str, dict] = {"unchanged": {}}
    models |= {f"lowrank_{rank}": {"variant": "lowrank", "rank": rank} for rank in ranks}
    models |= {"lowrank_full": {"variant": "lowrank", "rank": width}}
    models |= {f"linformer_{k}": {"variant": "linformer", "rank": k, "max_len": size["seq_len"]} for k in mixtures}
    return {name: HubModelRun(experiment=name, convert_to=settings, **options) for name, settings in models.items()}


def fine_tunings(models: Mapping[str, dict], seeds: Iterable[int], **choices) -> list[FineTuneRun]:
    """A run for each of ``models`` (settings of the attention, by name) and seed; ``choices`` hold for all runs."""
    return [
        FineTuneRun(experiment=name, convert_to=settings, seed=seed, **choices)
        for name, settings in models.items()
        for seed in seeds
    ]


def on_tasks(
    plans: Iterable[dict], models: Mapping[str, dict], few: Collection[str], seeds: Iterable[int], **recipe
) -> list[FineTuneRun]:
    """Fine-tunings on several tasks, one plan a task.

    A plan has ``rows`` (0: all) and ``models`` ("all", or "few": those named in ``few``); its other entries are fields
    of the runs and go before those of the ``recipe``.
    """
    runs = []
    for plan in plans:
        chosen = models if plan["models"] == "all" else {name: models[name] for name in few}
        own = {name: value for name, value in plan.items() if name not in ("rows", "models")}
        runs += fine_tunings(chosen, seeds, **recipe | own, train_rows=plan["rows"] or 1_000_000)
    return runs


def at_rates(runs: Iterable[FineTuneRun], factors: Iterable[float]) -> list[FineTuneRun]:
    """Each of ``runs`` at multiples of its learning rate, as the experiment ``rate × <factor>``."""
    return [
        run.model_copy(update={"experiment": f"rate × {factor:g}", "learning_rate": factor * run.learning_rate})
        for factor in factors
        for run in runs
    ]


def one_layer_at_a_time(layers: Iterable[int], rank: int, seeds: Iterable[int], **choices) -> list[FineTuneRun]:
    """Fine-tunings of the unchanged model, of models with one of ``layers`` factored at ``rank``, and with all."""
    factors = {"variant": "lowrank", "rank": rank}
    runs = fine_tunings({"unchanged": {}}, seeds, **choices)
    for layer in layers:
        runs += fine_tunings({f"layer_{layer}": factors}, seeds, layers=(layer,), **choices)
    return runs + fine_tunings({"all_layers": factors}, seeds, **choices)


def differences(rows: pd.DataFrame, baseline: str = "unchanged") -> pd.DataFrame:
    """Each model's score minus that of ``baseline``, paired over held-out rows and seeds, from rows of `FineTuneRun`.

    Index ``task``, ``experiment``; columns ``significant`` and the fields of `significance.Difference`.
    """
    found = {}
    for task, of_task in rows.groupby(rows["dataset"].str.removeprefix("glue/"), sort=False):
        predictions = {
            name: np.stack([curves["predictions"] for curves in runs.sort_values("seed")["curves"]])
            for name, runs in of_task.groupby("experiment", sort=False)
        }
        labels, theirs = of_task["curves"].iloc[0]["labels"], predictions.pop(baseline)
        for name, ours in predictions.items():
            found[task, name] = compare(ours, theirs, labels, TASKS[task].metrics[0])
    index = pd.MultiIndex.from_tuples(found, names=["task", "experiment"])
    return pd.DataFrame([asdict(one) | {"significant": one.significant} for one in found.values()], index=index)


def in_hundredths(differences: pd.DataFrame) -> pd.Series:
    """Each row of `differences` as text: the difference and its interval, in hundredths of the score."""
    texts = [f"{100 * d.difference:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]" for d in differences.itertuples()]
    return pd.Series(texts, differences.index)


def constant_answers(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of a model ``constant`` that always gives a task's most frequent label, from ``rows`` of one model."""

    def answered(curves: Mapping) -> dict:
        values, counts = np.unique(curves["labels"], return_counts=True)
        return {"labels": curves["labels"], "predictions": np.full(len(curves["labels"]), values[counts.argmax()])}

    return rows.assign(experiment="constant", curves=rows["curves"].map(answered))


def quality_against_memory(points: pd.DataFrame, peak: pd.Series, titles: Mapping[str, str], label: str) -> Figure:
    """Draw scores against memory: a panel a task, by ``titles``, with the interval of each difference.

    ``points`` has the rows of `differences` and of ``unchanged``, and a column ``score``; ``peak`` [MiB] is by model,
    in the legend's order; ``label`` is that of the horizontal axis.
    """
    names = peak.index.intersection(points.index.unique("experiment"), sort=False)
    colors = {name: "C0" if name.startswith("lowrank") else "C1" for name in names} | {"unchanged": "0.2"}
    marks = dict(zip(names, MARKERS, strict=False))
    hollow = points["significant"].eq(False)
    panels = small_multiples(list(titles), columns=3, height=1.7, margin=0.6, sharex=True)
    for (task, name), point in points.iterrows():
        span = [[point["difference"] - point["low"]], [point["high"] - point["difference"]]]
        look = {"fmt": marks[name], "color": colors[name], "markersize": 4, "capsize": 2}
        panels[task].errorbar(peak[name], point.score, yerr=span, mfc="white" if hollow[task, name] else None, **look)
    for task, axes in panels.items():
        axes.axhline(points["score"][task, "unchanged"], color="0.3", linewidth=0.8, linestyle="--")
        axes.set_title(titles[task], loc="left")
    figure = axes.figure
    dots = [Line2D([], [], c=colors[name], marker=marks[name], ls="", label=name.replace("_", " ")) for name in names]
    figure.legend(handles=dots, ncols=min(5, len(names)), loc="outside upper center", fontsize=7)
    figure.supxlabel(label, fontsize=9)
    figure.supylabel("score on held-out rows, measured", fontsize=9)
    return figure
