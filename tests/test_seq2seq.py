"""Runs of the encoder-decoder: refused choices, predicted memory, training, and scores of written texts."""

import itertools
import json

import pandas as pd
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from support.tiers import slow_but

from memstudy import data
from memstudy.kinds import parse_run
from memstudy.profiler import measure, predict
from memstudy.studies.memsizer import experiments, pairs, seq2seq
from memstudy.studies.memsizer.encoder_decoder import Seq2SeqLM
from memstudy.studies.memsizer.run import Seq2SeqRun

pytestmark = pytest.mark.usefixtures("one_thread", "cache", "young_garbage_only")
EVERYWHERE = {"encoder": {"slots": 8}, "decoder": {"slots": 4}, "cross": {"slots": 8}}
both = pytest.mark.parametrize("memsizer", [{}, EVERYWHERE], ids=["exact", "memsizer"])


def tiny(**changes) -> Seq2SeqRun:
    """A run with two layers on each side, 24 source tokens and 16 target tokens."""
    sizes = {
        "n_layers": 2, "hidden_size": 32, "n_heads": 2, "feed_forward": 64, "vocab_size": 60, "seq_len": 24,
        "target_len": 16, "batch_size": 4, "measure_steps": 1,
    }  # fmt: skip
    return Seq2SeqRun(**{"experiment": "tiny", **sizes, **changes})


def answering(**changes) -> Seq2SeqRun:
    """A run that trains on questions about digits."""
    loaded = data.load("place-value-400")
    sizes = {"vocab_size": 48, "target_vocab_size": 16, "seq_len": 56, "target_len": 4, "measure_steps": 0}
    chosen = {"dataset": loaded.name, "data_hash": loaded.content_hash, "train_steps": 6, "eval_rows": 40}
    return tiny(**{**sizes, **chosen, "batch_size": 16, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"memsizer": {"self": {"slots": 4}}}, "unknown place 'self'; known: encoder, decoder, cross"),
        ({"memsizer": {"cross": {"slot": 4}}}, "attention 'memsizer'"),
        ({"memsizer": {"cross": {"slots": 1}}}, "slots=1; take at least 2"),
        ({"n_heads": 3}, "hidden_size=32 is not a multiple of n_heads=3"),
        ({"measure_steps": 0}, "nothing to run"),
        ({"train_steps": 3}, "train_steps=3 needs a dataset"),
        ({"target_len": 1}, "target_len"),
        ({"num_beams": 0}, "num_beams"),
    ],
    ids=str,
)
def test_bad_choices_are_refused(changes, said):
    with pytest.raises(ValidationError) as refusal:
        tiny(**changes)
    assert said in str(refusal.value)


def test_a_run_survives_json():
    run = tiny(memsizer=EVERYWHERE, techniques=("bf16",))
    assert parse_run(json.loads(run.model_dump_json())) == run


STEPS = list(itertools.product([{}, EVERYWHERE], [(), ("bf16",), ("checkpointing",)]))
QUICK = [({}, ()), (EVERYWHERE, ("checkpointing",))]


@pytest.mark.parametrize(("memsizer", "techniques"), slow_but(QUICK, STEPS))
def test_predicted_is_measured_to_the_byte(memsizer, techniques):
    run = tiny(memsizer=memsizer, techniques=techniques)
    measured, predicted = measure(run.build(), iterations=2), predict(run.build())
    assert predicted.peak_allocated_mib == measured.peak_allocated_mib
    assert predicted.peak_by_category == measured.peak_by_category


def test_training_memory_is_linear_in_the_length():
    """Doubling both lengths a second time adds twice as much as the first time, so nothing grows faster."""
    sizes = {"hidden_size": 64, "feed_forward": 64, "batch_size": 1, "memsizer": EVERYWHERE}
    peaks = {}
    for n in (1024, 2048, 4096):
        report = predict(tiny(seq_len=n, target_len=n, **sizes).build())
        peaks[n] = report.peak_allocated_mib
    assert peaks[4096] - peaks[2048] == pytest.approx(2 * (peaks[2048] - peaks[1024]), rel=0.02)


def test_a_measured_run():
    found = tiny(memsizer=EVERYWHERE, generated=5, dropout=0.0).execute(None)
    metrics = found["metrics"]
    assert metrics["step_time_ms"] > 0
    assert metrics["generation_tokens_per_s"] > 0
    # Two layers: sum and count over the decoder's tokens, and the encoder's summary.
    assert metrics["generation_state_mib"] * 2**20 == 2 * 4 * (4 * 4 * 32 + 8 + 4 * 8 * 32)
    assert metrics["generation_beside_parameters_mib"] > metrics["generation_state_mib"]


@both
def test_answers_are_trained_judged_and_kept(memsizer, tmp_path):
    run = answering(memsizer=memsizer, validations=3)
    found = run.execute(tmp_path / "checkpoints" / "run")
    metrics, curves = found["metrics"], found["curves"]
    assert metrics["train_rows"] == 400
    assert curves["train_loss"][-1][1] < curves["train_loss"][0][1]
    for split in ("test", "extrapolate"):
        right, asked = map(sum, zip(*curves[f"{split}_by_place"].values(), strict=True))
        assert (asked, right / asked) == (40, metrics[f"{split}_exact_match"])
        assert len(curves[f"{split}_texts"]) == seq2seq.SHOWN
    steps, seconds, shares = zip(*curves["right"], strict=True)
    assert steps == (2, 4, 6)
    assert 0 < seconds[0] < seconds[1] < seconds[2] < metrics["train_time_s"] + 1
    assert shares[-1] == metrics["test_exact_match"]
    folder = tmp_path / "models" / "run"
    weights = load_file(folder / "model.safetensors")
    assert metrics["model_mib_on_disk"] * 2**20 == (folder / "model.safetensors").stat().st_size
    assert sum(w.numel() for w in weights.values()) >= metrics["n_parameters"] - 2 * 56 * 32  # sinusoids aren't saved
    assert isinstance(Seq2SeqLM.from_pretrained(folder), Seq2SeqLM)


