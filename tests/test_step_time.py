"""Predicted step times: the work of single ops by hand, properties of the queue, and every constant with its source."""

import json
from functools import partial
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from memstudy.attention import SoftmaxConfig
from memstudy.profiler import find_gpu, gpus, predict
from memstudy.profiler.cuda import TODAY
from memstudy.profiler.prediction import follow
from memstudy.profiler.time.cost import Constant, constants, kernel_us, step_time, step_us
from memstudy.profiler.time.ops import WAIT, Work
from memstudy.trainers.hub_model import HubModelRun

A100, V100, T4 = map(find_gpu, ("A100-80GB", "V100-16GB", "T4"))
PHASES = ("forward", "backward", "optimizer")


def elementwise(moved_bytes: int) -> Work:
    return Work("elementwise and norms", moved_bytes=moved_bytes)


def product(rows: int, columns: int, inner: int, arithmetic: str = "fp16", batch: int = 1) -> Work:
    moved = 2 * batch * (rows * inner + inner * columns + rows * columns)
    return Work("products", moved_bytes=moved, product=(batch, rows, columns, inner), arithmetic=arithmetic)


def time_of(function, gpu="A100-80GB"):
    """The predicted time of one call of what ``function`` returns."""
    return predict(function, gpu=gpu, iterations=1).time


# --- work of single ops


def work(build):
    """The works of a step that launch a kernel."""
    recorder, _ = follow(build, 1, A100, 1, TODAY)
    return [work for _, work in recorder.issued.by_step[-1] if work.kernels]


def of_two(function, *shape, dtype=torch.float32):
    """A step that calls ``function`` on two tensors."""

    def build():
        left, right = (torch.randn(shape, dtype=dtype) for _ in range(2))
        return lambda: function(left, right)

    return build


@pytest.mark.parametrize(
    ("function", "moved"),
    [
        (torch.add, 3 * 4 * 64 * 32),
        (lambda left, right: left.add_(right), 3 * 4 * 64 * 32),
        (lambda left, right: left.copy_(right), 2 * 4 * 64 * 32),
        (lambda left, right: left.zero_(), 4 * 64 * 32),
        (lambda left, right: left + right[0], 2 * 4 * 64 * 32 + 4 * 32),
        (lambda left, right: left + right[:1].expand(64, 32), 2 * 4 * 64 * 32 + 4 * 32),
        (lambda left, right: torch.mul(left, 2, out=right), 2 * 4 * 64 * 32),
    ],
    ids=["add", "in place", "copy", "fill", "broadcast", "expanded", "out"],
)
def test_an_elementwise_op_moves_what_it_reads_and_writes(function, moved):
    (found,) = work(of_two(function, 64, 32))
    assert (found.kind, found.moved_bytes, found.kernels) == ("elementwise and norms", moved, 1)


def test_a_view_launches_no_kernel_and_a_reshape_that_copies_launches_one():
    assert work(of_two(lambda left, right: left.t().view(32, 64).expand(3, 32, 64), 64, 32)) == []
    assert len(work(of_two(lambda left, right: left.t().reshape(-1), 64, 32))) == 1


@pytest.mark.parametrize(
    ("function", "shape", "sizes"),
    [
        (lambda left, right: left @ right.t(), (64, 32), (1, 64, 64, 32)),
        (lambda left, right: left @ right.mT, (4, 64, 32), (4, 64, 64, 32)),
        (lambda left, right: nn.functional.linear(left, right, right[:, 0]), (64, 32), (1, 64, 64, 32)),
        (lambda left, right: nn.functional.conv2d(left, right), (8, 3, 5, 5), (1, 8, 8, 75)),
    ],
    ids=["matrix", "batch", "bias", "convolution"],
)
def test_a_product_has_its_sizes(function, shape, sizes):
    assert [found.product for found in work(of_two(function, *shape)) if found.kind == "products"] == [sizes]


def test_products_of_half_precision_run_on_tensor_cores_and_fp32_only_with_tf32():
    def units(dtype=torch.float32):
        return [found.arithmetic for found in work(of_two(lambda left, right: left @ right.t(), 64, 32, dtype=dtype))]

    assert (units(torch.bfloat16), units(torch.float16)) == (["bf16"], ["fp16"])
    assert units() == ["fp32"]
    run = HubModelRun(experiment="t", model="bert-base-uncased", seq_len=128, batch_size=4, techniques=("tf32",))
    plain = run.model_copy(update={"techniques": ()})
    assert run.foretell(A100).time.step_time_ms < 0.7 * plain.foretell(A100).time.step_time_ms
    assert torch.get_float32_matmul_precision() == "highest"  # a prediction leaves the process as it was


