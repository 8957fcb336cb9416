"""Running text: cut into tokens, and into blocks of equal length."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import datasets
import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from memstudy.data.cache import cached, hash_of

if TYPE_CHECKING:
    from memstudy.data.sets import LoadedData

EOS = "<|endoftext|>"
PAD = "<pad>"
UNKNOWN = "<unk>"


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int = 10_000,
    *,
    unit: Literal["byte", "character"] = "byte",
    pad: bool = False,
) -> PreTrainedTokenizerFast:
    """Train a byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909).

    The tokenizer is kept under ``$MEMSTUDY_CACHE`` by the hash of the arguments.

    Parameters
    ----------
    texts : iterable of str
    vocab_size : int
        Upper bound [tokens]; little text gives fewer.
    unit : {"byte", "character"}
        The unit of merging. Bytes as in GPT-2: 257 tokens are the single bytes and eos. Or the characters of ``texts``,
        spaces marked as in SentencePiece (Kudo & Richardson 2018, arXiv:1808.06226); other characters are ``<unk>``.
    pad : bool
        Whether to add a padding token, token 0; eos is then token 1.

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

    # The key includes each text's length, so that two lists with equal concatenations get different keys.
    sizes = (str(vocab_size) if unit == "byte" else f"{unit} {vocab_size}") + " pad" * pad
    key = hash_of(sizes, *(part for text in texts for part in (f"|{len(text)}|", text)))
    folder = cached(f"tokenizers/{key}", write)
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
    """Join each split's documents, an eos after each, and cut the tokens into blocks of ``seq_len``.

    Returns a column ``input_ids`` with rows of ``(seq_len,)`` int64, memory-mapped from disk (kept under
    ``$MEMSTUDY_CACHE`` by the hashes of data and tokenizer); a last, shorter block is dropped.
    ``limit_tokens`` [tokens] bounds each split; None takes all tokens.

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
                short = f"{data.name}: {split} has {len(tokens)} tokens, but a block has {seq_len}"
                raise ValueError(f"{short}; choose a smaller seq_len or a larger data set")
            whole = pa.array(tokens[: len(tokens) // seq_len * seq_len])
            table = pa.table({"input_ids": pa.FixedSizeListArray.from_arrays(whole, seq_len)})
            with pa.ipc.new_stream(str(folder / f"{split}.arrow"), table.schema) as stream:
                stream.write_table(table)

    sizes = repr((tokenizer.eos_token_id, seq_len, limit_tokens))
    key = hash_of(data.content_hash, sizes, tokenizer.backend_tokenizer.to_str())
    folder = cached(f"blocks/{key}", write)
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
