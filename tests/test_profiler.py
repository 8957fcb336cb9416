"""Training memory: the accounting; measurements against other readings; predictions against both."""

import gc
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from support.tiers import cover, slow_but
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules import module as module_hooks
from torch.optim import optimizer as optimizer_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from memstudy.profiler import CATEGORIES, MIB, PHASES, measure, predict
from memstudy.profiler.accounting import account
from memstudy.profiler.events import Event
from memstudy.techniques import OptimizerInBackward
from memstudy.trainers.language_model import LanguageModelRun

pytestmark = pytest.mark.usefixtures("one_thread", "young_garbage_only")

both = pytest.mark.parametrize("report_on", [measure, predict])


def total(live):
    return sum(live.values())


def totals(report):
    """The successive totals of the report's timeline [bytes]."""
    return changes(total(live) for _, _, live in report.timeline)


def phases(report):
    """The successive phases of the report's timeline."""
    return changes(phase for _, phase, _ in report.timeline)


def changes(values):
    """`values` without repetitions of the value before."""
    return [value for value, _ in itertools.groupby(values)]


def tensor_bytes(tensors):
    """Bytes of the distinct storages under `tensors`."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


SEED = 4  # `backward()` makes the gradient of the loss, a one, before autograd's engine starts


class Mlp(nn.Module):
    """Two layers, with a hidden width twice the input's."""

    def __init__(self, width=64, bias=True):
        super().__init__()
        self.up = nn.Linear(width, 2 * width, bias=bias)
        self.down = nn.Linear(2 * width, width, bias=bias)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def mlp_build(rows=48, width=64, *, bias=True, parts=1, optimizer=torch.optim.AdamW, in_backward=False):
    """One update of an `Mlp` on random rows, in `parts`."""

    def make():
        torch.manual_seed(0)
        model = Mlp(width, bias)
        updates = optimizer(model.parameters(), lr=1e-3)
        if in_backward:
            OptimizerInBackward().attach(model, updates)
        inputs = torch.randn(rows, width).chunk(parts)

        def step():
            for part in inputs:
                loss = model(part).square().mean()
                loss.backward()
                del loss
            if not in_backward:
                updates.step()
            updates.zero_grad()

        return step

    return make


def mlp_bytes(width=64, bias=True):
    """Bytes of each parameter of an `Mlp`, in order of registration."""
    weights, biases = [2 * width * width] * 2, [2 * width, width]
    return [4 * n for pair in zip(weights, biases, strict=True) for n in pair[: 1 + bias]]


# --- the accounting


def events(*rows):
    """Events one millisecond apart from ``(kind, block, bytes or label)``."""
    made = []
    for time, (kind, *rest) in enumerate(rows):
        block = rest[0] if rest and isinstance(rest[0], int) else 0
        size = next((x for x in rest[1:] if isinstance(x, int)), 0)
        label = next((x for x in rest if isinstance(x, str)), "")
        made.append(Event(kind, float(time), block, size, label))
    return made


def test_every_category_by_hand():
    report = account(
        events(
            ("alloc", 1, 1000),  # weight
            ("alloc", 2, 30),  # input
            ("phase", "forward"),
            ("iteration",),
            ("is", 1, "parameters"),
            ("alloc", 3, 200, "up"),  # saved for backward
            ("alloc", 4, 500, "up"),  # scratch of the forward pass
            ("free", 4),
            ("phase", "backward"),
            ("alloc", 5, 1000),  # gradient
            ("is", 5, "gradients"),
            ("free", 3),
            ("phase", "optimizer"),
            ("alloc", 6, 2000),
            ("is", 6, "optimizer"),
            ("free", 5),
            ("alloc", 7, 8),  # outlives the step
        ),
        device="cpu",
        kind="measured",
    )
    assert report.peak_by_category == {
        "parameters": 1000, "gradients": 1000, "optimizer": 2000, "activations": 0, "temporary": 0, "other": 30,
    }  # fmt: skip
    assert report.peak_bytes == 4030
    assert report.forward_end_by_category["activations"] == 200
    assert report.modules == {"up": 200}
    assert report.peak_by_phase == {"build": 1030, "forward": 1730, "backward": 2230, "optimizer": 4030}
    assert [row[:2] for row in report.timeline[:4]] == [(time, "forward") for time in (0.0, 2.0, 3.0, 4.0)]
    assert [row[2]["temporary"] for row in report.timeline[:4]] == [0, 0, 500, 0]
    assert report.timeline[-1][2]["other"] == 38


