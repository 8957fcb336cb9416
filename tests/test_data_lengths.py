"""Token counts of texts, and the batches that samplers make: every text once; bad input is one line."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.benchmark import load
from transformers.trainer_pt_utils import LengthGroupedSampler

from memstudy.data.lengths import batches, padded_share, read_lengths, token_lengths
from memstudy.data.text import train_tokenizer
from memstudy.studies.fine_tuning.epoch import HISTOGRAMS, text_lengths

pytestmark = pytest.mark.usefixtures("cache")

REAL_DATA = Path(__file__).parents[2] / "shared/data"
SAMPLERS = ("shuffled", "grouped", "buckets", "packed")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The folder of a tokenizer whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["some text"], 257).save_pretrained(folder)
    return str(folder)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=90), st.integers(1, 9), st.sampled_from(SAMPLERS))
def test_each_text_is_in_one_batch(lengths, size, sampler):
    made = batches(lengths, size, sampler, longest=64, seed=3)
    assert sorted(length for batch in made for length in batch) == sorted(lengths)
    assert made == batches(lengths, size, sampler, longest=64, seed=3)
    if sampler == "packed":
        assert all(sum(batch) <= size * 64 for batch in made)
    else:
        assert all(len(batch) == size for batch in made[:-1])


def test_grouping_is_the_trainers_own():
    lengths = [7 * number % 41 + 1 for number in range(100)]
    sampler = LengthGroupedSampler(4, lengths=lengths, generator=torch.Generator().manual_seed(5))
    flat = [length for batch in batches(lengths, 4, "grouped", seed=5) for length in batch]
    assert flat == [lengths[place] for place in sampler]
    assert max(flat) == flat[0]


def test_buckets_are_sorted_longest_first_in_the_order_given():
    lengths = [*range(1, 41), *range(1, 11)]
    assert [length for batch in batches(lengths, 2, "buckets") for length in batch] == [
        *range(40, 0, -1),
        *range(10, 0, -1),
    ]


def test_packs_are_filled_best_fit_decreasing():
    packs = batches([5, 3, 6, 2, 4], 1, "packed", longest=10)
    assert sorted(map(sorted, packs)) == [[2, 3, 5], [4, 6]]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_parts_of_a_batch_come_in_its_order(sampler):
    lengths = [7 * number % 41 + 1 for number in range(30)]
    whole, parts = (batches(lengths, 8, sampler, longest=64, parts=number) for number in (1, 4))
    assert [length for batch in parts for length in batch] == [length for batch in whole for length in batch]
    assert len(parts) > 3 * (len(whole) - 1)


def test_a_histogram_gives_its_texts_in_one_order():
    lengths = text_lengths("openorca")
    assert (len(lengths), max(lengths)) == (251, 1837)
    assert lengths == text_lengths("openorca") != sorted(lengths)


def test_grouping_saves_padding():
    lengths = [7 * number % 41 + 1 for number in range(200)]
    shuffled, grouped = (padded_share(batches(lengths, 4, sampler)) for sampler in ("shuffled", "grouped"))
    assert 0 < grouped < shuffled
    assert padded_share([(4, 4), (2, 1)]) == 1 - 11 / 12


@pytest.mark.parametrize("text", ["12\n7\n", "tokens\n12\n7\n", "name,tokens\na,12\nb,7\n", " 12\n 7"])
def test_counts_are_read_with_or_without_a_name(text, tmp_path):
    path = tmp_path / "lengths.csv"
    path.write_text(text)
    assert read_lengths(path, "tokens" if "name" in text else None) == [12, 7]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"), ("tokens\n", "no token counts below"), ("tokens\n4\n0\n", "line 3: '0'"),
        ("4\nfour\n", "line 2: 'four'"), ("4\n-1\n", "line 2: '-1'"), ("4\n2.5\n", "line 2: '2.5'"),
        ("4\n\n5\n", "line 2: ''"), ("a,b\n1,2\n", "columns a, b: name"), ("\x00\xff", "lengths.csv"),
    ],
)  # fmt: skip
def test_bad_counts_are_named(text, said, tmp_path):
    path = tmp_path / "lengths.csv"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=said):
        read_lengths(path)


def test_texts_are_counted_by_their_tokenizer(tokenizer, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"question": "ab", "answer": "cde"}\n{"question": "f", "answer": ""}\n')
    assert token_lengths(str(path), tokenizer, ("question", "answer")) == [2 + 1 + 3, 1 + 1]
    assert token_lengths(str(path), tokenizer, ("question",)) == [2, 1]


@pytest.mark.parametrize(
    ("fields", "said"),
    [((), "name the columns"), (("title",), "no column of text 'title'"), (("answer",), "has no tokens")],
)
def test_bad_fields_are_named(fields, said, tokenizer, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"question": "ab", "answer": "cde"}\n{"question": "f", "answer": ""}\n')
    with pytest.raises(ValueError, match=said):
        token_lengths(str(path), tokenizer, fields)


def test_what_is_not_there_is_named(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "texts.txt").write_text("some text\n")
    for name in ("empty.csv", "empty.jsonl", "empty.txt"):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=f"{name}: empty"):
            token_lengths(str(tmp_path / name), tokenizer)
    (tmp_path / "name.csv").write_text("text\n")
    with pytest.raises(ValueError, match=r"name\.csv"):
        token_lengths(str(tmp_path / "name.csv"), tokenizer)
    with pytest.raises(ValueError, match="unknown data set 'nowhere'"):
        token_lengths("nowhere", tokenizer)
    with pytest.raises(ValueError, match="no such file"):
        token_lengths(str(tmp_path / "none.parquet"), tokenizer)
    with pytest.raises(ValueError, match=r"tokenizer .*none. not found"):
        token_lengths(str(tmp_path / "texts.txt"), str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"none\.csv: No such file"):
        read_lengths(tmp_path / "none.csv")


@pytest.mark.slow
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the folder of real data is not here")
def test_the_committed_histograms_are_those_of_the_texts():
    assert load("lengths").histograms().equals(pd.read_csv(HISTOGRAMS))