def test_right_answers_are_what_greedy_decoding_writes(tmp_path):
    """Also with mostly right answers, from a model that has learned a few answers by heart."""
    run = answering(train_rows=8, train_steps=150, learning_rate=3e-3, dropout=0.0, eval_rows=8, batch_size=8)
    loaded = run.load_data()
    task = pairs.task_of(loaded)
    read, write = seq2seq.vocabularies(run, task, [task.read(row) for row in loaded.splits["train"]])
    rows = [task.read(row) for row in loaded.splits["train"].select(range(8))]
    rows += [task.read(row) for row in loaded.splits["test"].select(range(8))]
    encoded = seq2seq.encode(rows, read, write, run)
    torch.manual_seed(0)
    by_heart = encoded.select(range(8))
    trainer, _ = seq2seq._trained(
        run, task, run.make_model(), {"train": by_heart, "test": by_heart}, read, tmp_path / "checkpoints" / "run"
    )
    written = seq2seq.written(trainer, encoded, run)
    assert [ids == wanted for ids, wanted in zip(written, encoded["labels"], strict=True)] == seq2seq.right_answers(
        trainer, encoded
    )
    assert sum(seq2seq.right_answers(trainer, by_heart)) >= 6
    texts = [write.decode(ids, skip_special_tokens=True).strip() for ids in written[:8]]
    assert texts == [target for _, target in rows[:8]]


SCORED = [("multi30k-de-en", "bleu"), ("xsum", "rougeL"), ("openorca", "rougeL")]


@pytest.mark.parametrize(("name", "metric"), slow_but(SCORED[:2], SCORED))
def test_texts_are_trained_on_and_scored(name, metric, tmp_path):
    try:
        loaded = data.load(name)
    except ValueError as error:
        pytest.skip(str(error))
    run = tiny(
        dataset=name, data_hash=loaded.content_hash, train_steps=2, train_rows=16, eval_rows=6, measure_steps=0,
        vocab_size=400, memsizer={"decoder": {"slots": 4}}, num_beams=2, validations=1,
    )  # fmt: skip
    found = run.execute(tmp_path / "checkpoints" / "run")
    split = pairs.task_of(loaded).tests[0]
    assert 0 <= found["metrics"][f"{split}_{metric}"] <= 100
    assert found["metrics"][f"{split}_perplexity"] > 1
    assert [step for step, _ in found["curves"]["validation_loss"]] == [2]
    assert found["curves"]["signatures"] == (pairs.signatures() if metric == "bleu" else {})
    assert found["data"]["name"] == name


def test_more_characters_than_the_model_knows():
    with pytest.raises(ValueError, match=r"target_vocab_size=12: place-value-400 has 14 characters and special tokens"):
        answering(target_vocab_size=12).execute(None)


def test_a_set_without_pairs():
    loaded = data.load("miniature")
    with pytest.raises(ValueError, match="miniature holds no pairs of source and target; take one of wmt16-de-en"):
        answering(dataset="miniature", data_hash=loaded.content_hash).load_data()


def test_scores_are_the_libraries():
    wanted = ["a man rides a horse .", "two dogs play in the snow ."]
    assert pairs.bleu(wanted, wanted) == {"bleu": pytest.approx(100), "chrf": pytest.approx(100)}
    assert pairs.bleu(["a man", "cats"], wanted)["bleu"] < 10
    assert pairs.rouge(["a man rides"], ["a man walks"])["rouge1"] == pytest.approx(100 * 2 / 3)
    assert pairs.exact_match(["4", "5"], ["4", "6"]) == {"exact_match": 0.5}
    assert "tok:13a" in pairs.signatures()["bleu"]


def test_texts_are_cleaned():
    assert pairs.clean("  Ein »Test«: (kurz) –  Über 3,5 %!") == "ein test kurz über 3,5 !"


def test_the_gap_pairs_the_seeds():
    rows = pd.DataFrame({"experiment": ["Transformer", "MemSizer", "MemSizer, decoder", "MemSizer", "Transformer"]})
    rows = rows.assign(seed=[0, 1, 0, 0, 1], updates=[1000, 1500, 0, 700, 1800])
    assert experiments.gap(rows, "updates", "+,.0f") == "-300 ± 0"
    assert experiments.gap(rows[rows["seed"] == 0], "updates", "+,.0f") == "-300"


@pytest.mark.parametrize(
    ("ratios", "found", "verdict"),
    [
        ([1.0, 1.5], "1.00 to 1.50", "reproduced"),
        ([1.5, 1.5], "1.50", "partly"),
        ([0.8, 0.9], "0.80 to 0.90", "not reproduced"),
        ([None, None], "does not fit", "not testable here"),
    ],
)
def test_a_published_speed_is_judged_by_the_nearest_predicted_ratio(ratios, found, verdict):
    index = pd.MultiIndex.from_tuples([("a", 32, "T4"), ("a", 64, "T4")], names=["task", "source", "gpu"])
    predicted = pd.Series(ratios, index, dtype=float)
    ((claim, said, *results),) = experiments.speed_claims(pd.Series({"a": 1.2}), predicted, tolerance=0.1)
    assert "T4" in claim
    assert said == "1.20"
    assert results == [found, "–", verdict]
