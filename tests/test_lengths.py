"""Batches of unequal lengths: predicted and measured memory agree to the byte in every step, and so do replays."""

import json
import random
import re

import pytest
import torch
import transformers as hf
from support.command_line import assert_one_line, invoke
from support.tiers import slow_but
from support.tiny_models import SIZES, TINY, write_configs

from memstudy.attention import Unavailable
from memstudy.cli.of_lengths import AskedOfAny, quantiles, show_epoch
from memstudy.data.lengths import batches
from memstudy.kinds import parse_run
from memstudy.profiler import Gpu, StepShape, measure, over_lengths, predict
from memstudy.studies.fine_tuning.epoch import EpochRun
from memstudy.trainers.hub_model import HubModelRun

pytestmark = pytest.mark.usefixtures("one_thread", "young_garbage_only")

LONG = {"max_position_embeddings": 1024, "num_hidden_layers": 1}
MODELS = {
    "llama": lambda: hf.LlamaConfig(**SIZES | LONG, num_key_value_heads=2, architectures=["LlamaForCausalLM"]),
    "gpt2": lambda: hf.GPT2Config(**TINY["gpt2"]().to_dict() | {"n_positions": 1024, "n_layer": 1}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_configs(MODELS, tmp_path_factory.mktemp("models"))


def step_of(model, **choices):
    return HubModelRun(**{"experiment": "tiny", "model": model, "batch_size": 2, "seq_len": 64} | choices)


def shapes(count, longest, seed=0):
    lengths = random.Random(seed)
    pairs = [sorted((lengths.randint(2, longest), lengths.randint(2, longest))) for _ in range(count)]
    return [StepShape(long, 2, short < long) for short, long in pairs]


CASES = [
    ("gpt2", (), 60), ("gpt2", (), 200), ("llama", ("lora=4",), 150),
    ("llama", (), 1024), ("llama", ("checkpointing",), 300),
]  # fmt: skip


@pytest.mark.parametrize(("model", "techniques", "longest"), slow_but(CASES[:1], CASES))
def test_each_of_fifty_steps_takes_what_is_predicted(model, techniques, longest, models):
    run, asked = step_of(models[model], techniques=techniques), shapes(50, longest)
    predicted = run.foretell_lengths(asked)
    measured = measure(run.build(shapes=asked), iterations=50)
    assert predicted.step_peaks == measured.iteration_peaks
    assert predicted.traced < len(set(asked)) - 2  # the others follow


@pytest.mark.parametrize("parts", slow_but([3], [2, 3, 5]))
def test_each_part_of_an_accumulated_update_takes_what_is_predicted(parts, models):
    run = step_of(models["gpt2"], techniques=(f"accumulation={parts}",), batch_size=2 * parts)
    predicted = run.foretell_lengths(shapes(40, 40))
    measured = measure(run.build(shapes=predicted.shapes), iterations=40)
    assert predicted.step_peaks == measured.iteration_peaks
    assert predicted.traced < len(set(predicted.shapes))  # the others follow


@pytest.mark.slow
def test_on_a_gpu_the_parts_of_updates_are_those_that_a_whole_trace_has(models):
    run = step_of(models["llama"], techniques=("bf16", "accumulation=4"), batch_size=8)
    followed = run.foretell_lengths(shapes(30, 400), "RTX4090")
    whole = predict(run.build(gpu="RTX4090", shapes=followed.shapes), gpu="RTX4090", iterations=30)
    assert followed.step_peaks == whole.iteration_peaks
    assert max(followed.reserved_peaks) == whole.peak_reserved_bytes


@pytest.mark.parametrize("expandable", slow_but([False], [False, True]))
@pytest.mark.parametrize("flattened", slow_but([False], [False, True]))
def test_on_a_gpu_the_steps_that_follow_are_those_that_a_whole_trace_has(expandable, flattened, models):
    asked = shapes(16, 400)
    if flattened:
        asked = [StepShape.of((shape.tokens, 17 + place, 30), flattened=True) for place, shape in enumerate(asked)]
    run = step_of(models["llama"], techniques=("bf16",), attention="flash" if flattened else "sdpa")
    followed = run.foretell_lengths(asked, "RTX4090", expandable_segments=expandable)
    whole = predict(
        run.build(gpu="RTX4090", shapes=asked), gpu="RTX4090", iterations=16, expandable_segments=expandable
    )
    assert followed.step_peaks == whole.iteration_peaks
    assert max(followed.reserved_peaks) == whole.peak_reserved_bytes
    assert followed.traced < 15


WIDTH = 64


def perceptron(asked):
    """A step whose blocks are on a line in tokens, but for one that a kernel makes from 100 tokens on."""

    def build():
        weight = torch.ones(WIDTH, WIDTH, requires_grad=True)
        updates = torch.optim.SGD([weight])
        waiting = iter(asked)

        def step():
            rows = torch.ones(next(waiting).tokens, WIDTH)
            loss = (rows @ weight).square().sum()
            if len(rows) >= 100:
                loss = loss + rows.mean()
            loss.backward()
            updates.step()
            updates.zero_grad()

        return step

    return build


def test_a_kernel_that_changes_with_the_length_is_found():
    asked = [StepShape(tokens) for tokens in random.Random(0).sample(range(2, 200), 70)]
    followed = over_lengths(perceptron, asked)
    assert followed.step_peaks == predict(perceptron(asked), iterations=70).iteration_peaks
    assert followed.traced < 50


def test_blocks_that_follow_no_formula_are_refused(monkeypatch):
    monkeypatch.setattr("memstudy.profiler.lengths.MOST_TRACED", 20)
    sizes = random.Random(0)

    def of_random_sizes(asked):
        def build():
            return lambda: torch.ones(sizes.randrange(1, 2**20))

        return build

    with pytest.raises(ValueError, match="no 20 lengths: pad the lengths to multiples of 64"):
        over_lengths(of_random_sizes, range(2, 90))


def small_gpu(memory_mib):
    return Gpu(name="small", compute_capability=(8, 0), memory_mib=memory_mib, context_mib=10)


def test_the_first_step_without_room_is_named_and_the_others_go_on():
    asked = [StepShape(tokens) for tokens in (1000, 2000, 90_000, 3000, 100_000, 1000)]
    report = over_lengths(perceptron, asked, gpu=small_gpu(110))
    assert report.refused == (3, 5)
    assert report.out_of_memory.iteration == 3
    assert report.worst == 5
    whole = over_lengths(perceptron, asked, gpu=small_gpu(1000))
    assert (whole.refused, whole.out_of_memory) == ((), None)
    assert whole.step_peaks == report.step_peaks


def test_an_emptied_cache_lets_the_reserved_memory_fall():
    asked = [StepShape(tokens) for tokens in (1000, 90_000, 1000, 1000, 1000, 1000)]
    kept = over_lengths(perceptron, asked, gpu=small_gpu(1000)).step_reserved
    emptied = over_lengths(perceptron, asked, gpu=small_gpu(1000), empty_cache_every=4).step_reserved
    assert kept[1:] == (kept[1],) * 5
    assert emptied[:4] == kept[:4]
    assert emptied[4] == emptied[5] < kept[4]


def test_a_line_through_two_lengths_meets_the_others():
    report = over_lengths(perceptron, [StepShape(tokens) for tokens in range(100, 200)])
    assert report.bytes_per_token == pytest.approx(4 * WIDTH * 4, rel=0.3)
    assert report.worst_deviation < 1e-3


@pytest.mark.parametrize(
    ("asked", "choices", "said"),
    [
        ([], {}, "no lengths"), ([0], {}, "step 1 has 1 × 0 tokens"), ([4], {"empty_cache_every": 0}, "every=0"),
        ([4], {"gpu": "none"}, "none"),
    ],
)  # fmt: skip
def test_impossible_sequences_are_refused(asked, choices, said):
    with pytest.raises(ValueError, match=said):
        over_lengths(perceptron, asked, **choices)


@pytest.fixture
def counts(tmp_path):
    path = tmp_path / "lengths.csv"
    path.write_text("tokens\n" + "\n".join(str(number) for number in (5, 30, 12, 30, 7, 64, 9, 21)))
    return path


def test_the_command_line_says_which_step_is_the_worst(counts, models, tmp_path):
    asked = ("--model", models["gpt2"], "--batch", 2, "--lengths", counts)
    printed = invoke("predict", *asked, "--figure", tmp_path / "peaks.pdf")
    assert printed.exit_code == 0, printed.output
    assert "4 steps on cpu, predicted" in printed.stdout
    assert "8 texts, shuffled; padding:" in printed.stdout
    assert "× 64 tokens" in printed.stdout
    assert all((tmp_path / f"peaks.{kind}").stat().st_size for kind in ("pdf", "png"))
    found = json.loads(invoke("predict", *asked, "--sampler", "grouped", "--json").stdout)
    assert (found["sampler"], found["steps"]) == ("grouped", 4)
    assert found["quantiles"]["allocated_mib"]["max"] == max(found["step_peaks"]) / 2**20


def test_the_first_step_without_room_is_printed(capsys, tmp_path):
    (tmp_path / "lengths.csv").write_text("1000\n90000\n2000\n")
    asked = AskedOfAny(model="any", lengths=tmp_path / "lengths.csv", sampler="buckets")
    report = over_lengths(perceptron, [StepShape.of(batch) for batch in asked.batches(1)], gpu=small_gpu(110))
    show_epoch(asked, 1, report)
    printed = capsys.readouterr().out
    assert "3 steps on small, predicted" in printed
    assert "3 texts, buckets; padding: 0.0 % of the tokens" in printed
    assert "worst step: 1, 1 × 90,000 tokens" in printed
    assert re.search(r"does not fit: out of memory in \w+ of step 1, asking for .* 1 of 3 steps do not fit", printed)
    assert quantiles(report)["tokens"] == {"median": 2000, "p90": 72_400, "p99": 88_240, "max": 90_000}


@pytest.mark.slow
def test_the_largest_batch_survives_the_whole_epoch(counts, models):
    run = step_of(models["gpt2"])
    sizes = {size: [StepShape.of(batch) for batch in batches([5, 30, 12, 30, 7, 64, 9, 21], size)] for size in (2, 3)}
    two, three = (run.foretell_lengths(shapes).peak_allocated_mib for shapes in sizes.values())
    asked = ("fit", "--model", models["gpt2"], "--lengths", counts, "--budget-mib")
    (found,) = json.loads(invoke(*asked, (two + three) / 2, "--json").stdout)
    assert (found["batch_size"], found["refused_at"]) == (2, 3)


@pytest.mark.slow
def test_advice_begins_with_the_batches(counts, models):
    counts.write_text("\n".join(str(7 * number % 41 + 1) for number in range(24)))  # fewer than 16 are not grouped
    asked = ("--model", models["llama"], "--batch", 2, "--lengths", counts, "--json")
    way = ("shuffled", "grouped", "shuffled, without padding", "packed")
    found = json.loads(invoke("advise", *asked, "--budget-mib", 1).stdout)
    assert tuple(answer["batches"] for answer in found[:4]) == way
    assert not any(answer["fits"] for answer in found)
    assert found[0]["padded_share"] > found[1]["padded_share"] > found[2]["padded_share"] == 0
    found = json.loads(invoke("advise", *asked, "--budget-mib", 1000).stdout)
    assert [answer["fits"] for answer in found] == [True]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--lengths", "none.csv"), ("none.csv", "No such file")),
        (("--lengths", "zero.csv"), ("zero.csv", "line 2", "'0'")),
        (("--lengths", "empty.csv"), ("empty.csv", "empty")),
        (("--lengths", "words.csv"), ("words.csv", "line 2", "'many'")),
        (("--lengths", "long.csv"), ("text 2 has 2,000 tokens", "1,024 positions", "--seq-len 1024")),
        (("--lengths", "long.csv", "--dataset", "alpaca"), ("--lengths has counts already",)),
        (("--lengths", "long.csv", "--seq-len", "64", "--generate", "8"), ("--generate",)),
        (("--lengths", "long.csv", "--sampler", "packed"), ("--sampler packed needs --seq-len",)),
        (("--dataset", "texts.txt"), ("--dataset needs --tokenizer",)),
        (("--dataset", "texts.txt", "--tokenizer", "./none"), ("tokenizer './none' not found",)),
        (("--dataset", "nowhere", "--tokenizer", "./none"), ("unknown data set 'nowhere'",)),
        (("--seq-len", "64", "--sampler", "grouped"), ("--sampler is for batches of unequal lengths",)),
        (("--seq-len", "64", "--figure", "peaks.pdf"), ("--figure peaks.pdf",)),
        (("--lengths", "long.csv", "--seq-len", "64", "--processes", "2"), ("one process", "leave --processes out")),
    ],
    ids=lambda given: given[0],
)
def test_bad_lengths_are_one_line(options, words, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in {"zero": "4\n0\n", "empty": "", "words": "4\nmany\n", "long": "4\n2000\n"}.items():
        (tmp_path / f"{name}.csv").write_text(text)
    (tmp_path / "texts.txt").write_text("some text\n")
    assert_one_line(invoke("predict", "--model", models["gpt2"], "--batch", 2, *options), *words)


def test_an_epoch_of_a_study_leaves_its_distribution(models):
    run = EpochRun(
        experiment="packed",
        of=step_of(models["llama"], techniques=("bf16",), attention="flash").model_copy(update={"seq_len": 256}),
        gpu="RTX4090",
        dataset="openorca",
        sampler="packed",
        flattened=True,
        steps=5,
    )
    assert parse_run(run.model_dump(mode="json")) == run
    made = run.execute(None)
    metrics = made["metrics"]
    assert (metrics["n_steps"], metrics["padded_percent"], metrics["fits"]) == (5, 0.0, True)
    assert metrics["step_peak_median_mib"] <= metrics["step_peak_p99_mib"] <= metrics["step_peak_max_mib"]
    assert max(peak for peak, _ in made["curves"]["step_mib"]) <= metrics["whole_gpu_mib"]
    assert sum(map(sum, run.batches())) == metrics["n_tokens"] <= 5 * 2 * 256


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dataset": "none"}, "no histogram"), ({"sampler": "packed"}, "share a row"), ({"gpu": "none"}, "none"),
    ],
)  # fmt: skip
def test_an_impossible_epoch_is_refused(changes, said, models):
    given = {"experiment": "x", "of": step_of(models["llama"]), "gpu": "T4", "dataset": "alpaca"}
    with pytest.raises(ValueError, match=said):
        EpochRun(**given | changes)


def test_flash_attention_is_for_cards_and_batches_that_have_it(models):
    padded = [StepShape(64, 2, True)]
    with pytest.raises(Unavailable, match="Ampere"):
        step_of(models["llama"], techniques=("fp16",), attention="flash").foretell_lengths(padded, "T4")
    with pytest.raises(ValueError, match="without padding"):
        step_of(models["llama"], techniques=("bf16",), attention="flash").foretell_lengths(padded, "RTX4090")
    with pytest.raises(ValueError, match="half precision"):
        step_of(models["llama"], attention="flash").foretell_lengths([StepShape(64, 1, False, 3)], "RTX4090")