def test_an_address_used_again_is_another_block():
    report = account(
        events(
            ("iteration",),
            ("phase", "forward"),
            ("alloc", 1, 100),
            ("is", 1, "gradients"),
            ("free", 1),
            ("alloc", 1, 7),
            ("free", 1),
        ),
        device="cpu",
        kind="measured",
    )
    assert totals(report) == [0, 100, 0, 7, 0]
    assert max(live["gradients"] for _, _, live in report.timeline) == 100
    assert max(live["temporary"] for _, _, live in report.timeline) == 7


def test_an_address_that_another_thread_has_freed_is_another_block():
    report = account(
        events(("iteration",), ("phase", "forward"), ("alloc", 1, 100), ("alloc", 1, 7), ("free", 1)),
        device="cpu",
        kind="measured",
    )
    assert totals(report) == [0, 100, 7, 0]
    assert report.peak_by_category["temporary"] == 100


def test_what_outlives_its_step_is_no_activation():
    step = (("iteration",), ("phase", "forward"), ("alloc", 1, 100), ("phase", "backward"))
    once = account(events(*step), device="cpu", kind="measured")
    assert once.peak_by_category["activations"] == 100
    twice = account(events(*step, ("iteration",), ("phase", "forward"), ("free", 1)), device="cpu", kind="measured")
    assert (twice.peak_by_category["activations"], twice.peak_by_category["other"]) == (0, 100)


def test_memory_from_before_is_ignored():
    report = account(
        events(("iteration",), ("free", 9), ("is", 9, "parameters"), ("alloc", 1, 5)), device="cpu", kind="measured"
    )
    assert report.peak_bytes == 5
    assert report.peak_by_category["other"] == 5


def test_no_iteration_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        account(events(("alloc", 1, 5)), device="cpu", kind="measured")


def test_a_thinned_timeline_keeps_the_peak():
    report = measure(mlp_build())
    full = max(total(live) for _, _, live in report.timeline) / MIB
    for points in (1, 3, 10, 10_000):
        rows = report.timeline_mib(points)
        assert len(rows) <= points
        assert max(sum(row[2:]) for row in rows) == pytest.approx(full, abs=1e-3 * len(CATEGORIES))
        assert all(row[1] in PHASES for row in rows)


def test_scalars_are_flat_and_have_units():
    report = measure(mlp_build())
    row = report.scalars()
    assert all(name.endswith("_mib") and isinstance(value, float) for name, value in row.items())
    assert row["peak_allocated_mib"] == report.peak_bytes / MIB
    assert row["forward_end_activations_mib"] == report.forward_end_by_category["activations"] / MIB
    assert row["step_peak_max_mib"] == max(report.iteration_peaks) / MIB
    assert sum(row[f"peak_{name}_mib"] for name in CATEGORIES) == pytest.approx(row["peak_allocated_mib"])
    assert "peak_reserved_mib" not in row  # the CPU has no caching allocator


def test_the_most_of_each_category_is_its_own_moments_in_the_last_step():
    report = account(
        events(
            ("alloc", 1, 100),
            ("alloc", 9, 5000),  # while building
            ("free", 9),
            ("phase", "forward"),
            ("iteration",),
            ("is", 1, "parameters"),
            ("alloc", 2, 900, "up"),
            ("phase", "backward"),
            ("free", 2),  # belongs to the step before the last
            ("iteration",),
            ("phase", "forward"),
            ("alloc", 3, 70, "up"),
            ("phase", "backward"),
            ("alloc", 4, 60),
            ("is", 4, "gradients"),
            ("free", 3),
            ("phase", "optimizer"),
            ("free", 4),
            ("alloc", 5, 80),
            ("is", 5, "optimizer"),
        ),
        device="cpu",
        kind="measured",
    )
    most = report.most_by_category
    assert most == {
        "parameters": 100, "gradients": 60, "optimizer": 80, "activations": 70, "temporary": 0, "other": 0,
    }  # fmt: skip
    assert sum(most.values()) > report.iteration_peaks[-1] == 230  # never all at once
    assert {name: report.scalars()[f"most_{name}_mib"] * MIB for name in CATEGORIES} == pytest.approx(most)


