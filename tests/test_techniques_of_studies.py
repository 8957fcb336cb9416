"""Every technique on the other studies' models: a step takes the predicted memory, and exact techniques stay exact.

`test_techniques` tests the decoder of Lab 4 and of the ablation.
"""

import functools
import itertools
import tempfile
from pathlib import Path

import pytest
import torch
from support.study_models import MODELS
from support.techniques import EXACT, HERE
from support.tiers import cover, slow_but

from memstudy.profiler import measure, predict
from memstudy.techniques import TECHNIQUES
from memstudy.trainers.trainer import make_trainer

pytestmark = pytest.mark.usefixtures("one_thread", "young_garbage_only")

RUN_BACKWARDS = "ReformerLM does not support activation checkpointing"  # its layers already recompute
NOT_KNOWN = "the attention projections of .* are not known"
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


STEPS = list(itertools.product(HERE, [name for name in MODELS if name != "masked"]))


@pytest.mark.parametrize(("name", "model"), slow_but(cover(STEPS), STEPS))
def test_a_step_takes_what_is_predicted(name, model, tmp_path):
    if (name, model) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name, model]):
            MODELS[model](tmp_path, techniques=(name,)).build()()
        return
    run = MODELS[model](tmp_path, techniques=(name,))
    measured, predicted = measure(run.build()), predict(run.build())
    # The scratch of these packages' kernels is not predicted, nor oneDNN's for products of bfloat16 weights.
    if TECHNIQUES[name].packages not in ((), ("peft",)) or name == "pure_bf16":
        for category in ("parameters", "optimizer"):
            assert predicted.most_by_category[category] == pytest.approx(measured.most_by_category[category], abs=64)
        assert predicted.peak_bytes <= measured.peak_bytes
        return
    assert predicted.iteration_peaks == measured.iteration_peaks
    assert sum(predicted.peak_by_category.values()) == sum(measured.peak_by_category.values())


ON_A_GPU = [(name, model) for name, t in sorted(TECHNIQUES.items()) if t.in_training and t.requires for model in MODELS]


@pytest.mark.parametrize(("name", "model"), slow_but(cover(ON_A_GPU), ON_A_GPU))
def test_what_needs_a_gpu_is_predicted_for_one(name, model, tmp_path):
    run = MODELS[model](tmp_path, techniques=(name,))
    assert predict(run.build(gpu="A100-40GB"), gpu="A100-40GB").peak_bytes > 0


def updated(made, folder, *techniques):
    """Changes of the parameters in two SGD updates of four rows each, with some labels ignored."""
    run = made(folder, techniques=(*techniques, "sgd"), learning_rate=1.0)
    torch.manual_seed(0)
    batch, model = run.make_batch(), run.make_model()
    if batch["labels"].dim() == 2:
        batch["labels"] = batch["labels"].clone()
        batch["labels"][0, 5:] = batch["labels"][2, 9:] = -100
    rows = 2 * [{name: tensor[row] for name, tensor in batch.items()} for row in range(run.batch_size)]
    trainer = make_trainer(
        run, model, folder, train_steps=2, train=rows,  # the first update may have a learning rate of 0

        collate=lambda rows: {name: torch.stack([row[name] for row in rows]) for name in rows[0]},
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


ALLOWED = [(text, model) for text in EXACT for model in MODELS if (text.partition("=")[0], model) not in REFUSED]


@functools.cache
def plain_updates(model):
    with tempfile.TemporaryDirectory() as folder:
        return updated(MODELS[model], Path(folder))


@pytest.mark.parametrize(("text", "model"), slow_but(cover(ALLOWED), ALLOWED))
def test_an_exact_techniques_updates_are_the_plain_ones(text, model, tmp_path):
    plain, found = plain_updates(model), updated(MODELS[model], tmp_path, text)
    assert max(update.abs().max() for update in plain.values()) > 1e-3
    for name, update in plain.items():
        torch.testing.assert_close(
            found[name], update, rtol=1e-4, atol=1e-6, msg=lambda said, name=name: f"{name}: {said}"
        )
