"""Data sets by name: from a folder, the Hugging Face hub or SpeakLeash, or the offline miniature.

Folders, the hub and SpeakLeash share one layout: parquet files named ``<split>.parquet`` (on the hub
``<split>-00000-of-00001.parquet``), or plain texts, ``*.txt``. A new set is one entry in ``DATASETS``.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import huggingface_hub

from memstudy.data import sources
from memstudy.machine import cache_folder

SPEAKLEASH = "speakleash/shopping_1_general_corpus"
PLACE_VALUE = "mathematics-numbers-place-value"
WIKITEXT = ("Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3")
GLUE = ("nyu-mll/glue", "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c")


@dataclass(frozen=True)
class Entry:
    """The description of a data set; ``hub`` is (repository, commit, folder), None for a set that is not on the hub."""

    what: str
    licence: str
    hub: tuple[str, str, str] | None = None
    prose: bool = True  # running text, for which the miniature can stand in
    column: str = "text"  # the column of the running text


DATASETS = {
    "polish-books": Entry("12 Polish books, stand-in for SpeakLeash", "public domain"),
    SPEAKLEASH: Entry("Polish shop texts; any other speakleash/<corpus> works too", "see the corpus's manifest"),
    "wikitext-2-v1": Entry("WikiText-2, one line a row", "CC BY-SA", (*WIKITEXT, "wikitext-2-v1")),
    "wikitext-103-v1": Entry("WikiText-103, one line a row", "CC BY-SA", (*WIKITEXT, "wikitext-103-v1")),
    "ptb": Entry("Penn Treebank, one sentence a row", "Linguistic Data Consortium", column="sentence"),
    "crime-and-punishment": Entry("Crime and Punishment, translated by Garnett", "public domain"),
    "wmt16-de-en": Entry("news, English and German", "research use", prose=False),
    "multi30k-de-en": Entry("image captions, English and German", "research use", prose=False),
    "xsum": Entry("articles of the BBC and their first sentence", "research use", prose=False),
    "openorca": Entry("questions and a language model's answers", "MIT", prose=False),
    "flan-cot": Entry("questions answered step by step, stand-in for OpenOrca", "Apache-2.0", prose=False),
    "alpaca": Entry("instructions and answers, stand-in for OpenOrca", "CC BY-NC 4.0", prose=False),
    PLACE_VALUE: Entry("questions about digits; place-value-<n> generates n", "Apache-2.0", prose=False),
    "enwik8-prefix": Entry("the first megabyte of enwik8, one line a row", "GFDL / CC BY-SA"),
    **{
        f"glue/{task}": Entry(f"GLUE task {task}", "each task's own", (*GLUE, task), False)
        for task in ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")
    },
    "miniature": Entry("English prose, Python's own help (0.4 MB)", "PSF-2.0"),
}


@dataclass(frozen=True)
class LoadedData:
    """A data set: its splits, and where they came from.

    ``name`` is the requested name, also where the miniature stands in; ``source`` is ``folder``,
    ``hub``, ``speakleash``, ``file``, ``generated`` or ``miniature``; ``revision`` is the hub's commit or
    ``unversioned``; ``content_hash`` is the first 16 hex digits of the SHA-256 of the files or the generated text.
    Running text has a column ``text``, one document a row; other sets have their source's columns.
    """

    name: str
    source: str
    revision: str
    content_hash: str
    splits: datasets.DatasetDict

    def provenance(self) -> dict[str, str]:
        """The fields that a record keeps: all but the rows."""
        return {name: getattr(self, name) for name in ("name", "source", "revision", "content_hash")}


def load(name: str) -> LoadedData:
    """Load a data set from the first place that has the set, or a ``.csv`` file by path.

    The places are ``$MEMSTUDY_DATA`` (unset: ``../shared/data``, then ``data/``, from the repository's root); then
    the hub at a pinned revision, or SpeakLeash's own package; then, for running text and with a
    warning, the miniature. A fifth of a ``.csv``'s rows, drawn with seed 0, is the split ``validation``.

    Raises
    ------
    ValueError
        Unknown name; a ``.csv`` that is missing, can't be read, has gaps or fewer than five rows; ``$MEMSTUDY_DATA``
        that is not a folder; a data file that is missing or can't be read; an unknown SpeakLeash corpus; a set other
        than running text that no place has.
    """
    if name.endswith(".csv"):
        return LoadedData(name, "file", "unversioned", *sources.read_csv(Path(name)))
    if made := re.fullmatch(r"place-value-([1-9]\d{0,6})", name):
        return LoadedData(name, "generated", "unversioned", *sources.place_values(int(made[1])))
    source, fetch, tried = _locate(name)
    if source == "nowhere":
        raise ValueError(f"data set {name} not found ({tried}); go online or set MEMSTUDY_DATA")
    if source == "miniature":
        if tried:
            warnings.warn(f"{name} not found ({tried}): the miniature stands in", stacklevel=2)
        content_hash, splits = sources.miniature()
    else:
        content_hash, splits = sources.read_folder(fetch())
        if name in DATASETS and DATASETS[name].column != "text":
            splits = splits.rename_column(DATASETS[name].column, "text")
    revision = DATASETS[name].hub[1] if source == "hub" else "unversioned"
    return LoadedData(name, source, revision, content_hash, splits)


def datasets_available() -> list[dict[str, str]]:
    """List the data sets: name, what, source (where `load` would find the set now), licence.

    The source is as in :class:`LoadedData`, or ``nowhere``. Nothing is downloaded.
    """
    return [
        {"name": name, "what": entry.what, "source": _locate(name)[0], "licence": entry.licence}
        for name, entry in DATASETS.items()
    ]


def _locate(name: str) -> tuple[str, Callable[[], Path] | None, str]:
    """Return the source of ``name`` now, the function that fetches its folder, and the places that lack the set."""
    is_corpus = re.fullmatch(r"speakleash/[A-Za-z0-9_-]+", name) is not None
    if name not in DATASETS and not is_corpus:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(DATASETS)}, speakleash/...")
    if name == "miniature":
        return "miniature", None, ""
    folders = sources.data_folders()
    for folder in folders:
        if (folder / name).is_dir():
            return "folder", functools.partial(Path, folder, name), ""
    tried = [f"not in {folder}" for folder in folders] or ["no data folder"]
    entry = DATASETS[SPEAKLEASH if is_corpus else name]
    if is_corpus:
        if (cache_folder() / name).is_dir() or sources.speakleash_url() in sources.online():
            return "speakleash", functools.partial(sources.speakleash_folder, name), ""
        tried.append("package speakleash not installed, or its server not reached")
    elif entry.hub is None:
        tried.append("not on the hub")
    else:
        offline = huggingface_hub.constants.ENDPOINT not in sources.online()
        fetch = functools.partial(sources.hub_folder, entry.hub, local_files_only=offline)
        try:
            if offline:  # the hub's own cache may have an earlier download
                fetch()
            return "hub", fetch, ""
        except huggingface_hub.errors.LocalEntryNotFoundError:
            tried.append("the hub not reached")
    return "miniature" if entry.prose else "nowhere", None, ", ".join(tried)