@both
def test_the_most_of_each_category_by_arithmetic(report_on):
    most = report_on(mlp_build()).most_by_category
    weights = sum(mlp_bytes())
    assert most["parameters"] == weights
    assert most["gradients"] == weights
    assert most["optimizer"] == 2 * weights + 4 * 4  # AdamW has a step counter per tensor


# --- measured


def allocator_totals(step):
    """The CPU allocator's own running total [bytes] at each of its events while ``step()`` runs."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        step()
    totals, stack = [], list(run.profiler.kineto_results.experimental_event_tree())
    while stack:
        node = stack.pop()
        if node.typed[0].name == "Allocation" and node.typed[1].device.type == "cpu":
            totals.append((node.start_time_ns, node.typed[1].total_allocated))
        stack.extend(node.children)
    return [bytes_ for _, bytes_ in sorted(totals, key=lambda row: row[0])]


def lm(techniques=(), attention=None, **changes):
    """A run of a small decoder."""
    sizes = {"n_layers": 2, "hidden_size": 64, "n_heads": 4, "feed_forward": 128, "vocab_size": 300, "seq_len": 64}
    given = {"experiment": "test", "batch_size": 4, "measure_steps": 1, **sizes, "techniques": techniques, **changes}
    return LanguageModelRun(**given, **({"attention": attention} if attention else {}))


EAGER = {"variant": "softmax", "implementation": "eager"}
SDPA = {"variant": "softmax", "implementation": "sdpa"}
WINDOW = {"variant": "window", "window": 16}


@pytest.mark.parametrize(
    "make",
    [mlp_build(), mlp_build(in_backward=True), lm().build(), lm(("checkpointing", "chunked_loss"), WINDOW).build()],
    ids=["mlp", "in-backward", "decoder", "decoder-checkpointing-chunked-window"],
)
def test_every_moment_equals_the_allocators_own_total(make):
    report = measure(make)
    step = make()
    step()
    # A second reading of another run of the step. Only the report counts the tensors made by `build`.
    start, *others = changes(allocator_totals(step))
    built = totals(report)[1] - start
    assert totals(report)[1:] == [start + built] + [built + n for n in others]
    assert report.peak_bytes == built + max(start, *others)


@pytest.mark.parametrize("report_on", [measure, predict])
def test_tensors_of_known_size(report_on):
    def make():
        kept = [torch.empty(1000)]  # 4,000 B

        def step():
            first = torch.empty(250, dtype=torch.float64)  # 2,000 B
            second = torch.empty(3, 100, dtype=torch.bfloat16)  # 600 B
            view = first[:10]
            del first
            second = second.float()  # adds 1,200 B, then frees 600 B
            del view, second
            kept.append(torch.empty(7, dtype=torch.int8))

        return step

    report = report_on(make)
    assert totals(report) == [4007, 6007, 6607, 7807, 7207, 5207, 4007, 4014]  # the first step left 7 bytes
    assert report.iteration_peaks == (7800, 7807)
    assert report.peak_bytes == 7807
    assert report.peak_by_category == dict.fromkeys(CATEGORIES, 0) | {"temporary": 3800, "other": 4007}


@both
def test_categories_add_up_at_every_moment(report_on):
    report = report_on(lm(("bf16", "checkpointing")).build())
    assert {tuple(live) for _, _, live in report.timeline} == {CATEGORIES}
    assert min(n for _, _, live in report.timeline for n in live.values()) >= 0
    assert total(report.peak_by_category) == report.peak_bytes
    assert max(report.peak_by_phase.values()) == report.peak_bytes
    assert max(total(live) for _, _, live in report.timeline) == report.iteration_peaks[-1]


@both
def test_parameters_gradients_and_optimizer_by_arithmetic(report_on):
    report = report_on(mlp_build())
    weights = sum(mlp_bytes())
    moments = 2 * weights + 4 * 4  # and an fp32 step counter for each of four parameters
    assert {live["parameters"] for _, _, live in report.timeline} == {weights}
    assert {live["optimizer"] for _, _, live in report.timeline} == {moments}
    assert max(live["gradients"] for _, _, live in report.timeline) == weights
    assert {live["gradients"] for _, phase, live in report.timeline if phase == "forward"} == {0}
    assert report.peak_by_phase["build"] == weights + 4 * 48 * 64
    assert report.timeline[-1][2]["other"] == 4 * 48 * 64


@both
def test_sgd_has_no_state_and_momentum_one(report_on):
    for momentum, copies in ((0.0, 0), (0.9, 1)):

        def sgd(parameters, lr, momentum=momentum):
            return torch.optim.SGD(parameters, lr=lr, momentum=momentum)

        report = report_on(mlp_build(optimizer=sgd))
        assert report.timeline[-1][2]["optimizer"] == copies * sum(mlp_bytes())


@both
def test_the_first_step_has_no_optimizer_state(report_on):
    first, second = report_on(mlp_build(rows=4096)).iteration_peaks  # the activations make the peak
    assert second - first == 2 * sum(mlp_bytes()) + 4 * 4


def test_activations_are_what_autograd_saved_and_the_live_output():
    report = measure(mlp_build())
    torch.manual_seed(0)
    model, inputs, saved = Mlp(), torch.randn(48, 64), []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = model(inputs).square().mean()
    from_before = {t.untyped_storage().data_ptr() for t in (inputs, *model.parameters())}
    saved = [t for t in saved if t.untyped_storage().data_ptr() not in from_before]
    assert report.forward_end_by_category["activations"] == tensor_bytes([*saved, loss]) + SEED


@both
def test_the_module_table_sums_to_the_activations(report_on):
    report = report_on(mlp_build())
    assert sum(report.modules.values()) == report.forward_end_by_category["activations"]
    if report_on is measure:
        tanh, output = 4 * 48 * 128, 4 * 48 * 64
        assert report.modules == {"Mlp": tanh, "down": output, "": 4 + SEED}  # the loss is computed outside the model


def test_the_module_table_of_a_decoder_names_its_modules():
    report = measure(lm().build())
    assert sum(report.modules.values()) == report.forward_end_by_category["activations"]
    of_layer = [sum(n for name, n in report.modules.items() if f".h.{i}." in f".{name}.") for i in range(2)]
    assert of_layer[0] == of_layer[1] > 4 * 4 * 64 * 64  # more than one (batch, seq, hidden)


@both
def test_tied_weights_count_once(report_on):
    def make():
        embedding, head = nn.Embedding(500, 32), nn.Linear(32, 500, bias=False)
        head.weight = embedding.weight
        tokens = torch.arange(10)

        def step():
            head(embedding(tokens)).mean().backward()
            embedding.zero_grad()

        return step

    report = report_on(make)
    assert report.timeline[-1][2]["parameters"] == 4 * 500 * 32
    assert max(live["gradients"] for _, _, live in report.timeline) == 4 * 500 * 32
    untied = 2 * 4 * 500 * 32  # `nn.Linear` first makes its own weight
    assert report.peak_by_phase["build"] >= untied


@both
def test_with_the_optimizer_in_backward_no_two_gradients_exist(report_on):
    together = report_on(mlp_build(bias=False))
    one_by_one = report_on(mlp_build(bias=False, in_backward=True))
    largest = max(mlp_bytes(bias=False))
    assert max(live["gradients"] for _, _, live in together.timeline) == 2 * largest
    assert max(live["gradients"] for _, _, live in one_by_one.timeline) == largest
    assert one_by_one.timeline[-1][2]["optimizer"] == together.timeline[-1][2]["optimizer"]


@both
def test_accumulation_divides_the_activations(report_on):
    whole, parts = report_on(mlp_build(parts=1)), report_on(mlp_build(parts=4))
    of_whole, of_part = (r.forward_end_by_category["activations"] - 4 - SEED for r in (whole, parts))
    assert of_whole == 4 * of_part  # without the loss
    # The first part's gradients exist when the last part's forward pass ends.
    assert whole.forward_end_by_category["gradients"] == 0
    assert parts.forward_end_by_category["gradients"] == sum(mlp_bytes())


@both
def test_checkpointing_keeps_the_inputs_only(report_on):
    def make_build(use_checkpoint):
        def make():
            blocks = nn.ModuleList(Mlp(32, bias=False) for _ in range(3))
            inputs = torch.randn(48, 32)

            def step():
                x = inputs
                for block in blocks:
                    x = (
                        checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
                        if use_checkpoint
                        else block(x)
                    )
                x.sum().backward()
                blocks.zero_grad()

            return step

        return make

    plain, recomputed = (report_on(make_build(flag)).forward_end_by_category["activations"] for flag in (False, True))
    output = 4 * 48 * 32
    # Each block keeps its tanh, twice an output's size; each output is the next block's input, the last is in `x`.
    assert plain == 3 * 2 * output + 3 * output + 4 + SEED
    assert recomputed == 3 * output + 4 + SEED


@both
def test_phases_follow_each_other(report_on):
    order = phases(report_on(mlp_build()))
    assert order == ["forward", "backward", "optimizer"]


@both
def test_phases_of_accumulation_alternate(report_on):
    order = phases(report_on(mlp_build(parts=2)))
    assert order[:5] == ["forward", "backward", "forward", "backward", "optimizer"]


@both
def test_the_optimizers_own_phase_inside_backward(report_on):
    order = phases(report_on(mlp_build(in_backward=True, bias=False)))
    assert order[:5] == ["forward", "backward", "optimizer", "backward", "optimizer"]


def test_after_the_optimizers_step_backward_goes_on():
    report = measure(mlp_build(in_backward=True, bias=False))
    dropped = [
        phase
        for (_, _, before), (_, phase, after) in itertools.pairwise(report.timeline)
        if after["gradients"] < before["gradients"]
    ]
    assert dropped == ["backward", "backward"]


def test_a_module_that_raises_inside_a_step_ends_its_part_of_the_table():
    class Picky(nn.Linear):
        def forward(self, x):
            raise Refused

    def make():
        picky, rows = Picky(8, 8), torch.ones(2, 8, requires_grad=True)

        def step():
            with pytest.raises(Refused):
                picky(rows)
            rows.tanh().sum().backward()

        return step

    assert measure(make).modules == {"": 4 * 2 * 8 + 4 + SEED}


@both
def test_times_grow(report_on):
    times = [time for time, _, _ in report_on(mlp_build()).timeline]
    assert times[0] >= 0
    assert times == sorted(times)


@both
@pytest.mark.parametrize("iterations", [0, -1])
def test_no_iteration_at_all_is_refused(report_on, iterations):
    with pytest.raises(ValueError, match=f"iterations={iterations}"):
        report_on(mlp_build(), iterations=iterations)


@both
def test_iterations_are_counted_and_the_steady_state_repeats(report_on):
    peaks = report_on(mlp_build(rows=4096), iterations=4).iteration_peaks
    assert len(peaks) == 4
    assert peaks[0] < peaks[1] == peaks[2] == peaks[3]


@both
def test_memory_from_before_that_the_step_frees_changes_nothing(report_on):
    before = []

    def make():
        kept = torch.empty(100)

        def step():
            if before:
                before.pop()
            return torch.empty(50) + kept[:50]

        return step

    expected = report_on(make)
    before += [torch.empty(10**6)]
    report = report_on(make)
    assert before == []
    assert report.iteration_peaks == expected.iteration_peaks
    assert [row[2] for row in report.timeline] == [row[2] for row in expected.timeline]


def test_memory_lives_on_after_the_measurement():
    kept = []

    def make():
        step = mlp_build()()
        kept.append(step)
        return step

    measure(make)
    kept[0]()  # the step can still be run, for example to time it


# --- nothing is left behind


def hooks():
    """Number of global hooks of each kind, on modules and on optimizers."""
    return [
        len(found)
        for found in (
            module_hooks._global_forward_hooks,
            module_hooks._global_forward_pre_hooks,
            module_hooks._global_forward_hooks_always_called,
            module_hooks._global_parameter_registration_hooks,
            optimizer_hooks._global_optimizer_pre_hooks,
            optimizer_hooks._global_optimizer_post_hooks,
        )
    ]


class Refused(Exception):
    """Raised by the steps below."""


class RefusesBackward(torch.autograd.Function):
    """The identity in forward; raises in backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise Refused