@pytest.mark.parametrize("causal", [False, True])
def test_attention_has_four_flops_for_each_score_and_head_dimension(causal):
    def build():
        query = torch.randn(2, 4, 64, 32, dtype=torch.bfloat16)
        return partial(nn.functional.scaled_dot_product_attention, query, query, query, is_causal=causal)

    (found,) = work(build)
    assert (found.kind, found.attention, found.flops) == (
        "attention",
        "flash_forward_share",
        4 * 2 * 4 * 64 * 64 * 32 // (1 + causal),
    )


def test_attention_that_chooses_its_kernel_by_device_is_timed_as_on_cuda():
    def build():
        config = SoftmaxConfig(recompute=True)
        return partial(config.module(64, 2, config, is_causal=True), torch.randn(2, 128, 64))

    assert {found.attention for found in work(build) if found.kind == "attention"} == {"efficient_forward_share"}


def test_the_fused_optimizer_reads_gradients_and_writes_the_rest():
    def build():
        layer = nn.Linear(64, 64, bias=False)
        optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
        layer.weight.grad = torch.zeros(64, 64)
        return optimizer.step

    moved = max(found.moved_bytes for found in work(build))
    assert moved == pytest.approx(7 * 4 * 64 * 64, rel=0.01)  # reads weight, gradient, two moments; writes three


def test_a_multi_tensor_op_launches_so_many_kernels_that_each_takes_few_tensors():
    def build():
        many = [torch.zeros(10) for _ in range(200)]
        return partial(torch._foreach_mul_, many, 2.0)

    (found,) = work(build)
    assert found.kernels == 2  # of up to 110 tensors each


@pytest.mark.parametrize(
    ("shape", "dim", "passes"),
    [((8, 4096), (-1,), 1), ((8, 8192), (-1,), 2), ((64, 64), (-2, -1), 2)],
    ids=["a dimension", "a long one", "two"],
)
def test_a_fourier_transform_goes_over_its_data_for_each_dimension_and_twice_for_a_long_one(shape, dim, passes):
    def build():
        given = torch.zeros(shape, dtype=torch.complex64)
        return partial(torch.fft.fftn, given, dim=dim)

    (found,) = work(build)
    elements = shape[0] * shape[1]
    assert (found.kernels, found.moved_bytes) == (passes, passes * 2 * 8 * elements)


def test_a_matrix_is_factorised_column_by_column_and_its_solution_is_waited_for():
    def factorise(size, columns=1):
        return work(lambda: partial(torch.linalg.solve, torch.eye(size), torch.zeros(size, columns)))

    assert max(found.kernels for found in factorise(256)) == 256 + 2 * 256 // 32
    assert [found.kind for found in factorise(64)].count("host waits") == 1  # whether the matrix is singular
    assert time_of(of_two(torch.linalg.solve, 32, 32)).untimed == ()


def test_a_matrix_by_a_vector_takes_what_its_bytes_take():
    long, bytes_alone = product(1, 2, 10**6, "fp32"), elementwise(2 * (3 * 10**6 + 2))
    assert kernel_us(long, A100) < 2 * kernel_us(bytes_alone, A100)


def test_reading_a_value_waits_for_the_gpu():
    def build(reads):
        left = torch.randn(4096, 4096)

        def step():
            for _ in range(4):
                total = (left @ left).sum()
                if reads:
                    total.item()

        return step

    waiting, queued = (time_of(partial(build, reads)).by_kind_ms["host waits"] for reads in (True, False))
    assert waiting > queued


def test_offloaded_activations_cross_the_link_to_the_host_and_back():
    run = HubModelRun(experiment="t", model="bert-base-uncased", seq_len=128, batch_size=4)
    run = run.model_copy(update={"techniques": ("offload_activations",)})
    report = run.foretell(A100)
    saved = run.model_copy(update={"techniques": ()}).foretell(A100).forward_end_by_category["activations"]
    link = A100.speed.pcie_gb_s * 1e6  # bytes in a millisecond
    assert report.time.by_kind_ms["transfers"] > 1.9 * saved / link


def test_parts_that_are_not_traced_are_timed():
    runs = {n: HubModelRun(experiment="t", model="bert-base-uncased", seq_len=128, batch_size=12) for n in (2, 3, 6)}
    runs = {n: run.model_copy(update={"techniques": (f"accumulation={n}",)}) for n, run in runs.items()}
    flops = {n: (time := run.foretell(A100).time).share_of_peak * time.step_time_ms for n, run in runs.items()}
    assert flops[3] == pytest.approx(flops[2], rel=0.01)
    assert flops[6] == pytest.approx(flops[2], rel=0.01)


def test_bfloat16_is_slow_before_ampere():
    work = product(4096, 4096, 4096, "bf16")
    half = product(4096, 4096, 4096, "fp16")
    assert kernel_us(work, V100) > 5 * kernel_us(half, V100)
    assert kernel_us(work, A100) == kernel_us(half, A100)


# --- properties


