"""Generation: predicted and measured memory agree to the byte for every token, and the largest that fits is found."""

import json
import re

import pytest
import transformers as hf
from support.tiers import slow_but
from support.tiny_models import SIZES, TINY, write_configs
from typer.testing import CliRunner

from memstudy.cli.main import app
from memstudy.profiler import measure, predict
from memstudy.studies.attention_layer.experiments import crossover, while_decoding
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
    return write_configs(MODELS, tmp_path_factory.mktemp("models"))


def generation(model, *, prompt=20, new=64, batch=2, dtype="fp32", **choices):
    return GenerationRun(
        experiment="tiny", model=model, seq_len=prompt + new, new_tokens=new, batch_size=batch, dtype=dtype, **choices
    )


CASES = [
    ("llama", "growing", 20), ("llama", "static", 20), ("window", "growing", 20), ("window", "growing", 60),
    ("window", "static", 20), ("gpt2", "growing", 480), ("llama", "growing", 480), ("mamba", "growing", 20),
    ("llama", "fp8", 20), ("llama", "quanto4", 20), ("llama", "quanto2", 32),
]  # fmt: skip


@pytest.mark.parametrize(("model", "cache", "prompt"), slow_but(CASES[:1], CASES))
def test_each_token_takes_what_is_predicted(model, cache, prompt, models):
    run = generation(models[model], cache=cache, prompt=prompt)
    predicted = run.foretell()
    assert predicted.iteration_peaks == measure(run.build(), iterations=1).iteration_peaks
    assert len(predicted.iteration_peaks) == 64


@pytest.mark.slow
def test_optimum_quantos_own_cache_takes_what_its_rules_say(models, monkeypatch):
    pytest.importorskip("optimum.quanto")
    run = generation(models["llama"], cache="quanto4", new=150)
    predicted = run.foretell()
    real = {"cache_implementation": "quantized", "cache_config": {"backend": "quanto", "nbits": 4}}
    monkeypatch.setattr(GenerationRun, "_cache", lambda self: real)
    assert predicted.iteration_peaks == measure(run.build(), iterations=1).iteration_peaks


@pytest.mark.slow
@pytest.mark.parametrize("new", [1, 2, 12, 13, 14])
def test_few_tokens_take_what_is_predicted(new, models):
    run = generation(models["llama"], new=new)
    assert run.foretell().iteration_peaks == measure(run.build(), iterations=1).iteration_peaks


@pytest.mark.slow
@pytest.mark.parametrize(("model", "cache"), [("llama", "growing"), ("window", "growing"), ("llama", "static")])
@pytest.mark.parametrize("expandable", [False, True])
def test_on_a_gpu_the_tokens_that_follow_are_those_that_a_whole_trace_has(
    model, cache, expandable, models, monkeypatch
):
    run = generation(models[model], cache=cache, new=100, batch=64, dtype="fp16")
    whole = predict(run.build(), gpu="T4", iterations=1, expandable_segments=expandable)
    folded = run.foretell("T4", expandable_segments=expandable)
    monkeypatch.setattr("memstudy.profiler.generation.FULL", 1)
    full = run.foretell("T4", expandable_segments=expandable)
    assert (full.iteration_peaks, full.peak_reserved_bytes) == (whole.iteration_peaks, whole.peak_reserved_bytes)
    assert (folded.peak_bytes, folded.peak_reserved_bytes) == (whole.peak_bytes, whole.peak_reserved_bytes)
    assert all(less <= peak for less, peak in zip(folded.iteration_peaks, full.iteration_peaks, strict=True))


@pytest.mark.parametrize("new", [40, pytest.param(3, marks=pytest.mark.slow)])
def test_the_times_of_the_passes_are_those_that_whole_traces_have(new, models):
    run = generation(models["llama"], new=new, dtype="fp16")
    times = run.foretell("T4").time_by_pass
    one, after = (predict(run._generates(20, tokens), gpu="T4", iterations=1).time for tokens in (1, new + 1))
    assert times == {"prefill": one, "token": after}
    assert one.kernels_ms > after.kernels_ms
    assert generation(models["llama"], new=3, dtype="fp16", cache="static").foretell("T4").time_by_pass.keys() == {
        "prefill"
    }
    assert not run.foretell().time_by_pass


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
@pytest.mark.parametrize("weights", ["nf4_weights", "int8_weights"])
def test_with_quantised_weights_each_token_takes_what_is_predicted(weights, models):
    run = generation(models["llama"], dtype="bf16", techniques=(weights,))
    assert run.foretell().iteration_peaks == measure(run.build(), iterations=1).iteration_peaks