WHERE = list(itertools.product([measure, predict], ["nowhere", "build", "forward", "module", "backward", "optimizer"]))


@pytest.mark.parametrize(("report_on", "where"), slow_but(cover(WHERE), WHERE))
def test_nothing_is_left_behind(report_on, where):
    gc.unfreeze()  # undoes the fixture's gc.freeze()
    before, made = hooks(), []

    class Inner(nn.Linear):
        def forward(self, x):
            if where == "module":
                raise Refused
            return super().forward(x)

    def refuse(optimizer, args, kwargs):
        raise Refused

    def make():
        model = nn.Sequential(Inner(8, 8), nn.Tanh())
        updates = torch.optim.SGD(model.parameters(), lr=0.1)
        made.append(model)
        if where == "build":
            raise Refused
        if where == "optimizer":
            updates.register_step_pre_hook(refuse)

        def step():
            if where == "forward":
                raise Refused
            out = model(torch.ones(2, 8))
            if where == "backward":
                out = RefusesBackward.apply(out)
            out.sum().backward()
            updates.step()

        return step

    if where == "nowhere":
        report_on(make)
    else:
        with pytest.raises(Refused):
            report_on(make)
    assert hooks() == before
    assert not any(p._post_accumulate_grad_hooks for p in made[0].parameters())
    assert not torch.autograd.profiler._is_profiler_enabled
    assert torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None
    assert gc.get_freeze_count() == 0
    assert torch.ones(1).item() == 1.0
    # The next report is as usual.
    assert report_on(mlp_build()).timeline[-1][2] == report_on(mlp_build()).timeline[-1][2]


