"""Every lever on the models of the other studies: a step takes what is predicted, and exact levers are exact there too.

The decoder of Lab 4 and of the ablation is what `test_techniques` is about.
"""

import pytest
import torch
from test_techniques import EXACT, HERE
from tiny_models import config_file

from memstudy.lever_trainer import make_trainer
from memstudy.memory import measure, predict
from memstudy.techniques import TECHNIQUES
from memstudy.trainers import HubModelRun, ReformerRun, Seq2SeqRun, build

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"experiment": "tiny", "batch_size": 4, "measure_steps": 1}
LSH = {"variant": "lsh", "num_hashes": 2, "chunk_length": 8, "num_buckets": 4, "hash_seed": 0}


def classifier(folder, **changes):
    """GLUE: an encoder whose projections are factored."""
    model = config_file(folder, "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    factored = {"variant": "lowrank", "rank": 4}
    return HubModelRun(model=model, task="classification", seq_len=16, convert_to=factored, **SIZES, **changes)


def masked(folder, **changes):
    """GLUE: an encoder that fills in words."""
    model = config_file(folder, "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return HubModelRun(model=model, seq_len=16, **SIZES, **changes)


def reformer(folder, **changes):
    sizes = {"n_layers": 2, "hidden_size": 32, "n_heads": 2, "head_dim": 8, "feed_forward": 48, "vocab_size": 300}
    return ReformerRun(**sizes, seq_len=32, attention=LSH, dropout=0.0, **SIZES, **changes)


def seq2seq(folder, **changes):
    """MemSizer in the decoder, exact attention elsewhere."""
    sizes = {"n_layers": 2, "hidden_size": 32, "n_heads": 2, "feed_forward": 64, "vocab_size": 60, "seq_len": 24}
    return Seq2SeqRun(**sizes, target_len=16, memsizer={"decoder": {"slots": 4}}, dropout=0.0, **SIZES, **changes)


MODELS = {made.__name__: made for made in (classifier, masked, reformer, seq2seq)}
RUN_BACKWARDS = "ReformerLM does not support activation checkpointing"  # its layers are recomputed as they are
NOT_KNOWN = "keeps the projections of its attention is not known"
REFUSED = {
    ("chunked_loss", "classifier"): "chunked_loss is for causal language models",
    ("chunked_loss", "masked"): "chunked_loss is for causal language models",
    ("fewer_heads", "classifier"): "the projections of this BertAttention are not one matrix each",
    ("checkpointing", "reformer"): RUN_BACKWARDS,
    ("selective_checkpointing", "reformer"): RUN_BACKWARDS,
    ("masks", "seq2seq"): "MemSizer reads the weights of its projections past the hook",
    ("fewer_heads", "reformer"): NOT_KNOWN,
    ("fewer_heads", "seq2seq"): NOT_KNOWN,
}


@pytest.mark.parametrize("model", [name for name in MODELS if name != "masked"])
@pytest.mark.parametrize("name", HERE)
def test_a_step_takes_what_is_predicted(name, model, tmp_path):
    if (name, model) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name, model]):
            build(MODELS[model](tmp_path, techniques=(name,)))()
        return
    run = MODELS[model](tmp_path, techniques=(name,))
    measured, predicted = measure(build(run)), predict(build(run))
    if TECHNIQUES[name].packages and name != "lora":  # their kernels have scratch of their own, which is not predicted
        for category in ("parameters", "optimizer"):
            assert predicted.most_by_category[category] == pytest.approx(measured.most_by_category[category], abs=64)
        assert predicted.peak_bytes <= measured.peak_bytes
        return
    assert predicted.iteration_peaks == measured.iteration_peaks
    assert sum(predicted.peak_by_category.values()) == sum(measured.peak_by_category.values())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", sorted(name for name, t in TECHNIQUES.items() if t.in_training and t.requires))
def test_what_needs_a_gpu_is_predicted_for_one(name, model, tmp_path):
    run = MODELS[model](tmp_path, techniques=(name,))
    assert predict(build(run, gpu="A100-40GB"), gpu="A100-40GB").peak_bytes > 0


def updated(made, folder, *techniques):
    """What two updates by the gradient alone change, each of four rows, some of whose labels do not count."""
    run = made(folder, techniques=(*techniques, "sgd"), learning_rate=1.0)
    torch.manual_seed(0)
    batch, model = run.make_batch(), run.make_model()
    if batch["labels"].dim() == 2:
        batch["labels"] = batch["labels"].clone()
        batch["labels"][0, 5:] = batch["labels"][2, 9:] = -100
    rows = 2 * [{name: tensor[row] for name, tensor in batch.items()} for row in range(run.batch_size)]
    trainer = make_trainer(
        run, model, folder, train_steps=2, train=rows,  # of the first the learning rate may be 0

        collate=lambda rows: {name: torch.stack([row[name] for row in rows]) for name in rows[0]},
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


ALLOWED = [(text, model) for text in EXACT for model in MODELS if (text.partition("=")[0], model) not in REFUSED]


@pytest.mark.parametrize(("text", "model"), ALLOWED, ids=lambda value: value)
def test_an_exact_levers_updates_are_the_plain_ones(text, model, tmp_path):
    plain, found = updated(MODELS[model], tmp_path), updated(MODELS[model], tmp_path, text)
    assert max(update.abs().max() for update in plain.values()) > 1e-3
    for name, update in plain.items():
        torch.testing.assert_close(
            found[name], update, rtol=1e-4, atol=1e-6, msg=lambda said, name=name: f"{name}: {said}"
        )
