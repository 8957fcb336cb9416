"""Where data sets come from: folders, the Hugging Face hub, SpeakLeash, a ``.csv``, a generator, the miniature."""

from __future__ import annotations

import functools
import hashlib
import http.client
import io
import os
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import datasets
import huggingface_hub
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from memstudy.data import place_value
from memstudy.data.cache import cached, hash_of
from memstudy.machine import ROOT

SHARES = {"train": 85, "validation": 10, "test": 5}  # percent, where a set has no splits of its own
ONLINE_DEADLINE_S = 2.5


def data_folders() -> list[Path]:
    if asked := os.environ.get("MEMSTUDY_DATA"):
        if not Path(asked).is_dir():
            raise ValueError(f"MEMSTUDY_DATA={asked} is not a folder; create it or unset MEMSTUDY_DATA")
        return [Path(asked)]
    return [folder for folder in (ROOT.parent / "shared/data", ROOT / "data") if folder.is_dir()]


@functools.cache
def online() -> frozenset[str]:
    """Return the servers that answer in time; asks all at once, and only once per process.

    Uses daemon threads, since no time-out applies to a DNS resolver that hangs.
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

    urls = [url for url in (huggingface_hub.constants.ENDPOINT, speakleash_url()) if url]
    threads = [threading.Thread(target=ask, args=(url,), daemon=True) for url in urls]
    end = time.monotonic() + ONLINE_DEADLINE_S
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return frozenset(answered)


def hub_folder(hub: tuple[str, str, str], *, local_files_only: bool) -> Path:
    repository, commit, folder = hub
    snapshot = huggingface_hub.snapshot_download(
        repository,
        repo_type="dataset",
        revision=commit,
        allow_patterns=f"{folder}/*.parquet",
        local_files_only=local_files_only,
    )
    if not (Path(snapshot) / folder).is_dir():  # the cache has only another folder of the repository
        raise huggingface_hub.errors.LocalEntryNotFoundError(f"{repository}/{folder}")
    return Path(snapshot) / folder


def speakleash_url() -> str | None:
    """Return the server's address, or None where SpeakLeash's package is not installed."""
    try:
        from speakleash import Speakleash
    except ImportError:
        return None
    return Speakleash.get_url("pl")


def speakleash_folder(name: str) -> Path:
    """Fetch a corpus, which has to fit in memory; each document's hash decides its split."""

    split_of_percent = [split for split, share in SHARES.items() for _ in range(share)]

    def write(folder: Path) -> None:
        from speakleash.dataset import SpeakleashDataset

        # Not through Speakleash(), which first fetches the manifest of every corpus.
        corpus = SpeakleashDataset(Path(name).name, speakleash_url(), str(folder.parent))
        documents = corpus.data if corpus.manifest else None
        if documents is None:
            raise ValueError(f"{name}: no such corpus, or the download broke off; try again")
        splits = {split: [] for split in SHARES}
        for text in documents:
            splits[split_of_percent[int(hash_of(text), 16) % 100]].append(text)
        for split, texts in splits.items():
            pq.write_table(pa.table({"text": texts}), folder / f"{split}.parquet")

    return cached(name, write)


def read_folder(folder: Path) -> tuple[str, datasets.DatasetDict]:
    """Return the hash of the files' names and bytes, and the files' splits; plain texts form ``train``."""
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


def read_csv(path: Path) -> tuple[str, datasets.DatasetDict]:
    """Return the hash of a ``.csv``'s bytes, and its rows in two splits."""
    try:
        raw = path.read_bytes()
        table = pd.read_csv(io.BytesIO(raw), keep_default_na=False, na_values=[""])  # "None" and "NA" are words
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; the path of a .csv is needed") from None
    except (ValueError, pd.errors.ParserError) as error:  # not UTF-8, or rows of unequal length
        raise ValueError(f"{path}: not a CSV: {' '.join(str(error).split())}") from None
    if not isinstance(table.index, pd.RangeIndex):  # pandas reads surplus fields as row names
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


def place_values(count: int) -> tuple[str, datasets.DatasetDict]:
    """Return the hash and the splits of ``count`` training questions and 2,000 of each other split, all different."""
    splits: dict[str, list[tuple[str, str]]] = {}
    held_back: set[str] = set()
    for split, size in (("test", 2000), ("extrapolate", 2000), ("train", count)):
        splits[split] = list(place_value.questions(split, size, seed=0, without=held_back))
        held_back |= {question for question, _ in splits[split]}
    as_datasets = {
        split: datasets.Dataset.from_dict({"question": [q for q, _ in rows], "answer": [a for _, a in rows]})
        for split, rows in splits.items()
    }
    content_hash = hash_of(*(text for rows in splits.values() for pair in rows for text in pair))
    return content_hash, datasets.DatasetDict(as_datasets)


def miniature() -> tuple[str, datasets.DatasetDict]:
    """Return the hash of Python's help topics, and the topics, one a document, in splits of 85/10/5 %."""
    from pydoc_data.topics import topics

    splits, size = {split: [] for split in SHARES}, dict.fromkeys(SHARES, 0)
    # Longest first, each to the split with most room: a split by hash would miss the shares by far, since the
    # documents are few and of very unequal length.
    for text in sorted(set(topics.values()), key=lambda text: (-len(text), text)):
        split = min(SHARES, key=lambda split: (size[split] + len(text)) / SHARES[split])
        splits[split].append(text)
        size[split] += len(text)
    as_datasets = {split: datasets.Dataset.from_dict({"text": t}) for split, t in splits.items()}
    return hash_of(repr(splits)), datasets.DatasetDict(as_datasets)