# --- predicted

CASES = {
    "baseline": ((), EAGER),
    "sdpa": ((), SDPA),
    "window": ((), WINDOW),
    "bf16": (("bf16",), EAGER),
    "bf16-sdpa": (("bf16",), SDPA),
    "bf16-window": (("bf16",), WINDOW),
    "checkpointing": (("checkpointing",), EAGER),
    "checkpointing-sdpa": (("checkpointing",), SDPA),
    "selective-0": (("selective_checkpointing=0",), EAGER),
    "selective-half": (("selective_checkpointing",), EAGER),
    "selective-1": (("selective_checkpointing=1",), EAGER),
    "accumulation": (("accumulation=2",), EAGER),
    "optimizer_in_backward": (("optimizer_in_backward",), EAGER),
    "chunked_loss": (("chunked_loss",), EAGER),
    "all-exact": (("checkpointing", "chunked_loss", "optimizer_in_backward"), EAGER),
}


QUICK = ["window", "bf16-sdpa", "selective-half", "accumulation", "all-exact"]


@pytest.mark.parametrize("case", slow_but(QUICK, CASES))
def test_the_predicted_peak_is_the_measured_to_the_byte(case):
    make = lm(*CASES[case]).build()
    measured, predicted = measure(make), predict(make)
    assert (measured.kind, predicted.kind) == ("measured", "predicted")
    assert predicted.peak_bytes == measured.peak_bytes
    assert predicted.peak_by_category == measured.peak_by_category
    assert predicted.iteration_peaks == measured.iteration_peaks


