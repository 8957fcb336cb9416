"""Runs of the Reformer: refused choices, results, predicted memory, and learning."""

import itertools
import json
import math

import pandas as pd
import pytest
from pydantic import ValidationError
from support.tiers import slow_but

from memstudy import data
from memstudy.attention import LSHConfig
from memstudy.kinds import parse_run
from memstudy.profiler import measure, predict
from memstudy.studies.reformer.experiments import changes, quality_lost, trend_claim
from memstudy.studies.reformer.run import ReformerRun

pytestmark = pytest.mark.usefixtures("one_thread", "cache", "young_garbage_only")
LSH = {"variant": "lsh", "num_hashes": 2, "chunk_length": 8, "hash_seed": 1}


def tiny(**changes) -> ReformerRun:
    """Two layers on 32 tokens."""
    sizes = {
        "n_layers": 2, "hidden_size": 32, "n_heads": 2, "head_dim": 8, "feed_forward": 48, "vocab_size": 300,
        "seq_len": 32, "batch_size": 2, "measure_steps": 1, "attention": LSH,
    }  # fmt: skip
    return ReformerRun(**{"experiment": "tiny", **sizes, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seq_len": 36}, "seq_len=36 is no multiple of chunk_length=8: take 32 or 40"),
        ({"attention": {"variant": "window", "window": 8}}, "attention 'window': a Reformer's is 'lsh', or 'softmax'"),
        ({"attention": {"variant": "lsh", "num_buckets": 6}}, "num_buckets=6; take a power of two"),
        ({"axial_shape": (4, 9), "axial_widths": (8, 24)}, "axial_shape=4 × 9 makes 36 positions, not 32"),
        ({"axial_shape": (4, 8), "axial_widths": (8, 25)}, "axial_widths=[8, 25] do not add up to 32"),
        ({"axial_shape": (4, 8)}, "give both, or neither"),
        ({"axial_shape": (4, 8, 1), "axial_widths": (8, 24)}, "axial_shape"),
        ({"max_positions": 31}, "max_positions=31 is less than seq_len=32"),
        ({"head_dim": 0}, "head_dim"),
        ({"dropout": 1}, "dropout"),
        ({"train_steps": 1, "dataset": "miniature"}, "vocabulary: name a text, or bytes"),
    ],
    ids=str,
)
def test_bad_choices_are_refused(changes, said):
    with pytest.raises(ValidationError) as refusal:
        tiny(**changes)
    assert said in str(refusal.value)


def test_a_run_survives_json():
    run = tiny(axial_shape=(4, 8), axial_widths=(8, 24), techniques=("bf16",))
    assert parse_run(json.loads(run.model_dump_json())) == run


def test_the_model_is_what_the_run_says():
    model = tiny(n_layers=3, attention=LSH | {"num_buckets": 64}, max_positions=48).make_model()
    assert model.config.attn_layers == ["local", "lsh", "local"]
    assert model.reformer.encoder.mixers[1] == LSHConfig(2, 8, 64, 1)
    assert model.reformer.embeddings.position_embeddings.embedding.weight.shape == (48, 32)
    exact = tiny(attention={"variant": "softmax"}, reversible=False).make_model()
    assert [mixer.name for mixer in exact.reformer.encoder.mixers] == ["softmax", "softmax"]
    axial = tiny(axial_shape=(4, 8), axial_widths=(8, 24)).make_model()
    shapes = [tuple(weight.shape) for weight in axial.reformer.embeddings.position_embeddings.weights]
    assert shapes == [(4, 1, 8), (1, 8, 24)]


STEPS = [(LSH, True), (LSH, False), ({"variant": "softmax"}, True), ({"variant": "softmax"}, False)]


@pytest.mark.parametrize(("attention", "reversible"), slow_but([STEPS[0], STEPS[3]], STEPS))
def test_a_step_is_predicted_to_the_byte(attention, reversible):
    run = tiny(attention=attention, reversible=reversible, axial_shape=(4, 8), axial_widths=(8, 24))
    measured, predicted = measure(run.build()), predict(run.build())
    assert predicted.peak_bytes == measured.peak_bytes
    assert predicted.peak_by_category == measured.peak_by_category


def test_a_step_is_predicted_for_a_gpu():
    run = tiny(techniques=("bf16",))
    report = predict(run.build(gpu="T4"), gpu="T4")
    assert report.peak_bytes > 4 * sum(p.numel() for p in run.make_model().parameters())


def training(**changes) -> ReformerRun:
    known = data.load("miniature").content_hash
    words = {"dataset": "miniature", "data_hash": known, "vocabulary": "miniature", "vocabulary_hash": known}
    return tiny(**{"measure_steps": 0, "train_steps": 12, "eval_blocks": 4, "learning_rate": 3e-3, **words, **changes})


@pytest.mark.parametrize("changes", [{}, {"vocabulary": "bytes"}], ids=["pieces", "bytes"])
def test_training_learns_and_is_validated_on_the_way(changes, tmp_path):
    result = training(validations=4, **changes).execute(tmp_path)
    curve = result["curves"]["validation_loss"]
    assert [step for step, _ in curve] == [3, 6, 9, 12]
    assert curve[-1][1] < curve[0][1] < math.log(300) + 0.5
    assert curve[-1][1] == pytest.approx(result["metrics"]["validation_loss"], abs=1e-4)
    again = training(validations=4, **changes).execute(tmp_path)
    assert again["curves"] == result["curves"]


def test_another_vocabulary_than_planned_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"vocabulary 'miniature' has content hash .*, the run was planned with 0ff"):
        training(vocabulary_hash="0ff").execute(tmp_path)


def test_a_change_of_perplexity_pairs_the_seeds_and_counts_as_lost_only_if_told():
    loss = {"Reformer": {"ptb": 1.1, "enwik8": 1.0}, "exact": {"ptb": 1.0, "enwik8": 1.0}, "axial": {"ptb": 2.2}}
    seeds = {0: 10, 1: 11, 2: 12}
    rows = pd.DataFrame(
        [
            {"experiment": name, "dataset": text, "seq_len": 64, "seed": seed, "test_perplexity": factor * scale}
            for (name, of_text), (seed, scale) in itertools.product(loss.items(), seeds.items())
            for text, factor in of_text.items()
        ]
    )
    assert changes(rows, "Reformer", "exact")["mean"].to_dict() == pytest.approx({("enwik8", 64): 0, ("ptb", 64): 10})
    assert changes(rows, "axial", "Reformer")["mean"].to_dict() == pytest.approx({("ptb", 64): 100})
    assert quality_lost(rows).to_dict() == pytest.approx({64: 10})
    assert quality_lost(rows[rows["seed"] == 0]).isna().all()


def test_a_trend_of_seeds_needs_each_step_to_be_told():
    said = pd.Series({256: 10.0, 2048: 20.0, 16384: 30.0})
    seeds = pd.DataFrame({256: [30.0, 32.0, 28.0], 2048: [31.0, 31.0, 31.0], 16384: [80.0, 79.0, 81.0]})
    verdicts = {
        "each length once": trend_claim("", said, seeds.mean())[-1],
        "three seeds": trend_claim("", said, seeds.mean(), by_seed=seeds)[-1],
        "one seed": trend_claim("", said, seeds.loc[0], by_seed=seeds.loc[[0]])[-1],
        "the other way": trend_claim("", -said, seeds.mean(), by_seed=seeds)[-1],
        "one length": trend_claim("", said.loc[[256]], seeds[256].to_frame().mean())[-1],
    }
    assert list(verdicts.values()) == ["reproduced", "partly", "reproduced", "not reproduced", "not testable here"]
