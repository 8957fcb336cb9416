"""Models that read images, images with texts, or sound: ViT, CLIP and Whisper."""

import pytest
from pydantic import ValidationError
from support.tiny_models import config_file

from memstudy.profiler import measure, predict
from memstudy.trainers.hub_model import HubModelRun

pytestmark = pytest.mark.usefixtures("one_thread", "young_garbage_only")

READERS = {"vit": (17, "classification"), "clip": (16, "contrastive"), "whisper": (16, "lm")}  # tokens, task


def reader(folder, family, **changes) -> HubModelRun:
    seq_len, task = READERS[family]
    choices = {"experiment": "test", "batch_size": 4, "seq_len": seq_len, "task": task, **changes}
    return HubModelRun(model=config_file(folder, family), **choices)


@pytest.mark.parametrize("techniques", [(), ("checkpointing", "accumulation=2")], ids=str)
@pytest.mark.parametrize("family", READERS)
def test_a_step_on_images_or_sound_takes_what_is_predicted(family, techniques, tmp_path):
    """In fp32: no rule covers oneDNN's scratch for the convolution of an image in bf16."""
    make = reader(tmp_path, family, techniques=techniques).build()
    measured, predicted = measure(make), predict(make)
    assert predicted.peak_bytes == measured.peak_bytes
    assert predicted.peak_by_category == measured.peak_by_category


def test_a_batch_has_what_the_model_reads(tmp_path):
    images = reader(tmp_path, "vit", batch_size=64).make_batch()
    assert {name: tuple(tensor.shape) for name, tensor in images.items()} == {
        "pixel_values": (64, 3, 32, 32), "labels": (64,),
    }  # fmt: skip
    assert set(images["labels"].tolist()) == set(range(5))
    pairs = reader(tmp_path, "clip").make_batch()
    assert {name: tuple(tensor.shape) for name, tensor in pairs.items()} == {
        "input_ids": (4, 16), "pixel_values": (4, 3, 32, 32),
    }  # fmt: skip
    sound = reader(tmp_path, "whisper").make_batch()
    assert {name: tuple(tensor.shape) for name, tensor in sound.items()} == {
        "input_features": (4, 8, 96), "labels": (4, 16),
    }  # fmt: skip


@pytest.mark.parametrize("family", READERS)
def test_every_part_of_the_model_is_trained(family, tmp_path):
    """Whisper's encoder has sinusoids for positions, which stay."""
    run = reader(tmp_path, family)
    model = run.make_model()
    model(**run.make_batch())["loss"].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert fixed == ({"model.encoder.embed_positions.weight"} if family == "whisper" else set())


@pytest.mark.parametrize(
    ("model", "choices", "said"),
    [
        ("vit-base", {"task": "classification", "seq_len": 128}, "224 × 224 pixels is 197 tokens to vit-base"),
        ("vit-base", {"seq_len": 197}, "is needed, or task classification"),
        ("clip-vit-base-patch32", {"seq_len": 77}, "is needed, or task contrastive"),
        ("clip-vit-base-patch32", {"seq_len": 78, "task": "contrastive"}, "more than the 77 positions"),
        ("clip-vit-base-patch32", {"seq_len": 77, "task": "classification"}, "no classifier of the family"),
        ("whisper-tiny", {"seq_len": 449}, "more than the 448 positions of whisper-tiny"),
        ("whisper-tiny", {"seq_len": 448, "task": "classification"}, "no classifier of the family"),
        ("gpt2", {"seq_len": 16, "task": "contrastive"}, "task contrastive is for CLIPModel"),
        ("whisper-tiny", {"seq_len": 16, "techniques": ("chunked_loss",)}, "chunked_loss is for causal language"),
    ],
    ids=str,
)
def test_what_a_model_of_images_or_sound_cannot_do_is_told(model, choices, said):
    with pytest.raises(ValidationError) as refused:
        HubModelRun(experiment="test", model=model, batch_size=2, **choices)
    (error,) = refused.value.errors()
    assert said in error["msg"]
    assert "\n" not in error["msg"]