@pytest.mark.parametrize("vocab_size", [300, 4000])
def test_the_predicted_chunked_loss(vocab_size):
    """With few tokens, the peak is in backward, where autograd adds two gradients of the tied embedding in place."""
    make = lm(("chunked_loss",), SDPA, seq_len=16, batch_size=1, vocab_size=vocab_size).build()
    measured, predicted = measure(make), predict(make)
    assert measured.peak_by_phase["backward"] == measured.peak_bytes
    assert measured.peak_bytes == predicted.peak_bytes
    assert measured.peak_by_category == predicted.peak_by_category


def test_the_predicted_8bit_optimizer():
    """State and scratch: bitsandbytes' CPU kernels are written in Python, so a prediction runs them too."""
    make = lm(("adamw_8bit",), SDPA).build()
    measure(make)  # bitsandbytes makes its code tables once per process
    measured, predicted = measure(make), predict(make)
    assert predicted.peak_by_phase == measured.peak_by_phase
    assert predicted.peak_by_category == measured.peak_by_category


@pytest.mark.parametrize("techniques", [(), ("bf16", "accumulation=2")], ids=["fp32", "bf16-accumulation"])
def test_the_predicted_moments_are_the_measured(techniques):
    """Equal phase by phase and step by step, not only at the peak."""
    make = lm(techniques, SDPA).build()
    measured, predicted = measure(make), predict(make)
    assert predicted.peak_by_phase == measured.peak_by_phase
    assert predicted.forward_end_by_category == measured.forward_end_by_category
    assert predicted.iteration_peaks == measured.iteration_peaks