works = st.lists(
    st.tuples(
        st.sampled_from(PHASES),
        st.one_of(
            st.builds(elementwise, st.integers(0, 10**9)),
            st.builds(product, *[st.integers(1, 5000)] * 3, st.sampled_from(["fp16", "bf16", "tf32", "fp32"])),
            st.just(WAIT),
            st.just(Work("elementwise and norms", kernels=0)),
        ),
    ),
    max_size=20,
)


@given(works)
@settings(deadline=None)
def test_a_faster_gpu_is_never_slower(issued):
    time = step_time(issued, A100)
    for field in ("bandwidth_gb_s", "tensor_tflops", "tf32_tflops", "fp32_tflops", "watts", "pcie_gb_s", "l2_mib"):
        speed = A100.speed.model_copy(update={field: 1.5 * getattr(A100.speed, field)})
        assert step_time(issued, A100.model_copy(update={"speed": speed})).step_time_ms <= time.step_time_ms + 1e-9


@given(works)
@settings(deadline=None)
def test_the_parts_add_up_and_the_band_holds_the_time(issued):
    time = step_time(issued, V100)
    assert sum(time.by_phase_ms.values()) == pytest.approx(time.step_time_ms)
    assert sum(time.by_kind_ms.values()) == pytest.approx(time.step_time_ms)
    assert 0 <= time.low_ms <= time.step_time_ms <= time.high_ms
    assert time.kernels_ms <= time.step_time_ms + 1e-9


@given(works, works)
@settings(deadline=None)
def test_more_ops_never_take_less(issued, more):
    assert step_time([*issued, *more], A100).step_time_ms >= step_time(issued, A100).step_time_ms - 1e-9


def test_no_op_takes_no_time():
    time = step_time([], A100)
    assert (time.step_time_ms, time.low_ms, time.high_ms, time.share_of_peak) == (0, 0, 0, 0)


@given(st.integers(1, 4096), st.integers(1, 4096), st.integers(1, 4096), st.sampled_from(["fp16", "fp32"]))
@settings(deadline=None)
def test_twice_the_rows_never_take_less(rows, columns, inner, arithmetic):
    once, twice = (kernel_us(product(n * rows, columns, inner, arithmetic), A100) for n in (1, 2))
    assert twice >= once


@pytest.mark.parametrize("gpu", ["A100-80GB", "T4", "H100-80GB", "RTX6000Ada"])
def test_a_product_is_never_faster_than_the_peak_or_faster_in_a_step_than_alone(gpu):
    card = find_gpu(gpu)
    work = product(8192, 8192, 8192)
    peak_us = 2 * 8192**3 / (card.speed.tensor_tflops * 1e6)
    assert peak_us < kernel_us(work, card) <= step_us(work, card)


@pytest.fixture(scope="module")
def bert():
    """Predicted times of BERT-base by batch, sequence, techniques and GPU."""

    def time(batch=8, techniques=(), gpu="A100-80GB"):
        run = HubModelRun(
            experiment="t", model="bert-base-uncased", seq_len=128, batch_size=batch, techniques=techniques
        )
        return run.foretell(gpu).time

    return time


def test_a_step_of_twice_the_batch_takes_longer(bert):
    assert bert(8).step_time_ms < bert(16).step_time_ms


@pytest.mark.parametrize("precision", [(), ("bf16",)])
def test_checkpointing_and_accumulation_take_longer(bert, precision):
    plain = bert(8, precision).step_time_ms
    assert bert(8, (*precision, "checkpointing")).step_time_ms > plain
    assert bert(8, (*precision, "accumulation=4")).step_time_ms > plain


def test_what_is_not_in_the_time_is_named():
    run = HubModelRun(experiment="t", model="bert-base-uncased", seq_len=128, batch_size=8, processes=2)
    assert "communication between processes" in run.foretell(A100).time.untimed
    assert time_of(of_two(lambda left, right: torch.linalg.svd(left), 64, 32)).untimed == ("aten::_linalg_svd",)
    assert any("power" in text for text in time_of(of_two(torch.add, 8, 8), "T4").untimed)


def test_the_cpu_and_a_gpu_without_speed_have_no_time():
    assert predict(of_two(torch.add, 8, 8)).time is None
    assert predict(of_two(torch.add, 8, 8), gpu=A100.model_copy(update={"speed": None})).time is None


# --- constants


@pytest.mark.parametrize("name", constants())
def test_a_constant_serves_every_gpu_and_names_published_rows(name):
    constant = constants()[name]
    assert all(constant.of(gpu) > 0 for gpu in gpus().values())
    for entry in (*constant.fitted_on, *constant.seen):
        table, _, text = entry.partition(": ")
        rows = import_module(f"memstudy.studies.published.times.{table}").rows()
        assert any(text in row.row for row in rows), entry


@pytest.mark.parametrize("field", ["source", "fitted_on", "unit", "means"])
def test_a_constant_without_its_source_is_refused(field):
    given = json.loads(constants()["kernel_us"].model_dump_json())
    del given[field]
    with pytest.raises(ValidationError, match=field):
        Constant.model_validate(given)
