"""`memstudy predict`, `fit` and `advise`: their output, their JSON, and one line for bad input."""

import functools
import json
import re

import pytest
from support.command_line import assert_one_line, invoke
from support.tiers import slow_but
from support.tiny_models import config_file
from support.tiny_run import tiny_run  # noqa: F401  (limits PyTorch to one thread)

from memstudy import profiler
from memstudy.attention import Unavailable
from memstudy.huggingface.catalogue import hub_models
from memstudy.studies.ablation import advice, reference
from memstudy.techniques import TECHNIQUES, check_available, parse
from memstudy.trainers.hub_model import HubModelRun

pytestmark = pytest.mark.usefixtures("one_thread", "young_garbage_only")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Paths of config.json files; the "large" models would take hundreds of MiB, but fake tensors take none."""
    folder = tmp_path_factory.mktemp("models")
    files = {
        "gpt2": config_file(folder, "gpt2", n_layer=1),
        "bert": config_file(folder, "bert", num_hidden_layers=1),
        "t5": config_file(folder, "t5", num_layers=1, num_decoder_layers=1),
    }
    return files | {
        "large gpt2": config_file(folder, "gpt2", n_layer=1, n_embd=512, vocab_size=20_000),
        "large bert": config_file(folder, "bert", num_hidden_layers=1, hidden_size=512, vocab_size=20_000),
    }


@pytest.fixture(scope="module")
def small_gpu(tmp_path_factory):
    """The path of a YAML file that describes a GPU with 1 GiB."""
    path = tmp_path_factory.mktemp("gpus") / "small.yaml"
    path.write_text('compute_capability: "8.0"\nmemory_mib: 1024\ncontext_mib: 100\n')
    return str(path)


def predict(model, *arguments, batch=2, seq_len=16):
    return invoke("predict", "--model", model, "--batch", batch, "--seq-len", seq_len, *arguments)


def fit(model, *arguments, seq_len=16):
    return invoke("fit", "--model", model, "--seq-len", seq_len, *arguments)


def answer(result):
    """Return the JSON printed by a command, which may print nothing else except notes on missing packages."""
    assert (result.exit_code, noted(result)) == (0, [])
    return json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def noted(result):
    """Return the lines on stderr, without those about techniques whose package is not installed here."""
    return [line for line in result.stderr.splitlines() if not line.startswith("not advised: ")]


def table(result) -> dict[str, int]:
    """Return the rows of a printed waterfall [MiB]."""
    rows = re.findall(r"^ +(\w+(?: GPU)?) +([\d,]+)(?: +\d+ %.*| *)$", result.stdout, re.MULTILINE)
    return {name: int(size.replace(",", "")) for name, size in rows}


# --- predict


@pytest.mark.parametrize("model", ["large gpt2", "large bert"])
def test_the_waterfall_on_a_gpu_adds_up_to_the_whole(model, models, small_gpu):
    result = predict(models[model], "--gpu", small_gpu)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "training step on small, predicted" in result.stdout
    parts = table(result)
    whole = parts.pop("whole GPU")
    assert list(parts) == [*profiler.CATEGORIES, "workspace", "fragmentation", "context"]
    assert abs(sum(parts.values()) - whole) <= len(parts) / 2 + 0.5  # each is rounded
    assert parts["context"] == 100
    assert parts["parameters"] > 40
    shares = [int(share) for share in re.findall(r"(\d+) %", result.stdout)]
    assert abs(sum(shares) - 100) <= len(shares) / 2
    assert f"fits: {whole / 1024:.1f} of 1.0 GiB" in result.stdout


def test_the_waterfall_on_this_cpu_adds_up_to_the_peak(models):
    result = predict(models["large gpt2"])
    assert "training step on cpu, predicted" in result.stdout
    parts = table(result)
    whole = parts.pop("peak")
    assert list(parts) == list(profiler.CATEGORIES)
    assert abs(sum(parts.values()) - whole) <= len(parts) / 2 + 0.5
    assert "fit" not in result.stdout  # no memory size was given
    assert "GPU" not in result.stdout


def test_what_does_not_fit_is_told_where(models, small_gpu):
    result = predict(models["large gpt2"], "--gpu", small_gpu, batch=200, seq_len=64)
    assert result.exit_code == 0
    whole = table(result)["whole GPU"]
    (line,) = [line for line in result.stdout.splitlines() if "fit" in line]
    said = rf"does not fit: {whole / 1024:.1f} GiB needed, 1.0 available; out of memory in forward of step 1"
    assert re.fullmatch(said + r"( in [\w.]+)?, asking for [\d,.]+ MiB", line)


PREDICTED = {
    "run", "device", "kind", "waterfall_mib", "peak_allocated_mib", "peak_reserved_mib", "whole_gpu_mib", "fused",
    "at_rest_mib", "peak_by_phase_mib", "fits", "out_of_memory", "unverified", "time",
    "time_by_pass",
}  # fmt: skip


@pytest.mark.parametrize("batch", [2, 20_000])
def test_the_json_of_a_prediction_is_the_librarys_report(batch, models, small_gpu):
    options = ("--technique", "bf16, checkpointing", "--optimizer", "adafactor", "--json", "--gpu", small_gpu)
    given = answer(predict(models["gpt2"], *options, batch=batch))
    assert given.keys() == PREDICTED
    run = HubModelRun.model_validate(given["run"])
    assert (run.techniques, run.optimizer, run.batch_size) == (("bf16", "checkpointing"), "adafactor", batch)
    report = profiler.predict(run.build(gpu=profiler.find_gpu(small_gpu)), gpu=small_gpu)
    assert (given["kind"], given["device"]) == ("predicted", "small")
    assert given["waterfall_mib"] == report.waterfall_mib()
    assert sum(given["waterfall_mib"].values()) == pytest.approx(given["whole_gpu_mib"])
    assert given["whole_gpu_mib"] == report.whole_gpu_mib
    assert given["peak_allocated_mib"] == report.peak_allocated_mib <= given["peak_reserved_mib"]
    assert max(given["peak_by_phase_mib"].values()) == given["peak_allocated_mib"]
    assert given["at_rest_mib"] == report.at_rest_bytes / 2**20 < given["peak_allocated_mib"]
    assert given["fits"] is (batch == 2)
    assert given["out_of_memory"] == (str(report.out_of_memory) if batch == 20_000 else None)


def test_each_of_several_gpus_takes_its_share(models, small_gpu):
    one, ddp, fsdp = (
        answer(predict(models["gpt2"], "--gpu", small_gpu, "--json", *options, batch=8))
        for options in ((), ("--processes", 4), ("--processes", 4, "--technique", "fsdp"))
    )
    parameters = [given["waterfall_mib"]["parameters"] for given in (one, ddp, fsdp)]
    assert parameters[0] == parameters[1]
    assert parameters[2] == pytest.approx(parameters[0] / 4, rel=0.05)
    assert ddp["waterfall_mib"]["activations"] < 0.4 * one["waterfall_mib"]["activations"]
    shown = predict(models["gpt2"], "--gpu", small_gpu, "--processes", 4, "--technique", "fsdp", batch=8).stdout
    assert "training step on each of 4 × small, predicted" in shown
    assert "NCCL's buffers (not counted)" in shown


def test_the_json_of_a_prediction_for_this_cpu(models):
    given = answer(predict(models["t5"], "--json"))
    assert given.keys() == PREDICTED
    assert (given["kind"], given["device"]) == ("predicted", "cpu")
    assert sum(given["waterfall_mib"].values()) == pytest.approx(given["peak_allocated_mib"])
    for name in ("peak_reserved_mib", "whole_gpu_mib", "fused", "fits", "out_of_memory", "time"):
        assert given[name] is None


def test_the_choices_change_the_prediction(models):
    def peak(model, *arguments):
        return answer(predict(models[model], *arguments, "--gpu", "A100-80GB", "--json", seq_len=64))["waterfall_mib"]

    plain = peak("large gpt2")
    assert peak("large gpt2", "--optimizer", "sgd")["optimizer"] == 0 < plain["optimizer"]
    assert peak("large gpt2", "--technique", "adamw_8bit")["optimizer"] < plain["optimizer"]
    expandable = peak("large gpt2", "--expandable-segments")
    assert expandable["fragmentation"] != plain["fragmentation"]
    assert expandable["parameters"] != 0
    assert peak("large bert", "--task", "classification") != peak("large bert")


@pytest.mark.parametrize("gpu", ["T4", "H100-80GB"])
def test_offloaded_activations_are_predicted_for_a_gpu_and_are_not_on_it(gpu, models):
    def activations(*arguments):
        given = answer(predict(models["large gpt2"], *arguments, "--gpu", gpu, "--json", batch=64, seq_len=64))
        return given["peak_by_phase_mib"]["forward"]

    assert activations("--technique", "offload_activations") < 0.8 * activations()


# --- fit

FOUND = {
    "techniques", "device", "batch_size", "accumulation", "budget_mib", "needed_mib", "headroom_percent", "refused_at",
    "tested", "time", "seq_len", "effective_batch", "same_result",
}  # fmt: skip


def test_the_largest_batch_is_the_last_that_predict_says_fits(models, small_gpu):
    (found,) = answer(fit(models["large gpt2"], "--gpu", small_gpu, "--json"))
    assert found.keys() == FOUND
    assert (found["techniques"], found["device"], found["tested"]) == ([], "small", False)
    assert found["refused_at"] == found["batch_size"] + 1
    last, next_ = (
        answer(predict(models["large gpt2"], "--gpu", small_gpu, "--json", batch=found["batch_size"] + more))
        for more in (0, 1)
    )
    assert (last["fits"], next_["fits"]) == (True, False)
    assert last["whole_gpu_mib"] == found["needed_mib"] <= found["budget_mib"] == 1024
    assert found["headroom_percent"] == pytest.approx(100 * (1 - found["needed_mib"] / 1024))


@pytest.mark.parametrize("gpu", slow_but([True], [False, True]), ids=["cpu", "gpu"])
def test_an_effective_batch_is_predicted_as_all_its_parts_are(gpu, models, small_gpu):
    device = ("--gpu", small_gpu) if gpu else ("--budget-mib", 900)
    (found,) = answer(fit(models["large gpt2"], *device, "--effective-batch", 480, "--json"))
    assert found["batch_size"] * found["accumulation"] == 480
    assert 1 < found["accumulation"] < 480

    def needed(parts):
        arguments = ("--technique", f"accumulation={parts}") if parts > 1 else ()
        whole = answer(predict(models["large gpt2"], *arguments, *device[: 2 * gpu], "--json", batch=480))
        return whole["whole_gpu_mib" if gpu else "peak_allocated_mib"]

    assert needed(found["accumulation"]) == found["needed_mib"] <= found["budget_mib"]
    assert needed(480 // found["refused_at"]) > found["budget_mib"]


def test_the_verdict_in_words(models):
    (found,) = answer(fit(models["gpt2"], "--budget-mib", 12, "--effective-batch", 96, "--json"))
    result = fit(models["gpt2"], "--budget-mib", 12, "--effective-batch", 96)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines()[0] == (
        f"no technique: largest batch {found['batch_size']}, {found['accumulation']} batches per update, "
        f"effective batch 96 (predicted), {found['headroom_percent']:.1f} % left"
    )
    assert found["accumulation"] > 1
    assert table(result)["peak"] == round(found["needed_mib"])


def test_the_time_of_an_update_is_what_predict_says(models):
    options = ("--gpu", "T4")
    (found,) = answer(fit(models["gpt2"], *options, "--effective-batch", 1, "--json"))
    said = answer(predict(models["gpt2"], *options, "--json", batch=1))["time"]
    assert found["time"] == {name: value for name, value in said.items() if name != "tokens_per_s"}
    first = fit(models["gpt2"], *options, "--effective-batch", 1).stdout.splitlines()[0]
    assert re.search(r"; [\d.]+ ms \([\d.]+ to [\d.]+\) an update$", first)


def test_the_longest_sequence_is_the_last_that_predict_says_fits(models, small_gpu):
    options = ("--technique", "checkpointing", "--gpu", small_gpu, "--json")
    (found,) = answer(fit(models["t5"], "--search", "seq-len", *options, "--effective-batch", 2, seq_len=20_000))
    assert (found["batch_size"], found["accumulation"], found["effective_batch"]) == (1, 2, 2)
    assert found["refused_at"] == found["seq_len"] + 8 < 20_000

    def whole(seq_len):
        texts = "checkpointing,accumulation=2"
        given = predict(models["t5"], "--technique", texts, *options[2:], batch=2, seq_len=seq_len)
        return answer(given)["whole_gpu_mib"]

    assert whole(found["seq_len"]) == found["needed_mib"] <= 1024 < whole(found["refused_at"])


def test_the_longest_sequence_in_words(models):
    result = fit(models["gpt2"], "--search", "seq-len", "--budget-mib", 900, seq_len=64)
    (first, *_) = result.stdout.splitlines()
    said = r"no technique: longest sequence 64 tokens, effective batch 1 \(predicted\), \d+\.\d % left"
    assert re.fullmatch(said, first)


@pytest.mark.parametrize(
    ("keep", "last"), [("exact", "yes"), pytest.param("full", "no", marks=pytest.mark.slow), (None, "trains 8.9 %")]
)
def test_advice_keeps_what_it_must(keep, last, models):
    options = () if keep is None else ("--keep", keep)
    rows = answer(advise(models["gpt2"], "--budget-mib", 0.1, *options, "--json"))
    assert rows[-1]["same_result"] == last


def test_a_preset_stands_for_its_techniques(models):
    given = answer(predict(models["gpt2"], "--technique", "sft, lora=4", "--json"))
    assert given["run"]["techniques"] == ["convention=trl", "checkpointing", "lora=4"]


@pytest.mark.parametrize("budget_mib", slow_but([700], [700, 2000]))
def test_another_budget_than_the_whole_gpu(budget_mib, models, small_gpu):
    result = fit(models["large gpt2"], "--gpu", small_gpu, "--budget-mib", budget_mib)
    assert re.match(
        r"no technique: largest batch (\d+), effective batch \1 \(predicted\), \d+\.\d % left\n", result.stdout
    )
    assert f"of {budget_mib / 1024:.1f} GiB" in result.stdout
    assert "does not fit" not in result.stdout


def test_what_a_batch_of_1_needs_of_a_gpu_is_told_in_gib(models, small_gpu):
    first = fit(models["t5"], "--gpu", small_gpu, seq_len=20_000).stdout.splitlines()[0]
    assert re.fullmatch(r"no technique: nothing fits: a batch of 1 needs \d+\.\d GiB, the budget is 1\.0 GiB", first)


def test_when_nothing_fits_advice_is_offered(models):
    result = fit(models["gpt2"], "--budget-mib", 0.5)
    assert result.exit_code == 0
    first, second = result.stdout.splitlines()
    assert re.fullmatch(r"no technique: nothing fits: a batch of 1 needs \d+\.\d MiB, the budget is 0\.5 MiB", first)
    assert second == "add --advise to find techniques that make a batch fit"


def advised(model, *arguments):
    return answer(fit(model, "--advise", "--json", *arguments, seq_len=4))


def there(text):
    try:
        check_available(parse((text,)))
    except Unavailable:
        return False
    return True


def rungs(*, start=(), without=(), **options):
    """The ladder of the installed techniques by the reference rows, without those in `without`."""
    offered = [text for text in reference.advised() if there(text) and text not in without]
    alone = advice.measured_alone(reference.reference().rows, offered)
    found = advice.climb(alone, lambda rung: True, start=start, **options)
    assert len(found) > 3
    return found


class Ladder:
    """A ladder's rungs, and the memory of a batch on each rung [MiB], predicted on demand."""

    def __init__(self, rungs, model, **sizes):
        self.rungs, self._model, self._sizes = rungs, model, sizes

    @functools.cache  # noqa: B019  (the instance lives as long as its test)
    def needs(self, place):
        given = answer(predict(self._model, "--technique", ",".join(self.rungs[place]), "--json", **self._sizes))
        return given["peak_allocated_mib"]

    def budget(self):
        """A budget that the first rung exceeds and that the middle and the last rung keep."""
        last = len(self.rungs) - 1
        budget = max(self.needs(last // 2), self.needs(last))
        assert self.needs(0) > budget
        return budget


def test_advice_is_a_rung_that_fits_below_one_that_does_not(models):
    plan = rungs(without={"accumulation=4"})
    ladder = Ladder(plan, models["gpt2"], batch=1, seq_len=4)
    budget = ladder.budget() + 0.001
    *refused, found = advised(models["gpt2"], "--budget-mib", budget)
    place = plan.index(tuple(found["techniques"]))
    assert found["batch_size"] > 0
    assert ladder.needs(place) <= budget < ladder.needs(place - 1)
    assert [row["batch_size"] for row in refused] == [0] * len(refused)
    assert [tuple(row["techniques"]) for row in (refused[0], refused[-1])] == [(), plan[place - 1]]
    result = fit(models["gpt2"], "--advise", "--budget-mib", budget, seq_len=4)
    assert (result.exit_code, noted(result)) == (0, [])
    lines = result.stdout.splitlines()
    assert lines[0].startswith("no technique: nothing fits: a batch of 1 needs")
    assert lines[len(refused)].startswith(f"{', '.join(plan[place])}: largest batch ")
    assert "training step on cpu, predicted" in lines[len(refused) + 1]


def asked(plan):
    """The rungs tried when none fits; the last has all techniques."""
    return [*plan[:2], plan[-1]]


UNSUITED = [
    ("gpt2", (), {"accumulation=4"}),
    ("bert", ("--optimizer", "adafactor"), {"accumulation=4", "chunked_loss", "adamw_8bit", "adamw_8bit_torchao"}),
    ("gpt2", ("--effective-batch", 4), {"accumulation=4", "optimizer_in_backward"}),
]


@pytest.mark.parametrize(
    ("model", "arguments", "left_out"),
    slow_but([UNSUITED[1]], UNSUITED),
    ids=["all", "bert-adafactor", "accumulated"],
)
def test_what_does_not_suit_is_not_advised(model, arguments, left_out, models):
    rows = advised(models[model], "--budget-mib", 0.1, *arguments)
    assert all(row["batch_size"] == 0 for row in rows)
    assert [tuple(row["techniques"]) for row in rows] == asked(rungs(without=left_out))


def test_advice_takes_nothing_away_that_was_chosen(models):
    rows = advised(models["bert"], "--budget-mib", 0.1, "--technique", "checkpointing")
    plan = rungs(start=("checkpointing",), without={"accumulation=4", "chunked_loss"})
    assert [tuple(row["techniques"]) for row in rows] == asked(plan)
    assert all(row["techniques"][0] == "checkpointing" for row in rows)


# --- advise


def advise(model, *arguments, batch=4, seq_len=16):
    return invoke("advise", "--model", model, "--batch", batch, "--seq-len", seq_len, *arguments)


def test_the_ladder_is_climbed_until_the_batch_fits(models):
    plan = rungs(parts_of=16)
    ladder = Ladder(plan, models["gpt2"], batch=16, seq_len=64)
    budget = ladder.budget()
    rows = answer(advise(models["gpt2"], "--budget-mib", budget, "--json", batch=16, seq_len=64))
    places = [plan.index(tuple(row["techniques"])) for row in rows]
    assert places == sorted(set(places))
    assert places[-2:] == [places[-1] - 1, places[-1]]
    assert [row["needed_mib"] for row in rows[-2:]] == [ladder.needs(place) for place in places[-2:]]
    assert [row["fits"] for row in rows] == [False] * (len(rows) - 1) + [True]
    assert (rows[0]["measured_time_ratio"], rows[0]["time"]) == (1, None)
    assert rows[0]["same_result"] == "yes"
    assert {row["effective_batch"] for row in rows} == {16}


@pytest.mark.slow
def test_the_rung_that_fits_is_told_in_words(models):
    plan = rungs(parts_of=16)
    budget = Ladder(plan, models["gpt2"], batch=16, seq_len=64).budget()
    found = answer(advise(models["gpt2"], "--budget-mib", budget, "--json", batch=16, seq_len=64))[-1]
    result = advise(models["gpt2"], "--budget-mib", budget, batch=16, seq_len=64)
    assert f"fits: --technique {','.join(found['techniques'])}" in result.stdout
    assert "measured on" in result.stdout
    parts = found["accumulation"]
    assert f"effective batch 16: {parts} × {16 // parts}" in result.stdout


@pytest.mark.parametrize("gpu", slow_but(["T4"], ["T4", "H100-80GB"]))
def test_on_a_gpu_the_quickest_by_prediction_comes_first(gpu, models):
    batch = {"T4": 2048, "H100-80GB": 8192}[gpu]  # more than the GPU holds
    sizes = {"batch": batch, "seq_len": 64}
    options = ("--gpu", gpu, "--keep", "exact", "--json")
    rows = answer(advise(models["large gpt2"], *options, **sizes))
    assert len(rows) > 1
    for row in rows:
        texts = ",".join(row["techniques"])
        said = answer(predict(models["large gpt2"], "--technique", texts, *options[:2], "--json", **sizes))
        assert (row["time"], row["needed_mib"]) == (said["time"], said["whole_gpu_mib"])
        assert row["measured_time_ratio"] is None
    offered = advice.suited(
        [text for text in reference.advised() if there(text)], model="gpt2", batch_size=batch, seq_len=64
    )
    run = HubModelRun(experiment="a", model=models["large gpt2"], batch_size=batch, seq_len=64)
    alone = advice.predicted_alone(advice.estimates(run, profiler.find_gpu(gpu)), offered)
    plan = advice.climb(alone, lambda rung: True, parts_of=batch, keep="exact")
    assert {tuple(row["techniques"]) for row in rows[:-1]} <= set(plan)  # the last line may leave techniques out again
    shown = advise(models["large gpt2"], *options[:-1], **sizes).stdout
    assert re.search(r"[\d,.]+ m?s \([\d,.]+ to [\d,.]+\)", shown)
    assert "measured on" not in shown


def test_what_fits_needs_no_advice(models, small_gpu):
    assert "fits as it is" in advise(models["gpt2"], "--gpu", small_gpu).stdout


def test_a_batch_that_fits_in_no_parts_is_told(models):
    rows = answer(advise(models["bert"], "--budget-mib", 0.1, "--json", batch=12))
    assert not any(row["fits"] for row in rows)
    assert "accumulation=12" in rows[-1]["techniques"]
    said = advise(models["bert"], "--budget-mib", 0.1, batch=12).stdout
    assert "nothing fits: take a shorter sequence" in said


def test_parts_make_a_batch_fit(models, small_gpu):
    """The batch's activations alone far exceed the GPU's memory."""
    rows = answer(advise(models["large bert"], "--gpu", small_gpu, "--json", batch=512, seq_len=64))
    assert rows[-1]["fits"] is True
    assert rows[-1]["needed_mib"] <= 1024
    assert any(text.startswith("accumulation=") for text in rows[-1]["techniques"])


def test_a_verified_batch_has_been_run(models, monkeypatch):
    measured, measure = [], profiler.measure
    monkeypatch.setattr(profiler, "measure", lambda make: measured.append(measure(make)) or measured[-1])
    (found,) = answer(fit(models["gpt2"], "--budget-mib", 12, "--verify", "--json", "--effective-batch", 12))
    assert found["tested"] is True
    (report,) = measured
    assert report.peak_allocated_mib == found["needed_mib"] <= 12
    assert found["batch_size"] * found["accumulation"] == 12
    assert "(tested)" in fit(models["gpt2"], "--budget-mib", 12, "--verify").stdout


@pytest.mark.parametrize(
    "error",
    [MemoryError, pytest.param(lambda: RuntimeError("[enforce fail] can't allocate memory"), marks=pytest.mark.slow)],
)
def test_a_batch_that_runs_out_of_memory_when_run_is_not_the_answer(error, models, monkeypatch):
    ran, measure = [], profiler.measure

    def scarce(make):
        ran.append(make)
        if len(ran) <= 2:
            raise error()
        return measure(make)

    monkeypatch.setattr(profiler, "measure", scarce)
    (found,) = answer(fit(models["gpt2"], "--budget-mib", 10, "--verify", "--json"))
    assert found["tested"] is True
    assert len(ran) == 3
    assert found["refused_at"] == found["batch_size"] + 1
    assert answer(predict(models["gpt2"], "--json", batch=found["batch_size"] + 2))["peak_allocated_mib"] <= 10


# --- lists and help


@pytest.mark.parametrize(("what", "names"), [("gpus", profiler.gpus()), ("models", hub_models())])
def test_a_list_has_every_name_that_the_commands_know(what, names):
    result = invoke("list", what)
    assert result.exit_code == 0
    _, *lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(names)


def test_the_list_of_gpus_has_their_memory_and_speed():
    (line,) = [line for line in invoke("list", "gpus").stdout.splitlines() if line.split()[0] == "B200"]
    assert line.split()[1:6] == ["178.36", "712", "8,000", "2,250", "10.0"]


@pytest.mark.parametrize(
    ("command", "taught"),
    [
        ("predict", ["--gpu T4", "nothing is run", "memstudy list models", "config.json", ".yaml file", "--json"]),
        ("advise", ["--batch 8", "predicted for your model", "reference rows", "Exit status 0", "--keep"]),
        (
            "fit",
            [
                "--effective-batch 64 --advise",
                "needed without --gpu",
                "change least first",
                "Exit status 0",
                "--search",
            ],
        ),
    ],
)
def test_help_teaches(command, taught):
    text = " ".join(invoke(command, "--help").stdout.split()).replace("effective- batch", "effective-batch")
    for words in taught:
        assert words in text


# --- bad input

PREDICT = ["predict", "--batch", 2, "--seq-len", 16, "--model"]
FIT = ["fit", "--seq-len", 16, "--model"]
ADVISE = ["advise", "--batch", 4, "--seq-len", 16, "--model"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*PREDICT, "gpt3"], ["unknown model 'gpt3'", "similar: gpt2", "hub id", "config.json"]),
        ([*PREDICT, "gpt2", "--technique", "lora=8:q_proj"], ["targets 'q_proj'", "GPT2LMHeadModel", "c_attn"]),
        ([*PREDICT, "gpt2", "--technique", "lora=none"], ["technique 'lora=none': a number is needed"]),
        ([*PREDICT, "bert-base-uncased", "--technique", "prompt"], ["virtual tokens are for decoders"]),
        ([*PREDICT, "gpt2", "--technique", "sft"], ["a convention is for adapters", "lora=16"]),
        ([*FIT, "gpt2", "--gpu", "T4", "--search", "seq-len", "--seq-len", 4], ["multiples of 8"]),
        ([*PREDICT, "gpt2", "--gpu", "T5"], ["unknown GPU 'T5'", *profiler.gpus(), ".yaml"]),
        ([*PREDICT, "gpt2", "--technique", "fp8"], ["unknown technique 'fp8'", *TECHNIQUES]),
        ([*PREDICT, "gpt2", "--technique", "tf32", "--gpu", "T4"], ["tf32 needs compute capability 8.0", "7.5"]),
        ([*PREDICT, "gpt2", "--technique", "tf32"], ["tf32 needs a CUDA device"]),
        ([*PREDICT, "gpt2", "--processes", 3], ["processes=3 do not share batch_size=2 in 1 parts evenly"]),
        ([*FIT, "gpt2", "--budget-mib", 9, "--processes", 2, "--verify"], ["--verify runs in one process"]),
        ([*PREDICT, "gpt2", "--seq-len", 1025], ["seq_len=1025 is more than the 1024 positions of gpt2"]),
        ([*PREDICT, "gpt2", "--optimizer", "lomo"], ["lomo", "install"]),
        ([*PREDICT, "gpt2", "--optimizer", "paged_adamw_8bit", "--gpu", "T4"], ["paged optimizer", "not predicted"]),
        ([*PREDICT, "gpt2", "--attention", "lash"], ["attention='lash'", "'eager', 'sdpa' or 'flash'"]),
        ([*PREDICT, "gpt2", "--attention", "flash"], ["attention flash needs a GPU"]),
        ([*PREDICT, "t5-small", "--batch", 2**31, "--seq-len", 2**31], ["more than 2^63 bytes", "smaller batch"]),
        ([*ADVISE, "gpt2"], ["advise needs one budget: give --gpu, or --budget-mib"]),
        ([*ADVISE, "gpt2", "--gpu", "T4", "--budget-mib", 1], ["advise needs one budget"]),
        ([*ADVISE, "gpt2", "--gpu", "T4", "--technique", "accumulation=3"], ["accumulation=3 does not divide"]),
        ([*FIT, "gpt2"], ["give --gpu, or --budget-mib"]),
        ([*FIT, "gpt2", "--gpu", "T4", "--verify"], ["--verify runs on this CPU", "--budget-mib"]),
        ([*FIT, "gpt2", "--budget-mib", -1], ["budget_mib=-1.0: a budget above 0 MiB is needed"]),
        ([*FIT, "gpt2", "--gpu", "T4", "--technique", "accumulation=4"], ["give --effective-batch instead"]),
        (
            [*FIT, "gpt2", "--gpu", "T4", "--technique", "optimizer_in_backward", "--effective-batch", 8],
            ["optimizer_in_backward", "excludes accumulation"],
        ),
    ],
    ids=lambda value: " ".join(map(str, value[:1] + value[4:])) if "--model" in value else "",
)
def test_what_cannot_be_is_told_in_one_line(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_one_line(invoke(*arguments), *words)


def test_a_config_that_is_none_is_told_in_one_line(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{n_layer: 2}")
    assert_one_line(invoke(*PREDICT, path), f"model {path}: ")


def test_a_gpu_file_that_is_broken_is_told_in_one_line(tmp_path):
    path = tmp_path / "gpu.yaml"
    path.write_text("memory_mib: 100\ncontext_mib: 10")
    assert_one_line(invoke(*PREDICT, "gpt2", "--gpu", path), f"GPU file {path}: ", "compute_capability is missing")


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        ([*PREDICT, "gpt2", "--batch", 0], "--batch"),
        ([*PREDICT, "gpt2", "--batch", "many"], "--batch"),
        ([*PREDICT, "gpt2", "--batch", 10**30], "--batch"),
        ([*PREDICT, "gpt2", "--seq-len", 1], "--seq-len"),
        ([*FIT, "gpt2", "--gpu", "T4", "--effective-batch", 0], "--effective-batch"),
        ([*FIT, "gpt2", "--budget-mib", "much"], "--budget-mib"),
        (["predict", "--batch", 1, "--seq-len", 2], "--model"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_an_option_of_another_type_is_a_usage_error(arguments, option):
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert option in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