def test_prediction_takes_no_memory_whatever_the_model():
    width, reports = 32_768, []

    def make():
        layer = nn.Linear(width, width, bias=False)
        updates = torch.optim.AdamW(layer.parameters())
        rows = torch.randn(64, width)

        def step():
            layer(rows).square().mean().backward()
            updates.step()
            updates.zero_grad()

        return step

    totals = allocator_totals(lambda: reports.append(predict(make)))
    before = allocator_totals(lambda: torch.empty(1))[0] - 4
    assert reports[0].peak_by_category["parameters"] == 4 * width**2  # 1.07 billion parameters, 4 GiB
    assert reports[0].peak_bytes > 4 * 4 * width**2
    assert max(totals, default=before) - before < MIB


def test_prediction_leaves_real_tensors_alone():
    data, state = torch.ones(4), torch.get_rng_state()

    def make():
        weight = nn.Parameter(torch.ones(4))

        def step():
            data.add_(torch.rand(4))
            data[1:].zero_()
            (weight * data).sum().backward()

        return step

    report = predict(make)
    assert data.tolist() == [1.0] * 4
    assert torch.equal(torch.get_rng_state(), state)
    # `data` was made before `build`, so neither report counts it.
    assert report.iteration_peaks == measure(make).iteration_peaks


@pytest.mark.parametrize("use", [lambda w: w.sum().backward(), lambda w: w.data.add_(1)], ids=["backward", "update"])
def test_prediction_refuses_to_train_what_build_did_not_make(use):
    weight = nn.Parameter(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"shape \(2, 3\) was made before build"):
        predict(lambda: lambda: use(weight))
    assert weight.tolist() == [[1.0] * 3] * 2
    assert weight.grad is None


@both
def test_tensors_made_of_python_numbers_count(report_on):
    def make():
        kept = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        return lambda: kept + torch.tensor([1.0, 1.0])

    report = report_on(make)
    assert report.peak_by_phase["build"] == 16
    assert report.peak_bytes == 16 + 8 + 16


def test_prediction_is_the_same_each_time():
    make = lm(("checkpointing",)).build()  # without bf16: autocast frees its casts in random order
    first, second = predict(make), predict(make)
    assert [(phase, live) for _, phase, live in first.timeline] == [(phase, live) for _, phase, live in second.timeline]


def test_prediction_answers_for_values_that_no_fake_tensor_has():
    asked = SimpleNamespace()

    def make():
        def step():
            asked.every = bool(torch.ones(3, dtype=torch.bool).all())
            asked.some = bool((torch.randn(3) > 9).any())
            asked.known = int(torch.tensor(6) // 2)
            asked.real = float(torch.randn(3).sum())
            asked.whole = int(torch.arange(3).sum())

        return step

    predict(make)
    assert (asked.every, asked.some, asked.known, asked.real, asked.whole) == (True, False, 3, 1.0, 3)


def test_a_loop_until_no_value_is_out_of_bounds_ends():
    report = predict(lambda: lambda: nn.init.trunc_normal_(torch.empty(30)))
    assert report.peak_bytes >= 4 * 30


POSITIONS = {
    "an element": lambda p: p[3],
    "the largest": lambda p: p.max(),
    "of a batch": lambda p: p.unsqueeze(0).expand(4, -1).max(),
    "of a part": lambda p: p[2:5].max(),
    "of every second": lambda p: p.view(4, 2)[:, 0].max(),
    "downwards": lambda p: torch.arange(9, 2, -2)[1:].max(),
    "from": lambda p: torch.arange(5, 30).max(),
}


@pytest.mark.parametrize("take", POSITIONS.values(), ids=POSITIONS)
def test_prediction_knows_the_elements_of_a_range(take):
    asked = []
    predict(lambda: lambda: asked.append(take(torch.arange(8)).item()), iterations=1)
    assert asked == [take(torch.arange(8)).item()]


def test_prediction_follows_a_range_that_is_written_to():
    asked = []
    predict(lambda: lambda: asked.append(torch.arange(8).mul_(2).max().item()), iterations=1)
    assert asked == [14]


def test_reported_mib_are_two_to_the_twentieth():
    assert MIB == 1_048_576
    report = measure(mlp_build())
    assert math.isclose(report.peak_allocated_mib * 1_048_576, report.peak_bytes)
    assert report.peak_reserved_mib is None
    assert report.device == "cpu"
