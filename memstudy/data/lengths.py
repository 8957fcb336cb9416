"""How many tokens the texts of a data set have, and the batches that a sampler makes of them."""

from __future__ import annotations

import bisect
import functools
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import datasets
import numpy as np
import pandas as pd
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.trainer_pt_utils import get_length_grouped_indices

from memstudy.data.sets import load

Sampler = Literal["shuffled", "grouped", "buckets", "packed"]
BUCKET_BATCHES = 20  # peft, method_comparison/MetaMathQA/run.py, ``BUCKET_FACTOR``
READERS = {".csv": "csv", ".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}


def read_lengths(path: Path, column: str | None = None) -> list[int]:
    """The token counts in a ``.csv``: those of ``column``, or of its only one, with or without a name.

    Raises
    ------
    ValueError
        For a file that can't be read or has no rows, a column that is missing or not named, and for anything but
        whole numbers from 1 on.
    """
    try:
        table = pd.read_csv(
            path, header=None, dtype=str, skipinitialspace=True, skip_blank_lines=False, na_filter=False
        )
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; the path of a .csv with token counts is needed") from None
    except pd.errors.EmptyDataError:
        raise ValueError(f"{path}: empty; a token count in each line is needed") from None
    except (ValueError, pd.errors.ParserError) as error:
        raise ValueError(f"{path}: not a CSV: {error}") from None
    names, first = table.iloc[0].tolist(), 1
    if column is None and len(names) > 1:
        raise ValueError(f"{path}: columns {', '.join(names)}: name that of the token counts with --field")
    if column is None:
        column = names[0]
        first = 0 if column.lstrip("-").isdecimal() else 1
    elif column not in names:
        raise ValueError(f"{path}: no column {column!r}, only {', '.join(names)}")
    texts = table[names.index(column)].iloc[first:]
    if texts.empty:
        raise ValueError(f"{path}: no token counts below the name {column!r}")
    lengths = []
    for line, text in enumerate(texts, start=first + 1):
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(f"{path}, line {line}: {text!r} is no token count: a whole number from 1 on is needed")
        lengths.append(int(text))
    return lengths


@functools.cache
def token_lengths(name: str, tokenizer: str, fields: tuple[str, ...] = ()) -> list[int]:
    """The tokens of each training text of a data set, with those that the tokenizer adds.

    Parameters
    ----------
    name : str
        A name that `load` knows, or the path of a ``.csv``, ``.parquet``, ``.jsonl`` or ``.txt``.
    tokenizer : str
        A folder, or a name on the Hugging Face hub.
    fields : tuple of str
        The columns that are joined to a text; by default the only one that holds text.

    Raises
    ------
    ValueError
        As `load`; for a tokenizer that is not found, and fields that are missing, not named or hold no text.
    """
    rows = _rows(name)
    known = [
        column for column, kind in rows.features.items() if getattr(kind, "dtype", "") in ("string", "large_string")
    ]
    if not fields and len(known) != 1:
        raise ValueError(f"{name}: name the columns of the text with --field; known: {', '.join(known)}")
    for field in fields:
        if field not in known:
            raise ValueError(f"{name}: no column of text {field!r}; known: {', '.join(known)}")
    encode, fields = _tokenizer(tokenizer), fields or known
    lengths: list[int] = []
    for batch in rows.select_columns(list(fields)).iter(batch_size=1000):
        texts = ["\n".join(parts) for parts in zip(*(batch[field] for field in fields), strict=True)]
        lengths += map(len, encode(texts, verbose=False)["input_ids"])
    if 0 in lengths:
        raise ValueError(f"{name}: row {lengths.index(0)} (from 0) has no tokens: leave the row out")
    return lengths


def _rows(name: str) -> datasets.Dataset:
    path = Path(name)
    if path.suffix not in READERS:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*miniature stands in", UserWarning)
            try:
                return load(name).splits["train"]
            except UserWarning as other:
                raise ValueError(
                    str(other).replace("the miniature stands in", "go online or set MEMSTUDY_DATA")
                ) from None
    if not path.is_file():
        raise ValueError(f"{name}: no such file")
    if not path.stat().st_size:
        raise ValueError(f"{name}: empty; texts are needed")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(READERS[path.suffix], data_files=str(path), split="train")
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        raise ValueError(f"{name}: can't be read as {READERS[path.suffix]}: {error.__cause__ or error}") from None


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        said = str(error).strip().splitlines()
        raise ValueError(
            f"tokenizer {name!r} not found: the folder of one, or a name on the Hugging Face hub, is needed "
            f"({said[0] if said else type(error).__name__})"
        ) from None


def batches(
    lengths: Sequence[int],
    batch_size: int,
    sampler: Sampler = "shuffled",
    *,
    longest: int | None = None,
    seed: int = 0,
    parts: int = 1,
) -> list[tuple[int, ...]]:
    """The batches of one epoch, each the lengths of its texts; the last may be smaller.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of each text.
    batch_size : int
        Texts in a batch; when packed, packs in a batch.
    sampler : {"shuffled", "grouped", "buckets", "packed"}
        ``grouped``: as transformers' ``LengthGroupedSampler``. ``buckets``: in the order given, each 20 batches sorted,
        longest first, as PEFT's comparison does. ``packed``: texts are packed best fit decreasing, as TRL does, and
        the packs shuffled.
    longest : int, optional
        The tokens of a pack; needed when packed.
    seed : int
    parts : int
        In how many batches an update is accumulated: each has that share of ``batch_size``.

    Raises
    ------
    ValueError
        For an unknown sampler, and a text that is longer than a pack.
    """
    if sampler not in get_args(Sampler):
        raise ValueError(f"unknown sampler {sampler!r}; known: {', '.join(get_args(Sampler))}")
    generator, size = torch.Generator().manual_seed(seed), batch_size // parts
    if sampler == "packed":
        packs = _packs(lengths, longest or max(lengths))
        order = torch.randperm(len(packs), generator=generator).tolist()
        return [
            tuple(length for place in order[start : start + size] for length in packs[place])
            for start in range(0, len(order), size)
        ]
    if sampler == "shuffled":
        order = torch.randperm(len(lengths), generator=generator).tolist()
    elif sampler == "grouped":
        order = get_length_grouped_indices(list(lengths), batch_size, generator=generator)
    else:
        bucket = batch_size * BUCKET_BATCHES
        starts = range(0, len(lengths), bucket)
        by_length = (-np.asarray(lengths[start : start + bucket]) for start in starts)
        order = [
            start + place
            for start, keys in zip(starts, by_length, strict=True)
            for place in np.argsort(keys, kind="stable")
        ]
    chosen = [lengths[place] for place in order]
    return [tuple(chosen[start : start + size]) for start in range(0, len(chosen), size)]


def _packs(lengths: Sequence[int], longest: int) -> list[list[int]]:
    """Each text, longest first, goes to the fullest pack with room (trl/data_utils.py, ``_pack_bfd``)."""
    if max(lengths) > longest:
        raise ValueError(f"a text of {max(lengths)} tokens is longer than a pack of {longest}")
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # of each pack, and the pack
    for length in sorted(lengths, reverse=True):
        place = bisect.bisect_left(room, (length, -1))
        if place < len(room):
            left, pack = room.pop(place)
        else:
            left, pack = longest, len(packs)
            packs.append([])
        packs[pack].append(length)
        bisect.insort(room, (left - length, pack))
    return packs


def padded_share(made: Sequence[Sequence[int]]) -> float:
    """The share of padding among the tokens of padded batches."""
    texts, tokens = sum(map(sum, made)), sum(len(batch) * max(batch) for batch in made)
    return 1 - texts / tokens
