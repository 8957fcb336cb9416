"""Data sets by name: from a folder, the Hugging Face hub or SpeakLeash, or the offline miniature.

Every source is brought to one form, a folder of parquet files named ``<split>.parquet`` (or, as on
the hub, ``<split>-00000-of-00001.parquet``), or of plain texts, ``*.txt``. A new set is one entry in ``DATASETS``.
"""

from __future__ import annotations

import functools
import hashlib
import http.client
import io
import os
import re
import tempfile
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import datasets
import huggingface_hub
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from memstudy import place_value
from memstudy.machine import cache_folder

EOS = "<|endoftext|>"
PAD = "<pad>"
UNKNOWN = "<unk>"
SHARES = {"train": 85, "validation": 10, "test": 5}  # percent, where a set has no splits of its own
ONLINE_DEADLINE_S = 2.5
SPEAKLEASH = "speakleash/shopping_1_general_corpus"
PLACE_VALUE = "mathematics-numbers-place-value"
WIKITEXT = ("Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3")
GLUE = ("nyu-mll/glue", "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c")


@dataclass(frozen=True)
class Entry:
    """What is known of a data set; ``hub`` is (repository, commit, folder), None if not there."""

    what: str
    licence: str
    hub: tuple[str, str, str] | None = None
    prose: bool = True  # running text, for which the miniature can stand in
    column: str = "text"  # of the running text


