"""Batches of unequal lengths: predicted and measured memory agree to the byte in every step, and so do replays."""

import random

import pytest
import transformers as hf
from support.tiers import slow_but
from support.tiny_models import SIZES, TINY

from memstudy.profiler import StepShape, measure, predict
from memstudy.trainers.hub_model import HubModelRun

pytestmark = pytest.mark.usefixtures("one_thread", "young_garbage_only")

LONG = {"max_position_embeddings": 1024}
MODELS = {
    "llama": lambda: hf.LlamaConfig(**SIZES | LONG, num_key_value_heads=2, architectures=["LlamaForCausalLM"]),
    "gpt2": lambda: hf.GPT2Config(**TINY["gpt2"]().to_dict() | {"n_positions": 1024}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        config().to_json_file(folder / f"{name}.json", use_diff=False)
    return {name: str(folder / f"{name}.json") for name in MODELS}


def step_of(model, **choices):
    return HubModelRun(experiment="tiny", model=model, batch_size=2, seq_len=64, **choices)


def shapes(count, longest, seed=0):
    lengths = random.Random(seed)
    pairs = [sorted((lengths.randint(2, longest), lengths.randint(2, longest))) for _ in range(count)]
    return [StepShape(long, 2, short < long) for short, long in pairs]


CASES = [
    ("gpt2", (), 200), ("llama", ("lora=4",), 150), ("llama", (), 1024), ("llama", ("checkpointing",), 300),
]  # fmt: skip


@pytest.mark.parametrize(("model", "techniques", "longest"), slow_but(CASES[:2], CASES))
def test_each_of_fifty_steps_takes_what_is_predicted(model, techniques, longest, models):
    run, asked = step_of(models[model], techniques=techniques), shapes(50, longest)
    predicted = run.foretell_lengths(asked)
    measured = measure(run.build(shapes=asked), iterations=50)
    assert predicted.step_peaks == measured.iteration_peaks
    assert predicted.traced < len(set(asked)) - 2
