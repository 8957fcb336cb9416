"""Questions about digits: answers checked by another method, and the same form as DeepMind's own rows."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memstudy import data
from memstudy.data import place_value


@given(st.integers(1, 10**13 - 1), st.data())
def test_answers_are_the_digits(number, drawn):
    place = drawn.draw(st.integers(0, len(str(number)) - 1))
    question = f"What is the {place_value.PLACES[place]} digit of {number}?"
    assert int(place_value.answer(question)) == number // 10**place % 10
    assert place_value.place(question) == place_value.PLACES[place]


@given(st.text())
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="not a question like"):
        place_value.answer(text)


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        ("What is the tens digit of 7?", "7 has no tens digit"),
        ("What is the tens digit of 070?", "not a question like"),
        ("what is the tens digit of 70?", "not a question like"),
        ("What is the dozens digit of 70?", "not a question like"),
    ],
)
def test_questions_without_an_answer(question, reason):
    with pytest.raises(ValueError, match=reason):
        place_value.answer(question)


@pytest.mark.parametrize("split", place_value.ENTROPIES)
def test_generated_questions_are_like_deepminds(split):
    """Our questions have digits and places as often as the shipped rows, which come from DeepMind's generator."""
    theirs = data.load(data.sets.PLACE_VALUE)
    if theirs.source == "nowhere":
        pytest.skip("DeepMind's rows are not here")
    theirs = theirs.splits[split]
    assert [place_value.answer(row["question"]) for row in theirs] == theirs["answer"]
    ours = list(place_value.questions(split, len(theirs), seed=0))
    assert len({question for question, _ in ours}) == len(ours)
    assert all(place_value.answer(question) == answer for question, answer in ours)
    for what in (lambda question: len(question.split()[-1]) - 1, place_value.place):
        counts = [Counter(what(q) for q in questions) for questions in (theirs["question"], [q for q, _ in ours])]
        for value in counts[0] | counts[1]:
            expected = max(counts[0][value], counts[1][value])
            assert abs(counts[0][value] - counts[1][value]) <= 5 * (2 * expected) ** 0.5 + 1, value


def test_questions_held_back_are_left_out():
    first = {question for question, _ in place_value.questions("train", 200, seed=3)}
    rest = {question for question, _ in place_value.questions("train", 200, seed=3, without=first)}
    assert not first & rest


def test_a_generated_set_repeats_and_is_disjoint():
    loaded = data.load("place-value-300")
    assert (loaded.source, loaded.content_hash) == ("generated", data.load("place-value-300").content_hash)
    assert loaded.content_hash != data.load("place-value-301").content_hash
    questions = [q for split in loaded.splits.values() for q in split["question"]]
    sizes = {name: len(rows) for name, rows in loaded.splits.items()}
    assert sizes == {"test": 2000, "extrapolate": 2000, "train": 300}
    assert len(set(questions)) == len(questions)
