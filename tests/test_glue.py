"""Sentences with labels: GLUE's tasks from the data folder, tables of one's own, scores by formula."""

import math

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.tiny_pretrained import tiny_tokenizer

from memstudy import data
from memstudy.studies.glue import tasks as glue

SIX = ["a", "b", "c", "d", "e", "f"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def task_data(name="glue/sst2", held_back="validation", **splits):
    """Return a data set of ``splits``, each a dict of columns; a missing split gets two valid rows."""
    good = {"sentence": ["a", "b"], "label": [0, 1]}
    rows = {split: datasets.Dataset.from_dict(splits.get(split, good)) for split in ("train", held_back)}
    return data.LoadedData(name, "folder", "unversioned", "0" * 16, datasets.DatasetDict(rows))


def csv_file(folder, content):
    """Write a table, given as bytes or as a dict of columns without commas, and return its path."""
    path = folder / "own.csv"
    if isinstance(content, dict):
        lines = [content.keys(), *zip(*content.values(), strict=True)]
        content = "".join(",".join(map(str, line)) + "\n" for line in lines).encode()
    path.write_bytes(content)
    return str(path)


def refusal(of, *arguments) -> str:
    """Return the error message of ``of(*arguments)``, which must be one line."""
    with pytest.raises(ValueError, match=r".") as refused:
        of(*arguments)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# --- GLUE's own sets


@pytest.mark.parametrize("name", glue.TASKS)
def test_a_task_of_glue_is_as_its_data_set(name):
    loaded = data.load(f"glue/{name}")
    task = glue.task_of(loaded)
    assert task is glue.TASKS[name]
    for split in ("train", task.validation):
        rows = loaded.splits[split]
        assert {"label", *task.columns} <= set(rows.column_names)
        assert all(isinstance(text, str) for column in task.columns for text in rows[column])
        found = set(rows["label"])
        if task.n_labels == 1:
            assert min(found) >= 0
            assert max(found) <= 5
            assert any(label % 1 for label in found)
        else:
            assert found == set(range(task.n_labels))  # every class occurs, and no other label


@pytest.mark.parametrize("name", glue.TASKS)
def test_every_task_of_glue_is_a_data_set_by_name_and_every_metric_is_known(name):
    assert f"glue/{name}" in data.DATASETS
    task = glue.TASKS[name]
    assert set(task.metrics) <= set(glue.METRICS)
    assert ("pearson" in task.metrics) == (task.n_labels == 1)


# Numbers of training and validation rows in the whole sets, from the hub's dataset card.
ROWS = {
    "cola": (8551, 1043), "sst2": (67_349, 872), "mrpc": (3668, 408), "stsb": (5749, 1500), "rte": (2490, 277),
    "wnli": (635, 71), "qqp": (363_846, 40_430), "qnli": (104_743, 5463), "mnli": (392_702, 9815),
}  # fmt: skip


@pytest.mark.parametrize("name", glue.TASKS)
def test_a_set_is_called_whole_when_the_folder_has_each_row(name):
    loaded, task = data.load(f"glue/{name}"), glue.TASKS[name]
    assert loaded.source == "folder"
    assert task.whole == (tuple(len(loaded.splits[split]) for split in ("train", task.validation)) == ROWS[name])


# --- what is refused of a data set


def test_running_text_is_no_task():
    said = refusal(glue.task_of, data.load("wikitext-2-v1"))
    assert said.startswith("wikitext-2-v1 has no sentences with labels; take one of glue/cola, glue/sst2")
    assert said.endswith("or a .csv of your own")


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("label", [2, -1, None, 0.5])
def test_a_label_outside_the_range_is_named_with_its_row(split, label):
    bad = {"sentence": SIX, "label": [0, 1, 0, label, 1, 0]}
    said = refusal(glue.task_of, task_data(**{split: bad}))
    assert said == f"glue/sst2: row 3 of {split} has label {label}; 0 to 1 are possible"


def test_the_last_label_of_three_is_possible():
    three = {"premise": ["a"] * 3, "hypothesis": ["b"] * 3, "label": [0, 1, 2]}
    loaded = task_data("glue/mnli", "validation_matched", train=three, validation_matched=three)
    assert glue.task_of(loaded).n_labels == 3


@pytest.mark.parametrize("split", ["train", "validation"])
def test_an_empty_split_is_refused(split):
    said = refusal(glue.task_of, task_data(**{split: {"sentence": [], "label": []}}))
    assert said == f"glue/sst2: the split {split} is empty or missing"


def test_a_split_of_another_name_does_not_stand_in_for_the_one_held_back():
    said = refusal(glue.task_of, task_data("glue/sst2", "validation_matched"))
    assert said == "glue/sst2: the split validation is empty or missing"


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"sentence": ["a"]}, "the split validation has no column label"),
        ({"text": ["a"], "label": [0]}, "the split validation has no column sentence"),
        ({"text": ["a"]}, "the split validation has no column label, sentence"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_a_missing_column_is_named(columns, said):
    assert refusal(glue.task_of, task_data(validation=columns)) == f"glue/sst2: {said}"


# --- tables of one's own


def test_a_table_with_sentences_and_classes_is_a_task(tmp_path):
    loaded = data.load(csv_file(tmp_path, {"sentence": SIX * 5, "label": [0, 1, 2] * 10}))
    assert glue.task_of(loaded) == glue.Task(("sentence",), 3, ("accuracy",))
    assert loaded.source == "file"


def test_a_table_with_pairs_is_a_task_of_pairs(tmp_path):
    loaded = data.load(csv_file(tmp_path, {"label": [0, 1] * 3, "sentence2": SIX, "sentence1": SIX[::-1]}))
    assert glue.task_of(loaded) == glue.Task(("sentence1", "sentence2"), 2, ("accuracy",))


def test_decimals_make_a_regression(tmp_path):
    loaded = data.load(csv_file(tmp_path, {"sentence": SIX, "label": [0, 1, 2.5, -3, 4, 5]}))
    assert glue.task_of(loaded) == glue.Task(("sentence",), 1, ("pearson", "spearman"))


def test_classes_written_with_a_point_are_classes(tmp_path):
    task = glue.task_of(data.load(csv_file(tmp_path, {"sentence": SIX, "label": ["1.0", "0.0"] * 3})))
    assert task.n_labels == 2


@pytest.mark.parametrize("word", ["None", "NA", "nan", "null"])
def test_a_word_that_pandas_would_take_for_a_gap_is_a_word(word, tmp_path):
    loaded = data.load(csv_file(tmp_path, {"sentence": [word] * 6, "label": [0, 1] * 3}))
    assert set(loaded.splits["train"]["sentence"]) == {word}


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"sentence": SIX, "label": [0, 1, 3] * 2}, "the labels are [0, 1, 3]; number two classes or more from 0, wit"),
        ({"sentence": SIX, "label": [1, 2] * 3}, "the labels are [1, 2]; number two classes or more from 0"),
        ({"sentence": SIX, "label": [0] * 6}, "the labels are [0]; number two classes or more from 0"),
        ({"sentence": SIX, "label": ["good"] * 6}, "label 'good'; number the classes from 0"),
        ({"sentence": SIX, "label": [True] * 6}, "label True; number the classes from 0"),
        ({"sentence": SIX, "label": ["1e999"] * 6}, "label inf; number the classes from 0"),
        ({"sentence": SIX, "class": [0, 1] * 3}, "no column label; a column label is needed and a column sentence, or"),
        ({"text": SIX, "label": [0, 1] * 3}, "no column sentence1, sentence2; a column label is"),
        ({"sentence1": SIX, "label": [0, 1] * 3}, "no column sentence2"),
    ],
    ids=["gap", "from-1", "one-class", "text", "truth", "infinite", "no-label", "no-sentence", "half-a-pair"],
)
def test_a_table_that_is_no_task_is_told_why(columns, said, tmp_path):
    path = csv_file(tmp_path, columns)
    assert refusal(glue.task_of, data.load(path)).startswith(f"{path}: {said}")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"sentence": SIX[:4], "label": [0, 1] * 2}, "4 rows; at least 5 are needed, of which a fifth is held back"),
        (b"", "not a CSV: No columns to parse"),
        (b"sentence,label\n", "0 rows; at least 5"),
        (b"sentence,label\n" + b"\xff\xfe,1\n" * 6, "not a CSV: 'utf-8' codec can't decode"),
        ("sentence,label\na,1\n".encode("utf-16"), "not a CSV"),
        ({"sentence": [*SIX[:5], ""], "label": [0, 1] * 3}, "row 5 (from 0) has no 'sentence'; fill it in or leave"),
        ({"sentence": SIX, "label": [0, 1, "", 1, 0, 1]}, "row 2 (from 0) has no 'label'"),
        (b"sentence,label\na,1\nb\nc,1\nd,0\ne,0\n", "row 1 (from 0) has no 'label'"),
        (b"sentence,label\na,1\nb,0,9\nc,1\nd,0\ne,0\n", "not a CSV: Error tokenizing data. C error: Expected 2 fie"),
        (b"sentence,label\n" + b"x,a,1\n" * 6, "the rows have more fields than the first line has names"),
        (b"sentence,label\n" + b"a,1,\n" * 6, "the rows have more fields than the first line has names"),
        (b'sentence,label\n"a,1\nb,0\nc,1\nd,0\ne,0\n', "not a CSV: Error tokenizing data. C error: EOF inside string"),
        (b"sentence,label\n" + b"a,1%s\n" % (b"0" * 30) * 6, "too large"),
    ],
    ids=[
        "four-rows", "empty", "header-alone", "not-utf8", "utf16", "no-sentence", "no-label", "short-row", "long-row",
        "long-rows", "trailing-comma", "open-quote", "100-bit-label",
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_read_is_told_why(content, said, tmp_path):
    path = csv_file(tmp_path, content)
    told = refusal(data.load, path)
    assert told.startswith(f"{path}: ")
    assert said in told


def test_a_table_that_is_not_there_is_told_so(tmp_path):
    assert refusal(data.load, f"{tmp_path}/none.csv").startswith(f"{tmp_path}/none.csv: No such file or directory;")
    (tmp_path / "folder.csv").mkdir()
    assert "Is a directory" in refusal(data.load, f"{tmp_path}/folder.csv")


@pytest.mark.parametrize("count", [5, 6, 50, 101])
def test_a_fifth_of_a_table_is_held_back_the_same_each_time(count, tmp_path):
    rows = {"sentence": [f"text {i}" for i in range(count)], "label": [i % 2 for i in range(count)]}
    first, again = (data.load(csv_file(tmp_path, rows)) for _ in range(2))
    train, held_back = (first.splits[split]["sentence"][:] for split in ("train", "validation"))
    assert len(held_back) == math.ceil(count / 5)
    assert sorted([*train, *held_back]) == sorted(rows["sentence"])  # every row once, so none in both splits
    assert (train, held_back) == tuple(again.splits[split]["sentence"][:] for split in ("train", "validation"))
    for split in first.splits.values():
        assert split["label"][:] == [int(text.split()[1]) % 2 for text in split["sentence"]]


def test_the_hash_of_a_table_follows_its_bytes(tmp_path):
    rows = {"sentence": SIX, "label": [0, 1] * 3}
    first, again = (data.load(csv_file(tmp_path, rows)).content_hash for _ in range(2))
    assert first == again
    assert len(first) == 16
    assert data.load(csv_file(tmp_path, rows | {"label": [1, 0] * 3})).content_hash != first


FIELDS = st.sampled_from(
    [b"sentence", b"sentence1", b"sentence2", b"label", b"0", b"1", b"2", b"0.5", b"-1", b"1e400", b"a b", b"NA", b"",
     b'"', b'"a,b"', b'"a\nb"', b"True", b"9" * 40, b"\xff", b"\x00", b"\xef\xbb\xbf", "ż".encode(), b"2024-01-01"]
)  # fmt: skip
LINES = st.lists(FIELDS, max_size=4).map(b",".join)
HEADERS = st.sampled_from([b"sentence,label", b"label,sentence1,sentence2", b'"a\nb",label', b"label,label", b""])
TABLES = st.one_of(
    st.binary(max_size=60),
    st.builds(lambda head, lines: b"\n".join([head, *lines]), HEADERS, st.lists(LINES, min_size=4, max_size=9)),
    st.builds(  # rows that match the header, so that many tables are valid
        lambda pairs: b"\n".join([b"sentence,label", *(b",".join(pair) for pair in pairs)]),
        st.lists(st.tuples(FIELDS, st.sampled_from([b"0", b"1", b"2", b"0.5", b"-0", b"1e3"])), min_size=5, max_size=9),
    ),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TABLES)
@example(b"sentence,label\n" + b"a,1%s\n" % (b"0" * 30) * 6)
@example(b'"a\nb",label\n' + b"a,1\n" * 6)
def test_any_bytes_are_a_task_or_are_refused_in_one_line(tmp_path, content):
    path = csv_file(tmp_path, content)
    said = ""
    try:
        glue.task_of(data.load(path))
    except ValueError as error:
        said = str(error)
    assert said == "" or said.startswith(f"{path}: ")
    assert "\n" not in said


# --- tokens


def test_rows_are_cut_and_counted_and_keep_their_order(tokenizer):
    rows = datasets.Dataset.from_dict({"sentence": ["good " * n for n in (1, 9, 3, 20, 6)], "label": [0, 1, 1, 0, 1]})
    tokens, cut = glue.encode(rows, glue.TASKS["sst2"], tokenizer, 8)
    assert [len(ids) for ids in tokens["input_ids"]] == [3, 8, 5, 8, 8]  # including [CLS] and [SEP]
    assert cut == 2  # the last row fits exactly
    assert tokens["labels"][:] == [0, 1, 1, 0, 1]
    assert all(ids[-1] == tokenizer.sep_token_id for ids in tokens["input_ids"])


def test_pairs_are_one_row_of_two_kinds(tokenizer):
    rows = datasets.Dataset.from_dict({"sentence1": ["good"], "sentence2": ["bad bad"], "label": [1]})
    (row,), cut = glue.encode(rows, glue.TASKS["rte"], tokenizer, 16)
    assert tokenizer.decode(row["input_ids"]) == "[CLS] good [SEP] bad bad [SEP]"
    assert row["token_type_ids"] == [0, 0, 0, 1, 1, 1]
    assert cut == 0


@pytest.mark.parametrize(("task", "kind"), [(glue.TASKS["sst2"], int), (glue.Task(("sentence",), 1, ()), float)])
def test_labels_are_whole_for_classes_and_decimals_for_a_regression(task, kind, tokenizer):
    rows = datasets.Dataset.from_dict({"sentence": [12, 13], "label": [1.0, 0.0]})  # numbers also count as texts
    tokens, _ = glue.encode(rows, task, tokenizer, 8)
    assert [type(label) for label in tokens["labels"]] == [kind, kind]


def test_no_rows_are_no_tokens(tokenizer):
    rows = datasets.Dataset.from_dict({"sentence": ["good"], "label": [0]}).select([])
    tokens, cut = glue.encode(rows, glue.TASKS["sst2"], tokenizer, 8)
    assert (len(tokens), cut) == (0, 0)


# --- scores

LABELS = [0, 1, 1, 0, 1, 1, 1, 0, 0, 1]
PREDICTIONS = [0, 1, 0, 0, 1, 1, 0, 1, 0, 1]
AMOUNTS = [2.0, 0.5, 4.5, 3.0, 1.0, 5.0]
GUESSES = [1.5, 0.7, 3.0, 3.9, 2.2, 4.0]


def pearson(left, right):
    left, right = (np.array(values) - np.mean(values) for values in (left, right))
    return (left * right).sum() / math.sqrt((left**2).sum() * (right**2).sum())


def ranks(values):
    return [1 + sum(other < value for other in values) for value in values]


def test_metrics_of_classes_are_their_formulas():
    pairs = list(zip(LABELS, PREDICTIONS, strict=True))
    tp, tn, fp, fn = (pairs.count(pair) for pair in ((1, 1), (0, 0), (0, 1), (1, 0)))
    task = glue.Task(("sentence",), 2, ("accuracy", "f1", "matthews"))
    assert glue.score(task, PREDICTIONS, LABELS) == {
        "accuracy": pytest.approx((tp + tn) / 10),
        "f1": pytest.approx(2 * tp / (2 * tp + fp + fn)),
        "matthews": pytest.approx((tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))),
    }
    assert (tp, tn, fp, fn) == (4, 3, 1, 2)  # all different and none 0, so that a swap would be seen


def test_metrics_of_amounts_are_their_formulas():
    task = glue.TASKS["stsb"]
    score = glue.score(task, GUESSES, AMOUNTS)
    assert score == {
        "pearson": pytest.approx(pearson(GUESSES, AMOUNTS)),
        "spearman": pytest.approx(pearson(ranks(GUESSES), ranks(AMOUNTS))),
    }
    assert abs(score["pearson"] - score["spearman"]) > 0.01


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("predictions", "labels"),
    [([2.5] * 6, AMOUNTS), (GUESSES, [2.5] * 6), ([2.5] * 6, [2.5] * 6), ([2.5], [1.0])],
    ids=["predictions", "labels", "both", "one-row"],
)
def test_a_correlation_with_what_never_changes_is_0(predictions, labels):
    assert glue.score(glue.TASKS["stsb"], predictions, labels) == {"pearson": 0.0, "spearman": 0.0}


def test_one_and_the_same_class_for_all_rows_scores_0_by_matthews():
    assert glue.score(glue.TASKS["cola"], [1] * 10, LABELS) == {"matthews": 0.0, "accuracy": 0.6}
