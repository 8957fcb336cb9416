"""The study's runs by text, system and length; their loss curves; the texts of its ledger of claims."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from memstudy.figures import small_multiples
from memstudy.huggingface.catalogue import model_config
from memstudy.profiler import MIB
from memstudy.studies.reformer.run import ReformerRun
from memstudy.studies.seeds import interval, told
from memstudy.trainers.hub_model import HubModelRun
from memstudy.trainers.step import StepRun

TEXTS = {"wikitext-2-v1": "wikitext-2", "ptb": "penn treebank", "enwik8-prefix": "enwik8"}  # their published names
PIECES, N_PIECES = "crime-and-punishment", 320  # the text that the vocabulary is made of, and its size
EXACT = {"attention": {"variant": "softmax"}, "reversible": False}
SYSTEMS = {"Reformer C/P, no axial": {"max_positions": 524_288}, "Reformer C/P, axial": {}, "exact, axial": EXACT}
Lengths = Mapping[str, Sequence[int]]  # by text or by system [tokens]


def pairs(lengths: Lengths) -> list[tuple[str, int]]:
    """Each text or system with each of its lengths."""
    return [(name, n) for name, of_name in lengths.items() for n in of_name]


def axial_positions(seq_len: int, hidden_size: int) -> dict[str, tuple[int, int]]:
    """The settings of axial positions, as square as powers of two allow; a quarter of the width is the rows'."""
    rows, width = 1 << ((seq_len.bit_length() - 1) // 2), hidden_size // 4
    return {"axial_shape": (rows, seq_len // rows), "axial_widths": (width, hidden_size - width)}


def trainings(
    lengths: Lengths,
    exact: Lengths,
    axial: Lengths,
    controlled: Collection[str],
    *,
    tokens: int,
    evaluated: int,
    validations: int,
    hashes: Mapping[str, str],
    **common,
) -> list[ReformerRun]:
    """The trainings by text and length, each on the same number of ``tokens``, except "few updates".

    Experiments: "Reformer"; "exact" attention and "axial" positions at the lengths in ``exact`` and ``axial``. The
    ``controlled`` texts have two more, at all lengths but the longest: "few updates" makes as many updates as the
    longest length, and "large updates" makes as many in larger batches. Each is tested on ``evaluated`` tokens;
    ``hashes`` are the content hashes of the data sets; ``common`` are fields of `ReformerRun`.

    Raises
    ------
    ValueError
        For a text that is not among ``TEXTS``.
    """
    unknown = {*lengths, *exact, *axial, *controlled} - set(TEXTS)
    if unknown:
        raise ValueError(f"unknown texts {sorted(unknown)}; known: {', '.join(TEXTS)}")
    pieces = {"vocabulary": PIECES, "vocab_size": N_PIECES, "vocabulary_hash": hashes[PIECES]}
    letters = {"vocabulary": "bytes", "vocab_size": 257}
    batch, runs = common["batch_size"], []
    for text, n in pairs(lengths):
        longest = max(lengths[text])
        updates, fewest = (max(1, tokens // (length * batch)) for length in (n, longest))
        plans: dict[str, dict] = {"Reformer": {}}
        if n in exact.get(text, []):
            plans["exact"] = EXACT
        if n in axial.get(text, []):
            plans["axial"] = axial_positions(n, common["hidden_size"])
        if text in controlled and n < longest:
            plans["few updates"] = {"train_steps": fewest}
            plans["large updates"] = {"train_steps": fewest, "batch_size": batch * longest // n}
        of_text = {"dataset": text, "data_hash": hashes[text]} | (letters if TEXTS[text] == "enwik8" else pieces)
        of_length = {"seq_len": n, "eval_blocks": max(1, evaluated // n), "train_steps": updates}
        for name, plan in plans.items():
            choices = common | of_text | of_length | plan
            runs.append(ReformerRun(experiment=name, validations=min(validations, choices["train_steps"]), **choices))
    return runs


def training_steps(lengths: Lengths, models: Mapping[str, str], *, batch_size: int, **common) -> list[StepRun]:
    """One training step by system and length: of this project's model (``SYSTEMS``), or of the hub's ``models``.

    ``common`` are fields of `ReformerRun`.
    """
    runs: list[StepRun] = []
    for system, n in pairs(lengths):
        step = {"experiment": system, "batch_size": batch_size, "seq_len": n, "measure_steps": 1}
        step["optimizer"] = "adafactor"
        if system in SYSTEMS:
            axial = {} if "no axial" in system else axial_positions(n, common["hidden_size"])
            runs.append(ReformerRun(**common | step | axial | SYSTEMS[system], vocab_size=N_PIECES))
        else:
            runs.append(HubModelRun(model=models[system], **step))
    return runs


def published_positions(models: Mapping[str, str]) -> dict[str, object]:
    """Values for the report on the positions of the published ``models``, the hub's by system: weights and spread."""
    configs = {system: model_config(model) for system, model in models.items()}
    axial, learned = configs["Reformer C/P, axial"], configs["Reformer C/P, no axial"]
    sides = zip(axial.axial_pos_shape, axial.axial_pos_embds_dim, strict=True)
    return {
        "positions": learned.max_position_embeddings,
        "learned_mib": 4 * learned.max_position_embeddings * learned.hidden_size / MIB,
        "axial_mib": f"{4 * sum(side * width for side, width in sides) / MIB:.1f}",
        "axial_spread": f"{axial.axial_norm_std:g}",
        "learned_spread": f"{learned.initializer_range:g}",
        "gpt2_positions": configs["GPT2 base"].n_positions,
    }


def by_length(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of a sweep by ``experiment`` and ``seq_len`` [tokens]; a prediction's length is that of its run."""
    if "of" in rows:
        rows = rows.assign(seq_len=rows["of"].map(lambda run: run.seq_len))
    return rows.set_index(["experiment", "seq_len"])


def first_below(one: pd.Series, other: pd.Series) -> int | None:
    """The length from which on ``one`` stays below ``other``, both by length; None where there is none."""
    longest_above = max(one.index[one >= other], default=0)
    return min(one.index[one.index > longest_above], default=None)


def changes(rows: pd.DataFrame, experiment: str, base: str) -> pd.DataFrame:
    """The `interval` of the change of ``experiment``'s test perplexity from ``base``'s with the same seed [%].

    One row for each data set and length at which both were trained.
    """
    by_seed = rows.pivot(index="seed", columns=["experiment", "dataset", "seq_len"], values="test_perplexity")
    ratio = by_seed[experiment].astype(float) / by_seed[base].astype(float)
    return interval(100 * (ratio - 1)).dropna(subset="mean")


def quality_lost(rows: pd.DataFrame) -> pd.Series:
    """By length, the Reformer's largest rise of perplexity from exact attention's [%], over texts.

    A change that the seeds do not tell from none counts as none; missing for one seed.
    """
    change = changes(rows, "Reformer", "exact")
    return change["mean"].where(told(change), 0).where(change["low"].notna()).groupby("seq_len").max()


def loss_curves(rows: pd.DataFrame, label: str) -> Figure:
    """Loss in training and in validation of the trainings ``rows`` over the tokens seen, by length.

    Solid: the Reformer; dotted: exact attention. ``label`` is that of the losses' axis.
    """
    curves = {"training": "train_loss", "validation": "validation_loss"}
    panels = small_multiples(list(curves), columns=2, height=2.5, margin=0, sharey=True)
    colors = {n: f"C{number}" for number, n in enumerate(rows["seq_len"].unique())}
    for row, (title, axes) in itertools.product(rows.itertuples(), panels.items()):
        steps, losses = np.transpose(row.curves[curves[title]])
        look = {"linestyle": "-" if row.experiment == "Reformer" else ":", "marker": "." if len(losses) < 20 else None}
        seen = steps * row.batch_size * row.seq_len / 1000
        axes.plot(seen, losses, color=colors[row.seq_len], label=f"{row.seq_len:,}, {row.experiment}", **look)
        axes.set_title(title, loc="left")
    first = panels["training"]
    first.set_ylabel(label)
    first.figure.supxlabel("tokens trained on [thousand]", fontsize=9)
    first.figure.legend(*first.get_legend_handles_labels(), ncols=3, loc="outside upper center", fontsize=7)
    return first.figure


def listed(values: pd.Series, unit: str = "", *, digits: int = 0, separator: str = ", ") -> str:
    """The ``values`` without the missing ones, as one text; a dash if all are missing."""
    there = values.dropna()
    return separator.join(f"{value:,.{digits}f}" for value in there) + unit if len(there) else "–"


def trend_claim(
    claim: str,
    published: pd.Series,
    found: pd.Series,
    unit: str = "",
    digits: int = 0,
    kind: str = "measured",
    by_seed: pd.DataFrame | None = None,
) -> tuple:
    """A row of the ledger of claims, on a trend with the length, by which both series are indexed.

    Reproduced: ``found``, measured or predicted (``kind``), goes the published way from each length to the next;
    partly: from the first to the last. Where ``by_seed`` has a row for each of several seeds and a column for each
    length, a change counts only if the seeds tell it from none.
    """
    published, found = published.sort_index(), found.sort_index()
    way = np.sign(published.iloc[-1] - published.iloc[0])
    rows = found.to_frame().T if by_seed is None else by_seed[found.index]
    steps = rows.diff(axis=1).iloc[:, 1:].assign(whole=rows.iloc[:, -1] - rows.iloc[:, 0])
    changes = interval(way * steps)
    goes = changes["mean"].gt(0) & (told(changes) | changes["low"].isna())
    verdict = "reproduced" if goes.all() else "partly" if goes["whole"] else "not reproduced"
    there, here = (listed(values, unit, digits=digits) for values in (published, found))
    results = {"predicted": "–", "measured": "–", kind: here}
    return claim, there, *results.values(), verdict if len(found) > 1 else "not testable here"
