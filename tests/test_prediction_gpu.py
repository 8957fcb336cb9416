"""The prediction for GPUs against published measurements on real GPUs (`memstudy.studies.published`)."""

import numpy as np
import pandas as pd
import pytest

from memstudy.studies.published.bert import TRAININGS, savings
from memstudy.studies.published.inference import length_differences
from memstudy.studies.published.rows import predicted_rows

pytestmark = pytest.mark.usefixtures("one_thread")

FIRST = ["weights", "batch 4"]
STORING = ["weights", *(name for name, training in TRAININGS.items() if not training.checkpointing)]


@pytest.fixture(scope="module")
def inference():
    return predicted_rows("inference")


@pytest.fixture(scope="module")
def bert():
    return predicted_rows("bert", only=FIRST)


@pytest.fixture(scope="module")
def all_of_bert(bert):
    return pd.concat([bert, predicted_rows("bert", only=set(TRAININGS) - set(FIRST))])


@pytest.fixture(scope="module")
def storing(all_of_bert):
    """The rows of trainings without checkpointing."""
    return all_of_bert[all_of_bert.row.isin(STORING)]


def errors(rows):
    """Absolute errors, by row [%]."""
    return rows.set_index("row").error_percent.abs()


def differences(rows):
    """Predicted less published, by row [MB]."""
    return (rows.predicted_mib - rows.published_mib).set_axis(rows.row)


def test_ops_allocate_to_the_byte_what_was_measured():
    rows = predicted_rows("ops")
    assert len(rows) == 19
    assert errors(rows).max() < 0.0001
    assert np.array_equal(rows.predicted_mib.astype("f4"), rows.published_mib.astype("f4"))  # at published precision


def test_inference_takes_to_the_mb_what_was_measured(inference):
    """With one constant, fitted on the first row. One row lacks a segment of 2 MB, perhaps scratch of CUDA's sort."""
    assert len(inference) == 15
    assert dict(differences(inference)[lambda d: d != 0]) == {"Reformer en8, no axial, 2048": -2}


def test_what_longer_sequences_take_more(inference):
    """Differences between lengths, which do not depend on the constant."""
    longer = length_differences(inference)
    assert len(longer) == 11
    assert dict(differences(longer)[lambda d: d != 0]) == {"Reformer en8, no axial, 1024 to 2048": -2}
    assert errors(longer).max() < 0.05


def test_bert_large(bert):
    assert differences(bert)["weights"] == 0
    assert errors(bert).max() < 0.6  # batch 4 with AdamW: 78 MB low


@pytest.mark.slow
def test_bert_large_without_checkpointing(storing):
    assert errors(storing).median() < 0.4
    assert errors(storing).max() < 0.6  # batch 4 with AdamW: 78 MB low, with fp16 82


@pytest.mark.slow
def test_what_techniques_save_of_bert_large(storing):
    saved = errors(savings(storing))
    assert set(saved.index) == {"accumulation", "fp16", "Adafactor", "8-bit Adam"}
    assert saved["accumulation"] < 1
    assert saved["fp16"] < 0.5
    # Both inherit the error of AdamW with batch 4: 80 of 2,654 MB and 70 of 1,864 MB, so 3.01 % and 3.76 %.
    assert saved["Adafactor"] < 3.1
    assert saved["8-bit Adam"] < 3.8


def test_without_the_rules_of_its_time_bert_large_would_take_another_amount():
    assert errors(predicted_rows("bert", era=False, only=["batch 4"]))["batch 4"] > 15


@pytest.mark.slow
def test_all_of_bert_large(all_of_bert):
    assert len(all_of_bert) == 10
    assert errors(all_of_bert).median() < 0.3
    assert errors(all_of_bert).max() < 0.75


@pytest.mark.slow
def test_what_all_techniques_save_of_bert_large(all_of_bert):
    saved = errors(savings(all_of_bert))
    assert len(saved) == 8
    assert set(saved[lambda error: error > 1].index) == {"Adafactor", "8-bit Adam"}  # as above
