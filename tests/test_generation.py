"""Generation: predicted and measured memory agree to the byte for every token."""

import pytest
import transformers as hf
from support.tiers import slow_but
from support.tiny_models import SIZES, TINY

from memstudy.profiler import measure, predict
from memstudy.profiler.generation import predict_generation
from memstudy.trainers.generation import GenerationRun

pytestmark = pytest.mark.usefixtures("one_thread", "young_garbage_only")

LONG = {"max_position_embeddings": 1024}
MODELS = {
    "llama": lambda: hf.LlamaConfig(**SIZES | LONG, num_key_value_heads=2, architectures=["LlamaForCausalLM"]),
    "window": lambda: hf.MistralConfig(
        **SIZES | LONG, num_key_value_heads=2, sliding_window=32, architectures=["MistralForCausalLM"]
    ),
    "gpt2": lambda: hf.GPT2Config(**TINY["gpt2"]().to_dict() | {"n_positions": 1024}),
    "mamba": lambda: hf.MambaConfig(
        hidden_size=64, num_hidden_layers=2, vocab_size=1000, state_size=8, architectures=["MambaForCausalLM"]
    ),
    "bert": lambda: TINY["bert"](),
    "t5": lambda: TINY["t5"](),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        config().to_json_file(folder / f"{name}.json", use_diff=False)
    return {name: str(folder / f"{name}.json") for name in MODELS}


def generation(model, *, prompt=20, new=64, batch=2, dtype="fp32", **choices):
    return GenerationRun(
        experiment="tiny", model=model, seq_len=prompt + new, new_tokens=new, batch_size=batch, dtype=dtype, **choices
    )


CASES = [
    ("llama", "growing", 20), ("llama", "static", 20), ("window", "growing", 20), ("window", "growing", 60),
    ("window", "static", 20), ("gpt2", "growing", 480), ("llama", "growing", 480), ("mamba", "growing", 20),
]  # fmt: skip


@pytest.mark.parametrize(("model", "cache", "prompt"), slow_but(CASES[:1], CASES))
def test_each_token_takes_what_is_predicted(model, cache, prompt, models):
    run = generation(models[model], cache=cache, prompt=prompt)
    predicted = run.foretell()
    assert predicted.iteration_peaks == measure(run.build(), iterations=1).iteration_peaks
    assert len(predicted.iteration_peaks) == 64


@pytest.mark.slow
@pytest.mark.parametrize("new", [1, 2, 12, 13, 14])
def test_few_tokens_take_what_is_predicted(new, models):
    run = generation(models["llama"], new=new)
    assert run.foretell().iteration_peaks == measure(run.build(), iterations=1).iteration_peaks


@pytest.mark.slow
@pytest.mark.parametrize(("model", "cache"), [("llama", "growing"), ("window", "growing"), ("llama", "static")])
@pytest.mark.parametrize("expandable", [False, True])
def test_on_a_gpu_the_tokens_that_follow_are_those_that_a_whole_trace_has(model, cache, expandable, models):
    run = generation(models[model], cache=cache, new=100, batch=64, dtype="fp16")
    whole = predict(run.build(), gpu="T4", iterations=1, expandable_segments=expandable)
    options = {"prompt": run.prompt, "tokens": run.new_tokens, "gpu": "T4", "expandable_segments": expandable}
    full = predict_generation(run._generates, **options, full=1)
    assert (full.iteration_peaks, full.peak_reserved_bytes) == (whole.iteration_peaks, whole.peak_reserved_bytes)
    folded = run.foretell("T4", expandable_segments=expandable)
    assert (folded.peak_bytes, folded.peak_reserved_bytes) == (whole.peak_bytes, whole.peak_reserved_bytes)
    assert all(less <= peak for less, peak in zip(folded.iteration_peaks, full.iteration_peaks, strict=True))


def cached(run):
    return max(live["cache"] for _, _, live in run.foretell("T4").timeline)


@pytest.mark.slow
def test_the_cache_has_the_grouped_heads_of_the_tokens_read(models):
    token = 2 * 2 * 2 * 2 * 32 * 2  # batch, layers, keys and values, grouped heads, their width, bytes
    growing, static = (
        cached(generation(models["llama"], dtype="fp16", new=40, cache=cache)) for cache in ("growing", "static")
    )
    rounding = 2 * 2 * 512  # of each block
    # The last token chosen is not read; while one of four tensors grows, its old copy lives.
    assert 0 <= growing - token * 59 - token // 4 * 58 <= 2 * rounding
    assert 0 <= static - token * 60 <= rounding


@pytest.mark.slow
def test_a_window_bounds_the_cache(models):
    short, long = (generation(models["window"], dtype="fp16", new=new) for new in (40, 200))
    assert cached(short) == cached(long)


@pytest.mark.slow
def test_four_bit_weights_take_a_quarter(models):
    whole, quarter = (
        generation(models["llama"], dtype="bf16", new=9, techniques=chosen).foretell("A100-80GB").peak_by_category
        for chosen in ((), ("nf4_weights",))
    )
    blocks = 2 * (2 * 128**2 + 2 * 128 * 64 + 3 * 128 * 256)  # parameters of the layers' matrices
    saved = whole["parameters"] - quarter["parameters"]
    assert saved == pytest.approx(1.5 * blocks, rel=0.02)