@pytest.mark.slow
def test_four_bit_weights_take_a_quarter(models):
    whole, quarter = (
        generation(models["llama"], dtype="bf16", new=9, techniques=chosen).foretell("A100-80GB").peak_by_category
        for chosen in ((), ("nf4_weights",))
    )
    blocks = 2 * (2 * 128**2 + 2 * 128 * 64 + 3 * 128 * 256)  # parameters of the layers' matrices
    saved = whole["parameters"] - quarter["parameters"]
    assert saved == pytest.approx(1.5 * blocks, rel=0.02)


@pytest.mark.slow
def test_a_growing_cache_passes_a_state_of_constant_size(models):
    llama, mamba = models["llama"], models["mamba"]
    slots = {"memsizer": {"variant": "memsizer", "slots": 8}}
    table = while_decoding([llama, mamba], slots, [65, 129, 513], like=llama, batch_size=2, gpu="T4")
    token = 2 * 2 * 2 * 2 * 32 * 2 / 2**20  # batch, layers, keys and values, grouped heads, their width, bytes; MiB
    assert table[llama].to_list() == pytest.approx([64 * token, 128 * token, 512 * token])
    assert table[mamba].nunique() == table.memsizer.nunique() == 1
    state = 2 * 2 * (8 * 128 + 1) * 4 / 2**20
    assert crossover(table, llama, "memsizer") == pytest.approx(1 + state / token)


# --- the command line


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_parts_of_generation_add_up(models):
    options = ["predict", "--model", models["llama"], "--prompt", 20, "--generate", 2, "--batch", 2, "--gpu", "T4"]
    shown = invoke(*options).stdout
    assert "2 tokens generated after 20 on T4, predicted" in shown
    assert re.search(
        r"^token: [\d.]+ ms \([\d.]+ to [\d.]+\), predicted; bound by the host, .*: a lower bound$", shown, re.M
    )
    said = json.loads(invoke(*options, "--json").stdout)
    parts = said["waterfall_mib"]
    assert list(parts)[:5] == ["parameters", "cache", "temporary", "logits", "other"]
    assert sum(parts.values()) == pytest.approx(said["whole_gpu_mib"])
    assert said["time"] is None
    assert said["time_by_pass"].keys() == {"prefill", "token"}


@pytest.mark.parametrize(("search", "budget"), [("batch", 6), pytest.param("seq-len", 4, marks=pytest.mark.slow)])
def test_fit_finds_the_largest_that_fits(search, budget, models):
    options = ["--model", models["llama"], "--dtype", "fp32", "--generate", 2]
    found = invoke("fit", *options, "--prompt", 400, "--budget-mib", budget, "--search", search, "--json")
    (row,) = json.loads(found.stdout)

    def needed(batch, text):
        run = generation(models["llama"], prompt=text - 2, new=2, batch=batch)
        return run.foretell().peak_allocated_mib

    assert needed(row["batch_size"], row["seq_len"]) == row["needed_mib"] <= budget
    more = (row["batch_size"] + 1, row["seq_len"]) if search == "batch" else (1, row["seq_len"] + 8)
    assert needed(*more) > budget
    assert row["batch_size"] == 1 if search == "seq-len" else row["seq_len"] == 402


BAD = [
    ("gpt2", ["--prompt", 1000, "--generate", 25], "a prompt of 1000 and 25 new tokens is more than the 1024"),
    ("gpt2", ["--prompt", 10, "--generate", 0], "--generate"),
    ("gpt2", ["--prompt", 0, "--generate", 10], "--prompt"),
    ("gpt2", ["--generate", 10], "--generate needs --prompt"),
    ("gpt2", ["--generate", 10, "--prompt", 10, "--seq-len", 10], "no --seq-len"),
    ("gpt2", ["--seq-len", 10, "--cache", "static"], "--cache and --dtype are for --generate"),
    ("gpt2", [], "missing option --seq-len"),
    ("window", ["--prompt", 10, "--generate", 10, "--cache", "fp8"], "full attention alone, and the model has sliding"),
    ("mamba", ["--prompt", 10, "--generate", 10, "--cache", "quanto4"], "cache quanto4"),
    ("bert", ["--prompt", 10, "--generate", 10], "generation is for causal language models"),
    ("t5", ["--prompt", 10, "--generate", 10], "generation is for causal language models"),
    ("gpt2", ["--prompt", 10, "--generate", 10, "--technique", "lora"], "technique 'lora' is for training alone"),
]


@pytest.mark.parametrize(("model", "options", "said"), BAD)
def test_what_cannot_be_generated_is_said_in_one_line(model, options, said, models):
    result = invoke("predict", "--model", models[model], "--batch", 1, *options)
    assert result.exit_code == 2
    assert said in result.stderr.splitlines()[-1]