DATASETS = {
    "polish-books": Entry("12 Polish books, stand-in for SpeakLeash", "public domain"),
    SPEAKLEASH: Entry("Polish shop texts; so any speakleash/<corpus>", "see the corpus's manifest"),
    "wikitext-2-v1": Entry("WikiText-2, one line a row", "CC BY-SA", (*WIKITEXT, "wikitext-2-v1")),
    "wikitext-103-v1": Entry("WikiText-103, one line a row", "CC BY-SA", (*WIKITEXT, "wikitext-103-v1")),
    "ptb": Entry("Penn Treebank, one sentence a row", "Linguistic Data Consortium", column="sentence"),
    "crime-and-punishment": Entry("Crime and Punishment, translated by Garnett", "public domain"),
    "wmt16-de-en": Entry("news, English and German", "research use", prose=False),
    "multi30k-de-en": Entry("captions of pictures, English and German", "research use", prose=False),
    "xsum": Entry("articles of the BBC and their first sentence", "research use", prose=False),
    "openorca": Entry("questions and a language model's answers", "MIT", prose=False),
    "flan-cot": Entry("questions answered step by step, stand-in for OpenOrca", "Apache-2.0", prose=False),
    "alpaca": Entry("instructions and answers, stand-in for OpenOrca", "CC BY-NC 4.0", prose=False),
    PLACE_VALUE: Entry("questions about digits; place-value-<number> makes so many", "Apache-2.0", prose=False),
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

    ``name`` is the one asked for, also where the miniature stands in; ``source`` is ``folder``,
    ``hub``, ``speakleash``, ``file``, ``generated`` or ``miniature``; ``revision`` is the hub's commit or
    ``unversioned``;
    ``content_hash`` is the SHA-256, first 16 hex digits, of the files or the miniature's text.
    Running text has a column ``text``, one document a row; other sets have the hub's columns.
    """

    name: str
    source: str
    revision: str
    content_hash: str
    splits: datasets.DatasetDict

    def provenance(self) -> dict[str, str]:
        """What a record keeps of it: everything but the rows."""
        return {
            "name": self.name,
            "source": self.source,
            "revision": self.revision,
            "content_hash": self.content_hash,
        }


def load(name: str) -> LoadedData:
    """Load a data set from the first place that has it; or a table of one's own, the path of a ``.csv``.

    ``$MEMSTUDY_DATA`` (unset: ``../shared/data``, then ``data/``, from the repository's root); then
    the hub at a pinned revision, or SpeakLeash's own package; then, for running text and with a
    warning, the miniature. Of a ``.csv`` a fifth of the rows, drawn with seed 0, are the split ``validation``.

    Raises
    ------
    ValueError
        Unknown name; a ``.csv`` that is missing, can't be read, has gaps or fewer than five rows; ``$MEMSTUDY_DATA``
        is no folder; a file that is missing or can't be read; no such SpeakLeash corpus; a set other than running text
        that is nowhere to be had.
    """
    if name.endswith(".csv"):
        return LoadedData(name, "file", "unversioned", *_read_csv(Path(name)))
    if made := re.fullmatch(r"place-value-([1-9]\d{0,6})", name):
        return LoadedData(name, "generated", "unversioned", *_place_values(int(made[1])))
    source, fetch, tried = _locate(name)
    if source == "nowhere":
        raise ValueError(f"data set {name} not found ({tried}); go online or set MEMSTUDY_DATA")
    if source == "miniature":
        if tried:
            warnings.warn(f"{name} not found ({tried}): the miniature stands in", stacklevel=2)
        content_hash, splits = _miniature()
    else:
        content_hash, splits = _read_folder(fetch())
        if name in DATASETS and DATASETS[name].column != "text":
            splits = splits.rename_column(DATASETS[name].column, "text")
    revision = DATASETS[name].hub[1] if source == "hub" else "unversioned"
    return LoadedData(name, source, revision, content_hash, splits)


def datasets_available() -> list[dict[str, str]]:
    """List the data sets: name, what, source (from where it would come now), licence.

    The source is as in :class:`LoadedData`, or ``nowhere``. Nothing is downloaded.
    """
    return [
        {"name": name, "what": entry.what, "source": _locate(name)[0], "licence": entry.licence}
        for name, entry in DATASETS.items()
    ]


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int = 10_000,
    *,
    unit: Literal["byte", "character"] = "byte",
    pad: bool = False,
) -> PreTrainedTokenizerFast:
    """Train BPE (Sennrich et al. 2016, arXiv:1508.07909).

    Kept under ``$MEMSTUDY_CACHE`` by the hash of the texts, ``unit`` and ``vocab_size`` [tokens], which is an
    upper bound: little text gives fewer.

    Parameters
    ----------
    texts : iterable of str
    vocab_size : int [tokens]
    unit : {"byte", "character"}
        What is merged. Bytes as in GPT-2; 257 tokens are the bytes themselves and eos. Or the characters of ``texts``,
        spaces marked as in SentencePiece (Kudo & Richardson 2018, arXiv:1808.06226); any other is ``<unk>``.
    pad : bool
        Whether there is a token for padding, token 0; the end is then token 1.

    Raises
    ------
    ValueError
        No text; ``vocab_size`` too small for all units; a cache that can't be written.
    """
    texts = list(texts)
    if not any(texts):
        raise ValueError("texts holds no text; give the training split's documents")
    if unit == "byte":
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        special, alphabet = [*[PAD] * pad, EOS], pre_tokenizers.ByteLevel.alphabet()
    else:
        bpe = Tokenizer(models.BPE(unk_token=UNKNOWN, fuse_unk=True))
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        special, alphabet = [*[PAD] * pad, EOS, UNKNOWN], sorted({*"".join(texts).replace(" ", "▁")})
    if vocab_size < len(special) + len(alphabet):
        raise ValueError(
            f"vocab_size is {vocab_size}; {len(alphabet)} {unit}s and {', '.join(special)} need at least "
            f"{len(special) + len(alphabet)}"
        )

    def write(folder: Path) -> None:
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        bpe.train_from_iterator(texts, trainer)
        bpe.save(str(folder / "tokenizer.json"))

    # Each text's length goes into the key, so that no two lists of texts read the same.
    sizes = (str(vocab_size) if unit == "byte" else f"{unit} {vocab_size}") + " pad" * pad
    key = _hash(sizes, *(part for text in texts for part in (f"|{len(text)}|", text)))
    folder = _cached(f"tokenizers/{key}", write)
    tokens = {"eos_token": EOS} | ({"unk_token": UNKNOWN} if unit == "character" else {})
    tokens |= {"pad_token": PAD} if pad else {}
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **tokens)


def blocks(
    data: LoadedData,
    tokenizer: PreTrainedTokenizerFast,
    seq_len: int,
    *,
    limit_tokens: int | None = None,
) -> datasets.DatasetDict:
    """Cut each split, as one stream of documents each ended by eos, into blocks of tokens.

    Returns a column ``input_ids`` with rows of ``(seq_len,)`` int64, mapped from disk (kept under
    ``$MEMSTUDY_CACHE`` by the hashes of data and tokenizer); a last, shorter block is dropped.
    ``limit_tokens`` [tokens] bounds each split; None takes all of it.

    Raises
    ------
    ValueError
        ``seq_len`` or ``limit_tokens`` out of range; no column ``text``; no eos token; a split too
        short for one block; a cache that can't be written.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len is {seq_len}; it must be at least 1 token")
    if limit_tokens is not None and limit_tokens < seq_len:
        raise ValueError(f"limit_tokens is {limit_tokens}; one block alone has {seq_len} tokens")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos token to end a document with; set eos_token")

    def write(folder: Path) -> None:
        for split, documents in data.splits.items():
            if "text" not in documents.column_names:
                raise ValueError(f"{data.name} has no column text, only {documents.column_names}")
            tokens = _token_stream(documents, tokenizer, limit_tokens)
            if len(tokens) < seq_len:
                short = f"{data.name}: {split} has {len(tokens)} tokens, a block {seq_len}"
                raise ValueError(f"{short}; choose a smaller seq_len or a larger data set")
            whole = pa.array(tokens[: len(tokens) // seq_len * seq_len])
            table = pa.table({"input_ids": pa.FixedSizeListArray.from_arrays(whole, seq_len)})
            with pa.ipc.new_stream(str(folder / f"{split}.arrow"), table.schema) as stream:
                stream.write_table(table)

    sizes = repr((tokenizer.eos_token_id, seq_len, limit_tokens))
    key = _hash(data.content_hash, sizes, tokenizer.backend_tokenizer.to_str())
    folder = _cached(f"blocks/{key}", write)
    return datasets.DatasetDict(
        {split: datasets.Dataset.from_file(str(folder / f"{split}.arrow")) for split in data.splits}
    )


def _token_stream(
    documents: datasets.Dataset, tokenizer: PreTrainedTokenizerFast, limit_tokens: int | None
) -> np.ndarray:
    """Return the tokens of all documents, eos after each, as ``(tokens,)`` int64."""
    pieces, count = [np.empty(0, dtype=np.int64)], 0
    for batch in documents.select_columns("text").iter(batch_size=1000):
        for ids in tokenizer(batch["text"], add_special_tokens=False)["input_ids"]:
            pieces.append(np.array([*ids, tokenizer.eos_token_id], dtype=np.int64))
            count += len(pieces[-1])
        if limit_tokens is not None and count >= limit_tokens:
            break
    return np.concatenate(pieces)[:limit_tokens]


def _locate(name: str) -> tuple[str, Callable[[], Path] | None, str]:
    """Return the source of ``name`` now, what fetches its folder, and where it was not found."""
    is_corpus = re.fullmatch(r"speakleash/[A-Za-z0-9_-]+", name) is not None
    if name not in DATASETS and not is_corpus:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(DATASETS)}, speakleash/...")
    if name == "miniature":
        return "miniature", None, ""
    folders = _data_folders()
    for folder in folders:
        if (folder / name).is_dir():
            return "folder", functools.partial(Path, folder, name), ""
    tried = [f"not in {folder}" for folder in folders] or ["no data folder"]
    entry = DATASETS[SPEAKLEASH if is_corpus else name]
    if is_corpus:
        if (cache_folder() / name).is_dir() or _speakleash_url() in _online():
            return "speakleash", functools.partial(_speakleash_folder, name), ""
        tried.append("package speakleash not installed, or its server not reached")
    elif entry.hub is None:
        tried.append("not on the hub")
    else:
        offline = huggingface_hub.constants.ENDPOINT not in _online()
        fetch = functools.partial(_hub_folder, entry.hub, local_files_only=offline)
        try:
            if offline:  # the hub's own cache may have it from an earlier download
                fetch()
            return "hub", fetch, ""
        except huggingface_hub.errors.LocalEntryNotFoundError:
            tried.append("the hub not reached")
    return "miniature" if entry.prose else "nowhere", None, ", ".join(tried)


def _data_folders() -> list[Path]:
    if asked := os.environ.get("MEMSTUDY_DATA"):
        if not Path(asked).is_dir():
            raise ValueError(f"MEMSTUDY_DATA={asked} is no folder; create it or unset this")
        return [Path(asked)]
    root = Path(__file__).resolve().parents[1]
    return [folder for folder in (root.parent / "shared/data", root / "data") if folder.is_dir()]


@functools.cache
def _online() -> frozenset[str]:
    """Return the servers that answer in time, all asked at once; the answer holds for the process.

    In daemon threads, since no time-out applies to a resolver that hangs.
    """
    if huggingface_hub.is_offline_mode():
        return frozenset()
    answered = set()

    def ask(url: str) -> None:
        request = urllib.request.Request(url, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=ONLINE_DEADLINE_S).close()
        except urllib.error.HTTPError:
            pass  # it answered, if only to refuse
        except (OSError, http.client.HTTPException):
            return
        answered.add(url)

    urls = [url for url in (huggingface_hub.constants.ENDPOINT, _speakleash_url()) if url]
    threads = [threading.Thread(target=ask, args=(url,), daemon=True) for url in urls]
    end = time.monotonic() + ONLINE_DEADLINE_S
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return frozenset(answered)


def _hub_folder(hub: tuple[str, str, str], *, local_files_only: bool) -> Path:
    repository, commit, folder = hub
    snapshot = huggingface_hub.snapshot_download(
        repository,
        repo_type="dataset",
        revision=commit,
        allow_patterns=f"{folder}/*.parquet",
        local_files_only=local_files_only,
    )
    if not (Path(snapshot) / folder).is_dir():  # the cache has another folder of the repository
        raise huggingface_hub.errors.LocalEntryNotFoundError(f"{repository}/{folder}")
    return Path(snapshot) / folder


def _speakleash_url() -> str | None:
    """Return the server's address, or None where SpeakLeash's package is not installed."""
    try:
        from speakleash import Speakleash
    except ImportError:
        return None
    return Speakleash.get_url("pl")


def _speakleash_folder(name: str) -> Path:
    """Fetch a corpus, which has to fit in memory; a hash of the document decides its split."""

    split_of_percent = [split for split, share in SHARES.items() for _ in range(share)]

    def write(folder: Path) -> None:
        from speakleash.dataset import SpeakleashDataset

        # Not through Speakleash(), which first fetches the manifest of every corpus there is.
        corpus = SpeakleashDataset(Path(name).name, _speakleash_url(), str(folder.parent))
        documents = corpus.data if corpus.manifest else None
        if documents is None:
            raise ValueError(f"{name}: no such corpus, or the download broke off; try again")
        splits = {split: [] for split in SHARES}
        for text in documents:
            splits[split_of_percent[int(_hash(text), 16) % 100]].append(text)
        for split, texts in splits.items():
            pq.write_table(pa.table({"text": texts}), folder / f"{split}.parquet")

    return _cached(name, write)


def _read_folder(folder: Path) -> tuple[str, datasets.DatasetDict]:
    """Return the hash of the files' names and bytes, and the splits they hold; plain texts are ``train``."""
    digest, tables = hashlib.sha256(), {}
    for path in sorted(folder.glob("*.parquet")) or sorted(folder.glob("*.txt")):
        try:
            raw = path.read_bytes()
            if path.suffix == ".txt":
                split, table = "train", pa.table({"text": [raw.decode()]})
            else:
                split, table = path.stem.split("-")[0], pq.ParquetFile(pa.BufferReader(raw)).read()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} can't be read ({error}); copy or fetch it again") from error
        digest.update(path.name.encode() + raw)
        tables.setdefault(split, []).append(table)
    if "train" not in tables:
        raise ValueError(f"{folder} holds no train*.parquet and no *.txt; put one there or remove the folder")
    content_hash = digest.hexdigest()[:16]
    splits = {
        split: datasets.Dataset(pa.concat_tables(shards), fingerprint=f"{content_hash}-{split}")
        for split, shards in tables.items()
    }
    return content_hash, datasets.DatasetDict(splits)


def _read_csv(path: Path) -> tuple[str, datasets.DatasetDict]:
    """Return the hash of a table's bytes, and its rows in two splits."""
    try:
        raw = path.read_bytes()
        table = pd.read_csv(io.BytesIO(raw), keep_default_na=False, na_values=[""])  # "None" and "NA" are words
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; the path of a .csv is needed") from None
    except (ValueError, pd.errors.ParserError) as error:  # not UTF-8, or rows of unequal length
        raise ValueError(f"{path}: not a CSV: {' '.join(str(error).split())}") from None
    if not isinstance(table.index, pd.RangeIndex):  # pandas takes fields beyond the header for the rows' names
        raise ValueError(f"{path}: not a CSV: the rows have more fields than the first line has names")
    if len(table) < 5:
        raise ValueError(f"{path}: {len(table)} rows; at least 5 are needed, of which a fifth is held back")
    if table.isna().any(axis=None):
        column = table.columns[table.isna().any()][0]
        row = int(table[column].isna().idxmax())
        raise ValueError(f"{path}: row {row} (from 0) has no {column!r}; fill it in or leave the row out")
    try:
        rows = datasets.Dataset.from_pandas(table)
    except (OverflowError, pa.ArrowException) as error:  # a number of more than 64 bits
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    split = rows.train_test_split(test_size=0.2, seed=0)
    return hashlib.sha256(raw).hexdigest()[:16], datasets.DatasetDict(train=split["train"], validation=split["test"])


def _place_values(count: int) -> tuple[str, datasets.DatasetDict]:
    """Return ``count`` training questions and 2,000 of each other split, none twice: their hash, and splits."""
    splits: dict[str, list[tuple[str, str]]] = {}
    held_back: set[str] = set()
    for split, size in (("test", 2000), ("extrapolate", 2000), ("train", count)):
        splits[split] = list(place_value.questions(split, size, seed=0, without=held_back))
        held_back |= {question for question, _ in splits[split]}
    as_datasets = {
        split: datasets.Dataset.from_dict({"question": [q for q, _ in rows], "answer": [a for _, a in rows]})
        for split, rows in splits.items()
    }
    content_hash = _hash(*(text for rows in splits.values() for pair in rows for text in pair))
    return content_hash, datasets.DatasetDict(as_datasets)


def _miniature() -> tuple[str, datasets.DatasetDict]:
    """Return Python's own help topics, one a document: their hash, and splits of 85/10/5 %."""
    from pydoc_data.topics import topics

    splits, size = {split: [] for split in SHARES}, dict.fromkeys(SHARES, 0)
    # Longest first, each to the split with most room: by hash, few documents of such unequal length
    # would miss the shares by far.
    for text in sorted(set(topics.values()), key=lambda text: (-len(text), text)):
        split = min(SHARES, key=lambda split: (size[split] + len(text)) / SHARES[split])
        splits[split].append(text)
        size[split] += len(text)
    as_datasets = {split: datasets.Dataset.from_dict({"text": t}) for split, t in splits.items()}
    return _hash(repr(splits)), datasets.DatasetDict(as_datasets)


def _hash(*texts: str) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
    return digest.hexdigest()[:16]


def _cached(name: str, write: Callable[[Path], None]) -> Path:
    """Return the cache's folder ``name``, filled by ``write`` at the first call: wholly or not."""
    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-")
    except OSError as error:
        raise ValueError(f"{error}; set MEMSTUDY_CACHE to a folder that can be written") from error
    with scratch as path:
        part = Path(path) / "part"
        part.mkdir()
        write(part)
        try:
            part.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same content
                raise
    return folder
