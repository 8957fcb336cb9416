"""Predictions for a GPU at sizes that can be worked out by hand: memory that CUDA's kernels keep and allocate."""

import gc
import itertools
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from memstudy.profiler import CATEGORIES, MIB, predict
from memstudy.profiler.catalogue import Gpu, find_gpu
from memstudy.profiler.cuda import TODAY
from memstudy.profiler.prediction import follow
from memstudy.trainers.language_model import LanguageModelRun

pytestmark = pytest.mark.usefixtures("one_thread")

AMPERE, TURING, HOPPER = "A100-40GB", "T4", "H100-80GB"


class Seen(TorchDispatchMode):
    """Records the ops dispatched while the mode is on, each with the dtypes of its results."""

    def __init__(self):
        super().__init__()
        self.ops: list[tuple[str, tuple[torch.dtype, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        several = result if isinstance(result, (tuple, list)) else (result,)
        dtypes = tuple(value.dtype for value in several if isinstance(value, torch.Tensor))
        self.ops.append((func._schema.name.removeprefix("aten::"), dtypes))
        return result

    def dtypes(self, name):
        """The dtypes of the results of each call of `name`."""
        return [dtypes for op, dtypes in self.ops if op == name]


def ops_of(make, card):
    """The ops that the first step of `make` dispatches on `card`, and the report."""
    seen = Seen()

    def build():
        step = make()

        def watched():
            with seen:
                step()

        return watched

    report = predict(build, gpu=card, iterations=1)
    return seen, report


def block(size):
    """Bytes of the block for a small request of `size` bytes."""
    return -(-size // 512) * 512


def totals(report):
    return [sum(live.values()) for _, _, live in report.timeline]


def asked_for(report):
    """Sizes of the blocks that the last step asked for, in order."""
    return [after - before for before, after in itertools.pairwise([0, *totals(report)]) if after > before]


def has_run(found, run):
    return any(found[i : i + len(run)] == run for i in range(len(found)))


SEED = block(4)  # `backward()` makes the gradient of the loss


def mlp(optimizer=torch.optim.AdamW, width=64, **options):
    """A step of two layers; each parameter's bytes are a multiple of 512."""

    def build():
        model = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, 2 * width))
        updates = optimizer(model.parameters(), lr=1e-3, **options)
        inputs = torch.randn(8, width)

        def step():
            model(inputs).square().mean().backward()
            updates.step()
            updates.zero_grad()

        return step

    return build


MLP = 4 * (64 * 128 + 128 + 128 * 128 + 128)
LARGEST = 4 * 128 * 128

# --- dropout, softmax and layer norm


def test_dropout_keeps_a_mask_of_one_byte():
    def build():
        x = torch.randn(64, 64, requires_grad=True)
        return lambda: nn.functional.dropout(x, 0.5).sum().backward()

    on_gpu = predict(build, gpu=TURING).forward_end_by_category["activations"]
    on_cpu = predict(build).forward_end_by_category["activations"]
    assert on_gpu == 64 * 64 + 2 * SEED  # the mask, the loss and the gradient's seed
    assert on_cpu == 4 * 64 * 64 + 4 + 4


@pytest.mark.parametrize(("p", "train"), [(0.5, False), (0.0, True)])
def test_dropout_that_drops_nothing_is_its_input(p, train):
    def build():
        x = torch.randn(64, 64)
        return lambda: F.dropout(x, p, train)

    seen, report = ops_of(build, TURING)
    assert seen.ops == []
    assert report.peak_bytes == 4 * 64 * 64


def test_dropout_of_everything_has_no_mask():
    def build():
        x = torch.randn(64, 64, requires_grad=True)
        return lambda: F.dropout(x, 1.0).sum().backward()

    seen, _ = ops_of(build, TURING)
    assert seen.dtypes("native_dropout") == []
    assert len(seen.dtypes("mul")) == 2


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize(("dtype", "copies"), [(torch.float16, 0), (torch.bfloat16, 1), (torch.float32, 0)])
def test_softmax_in_fp32_reads_fp16_directly(name, dtype, copies):
    def build():
        x = torch.randn(8, 64, dtype=dtype)
        return lambda: getattr(F, name)(x, -1, dtype=torch.float32)

    seen, _ = ops_of(build, TURING)
    assert seen.dtypes(f"_{name}") == [(torch.float32,)]
    assert len(seen.dtypes("_to_copy")) == copies


@pytest.mark.parametrize(("dtype", "moment"), [(torch.bfloat16, 4), (torch.float16, 4), (torch.float64, 8)])
def test_layer_norm_keeps_its_moments_in_fp32_at_least(dtype, moment):
    rows, width = 1024, 64

    def build():
        x, norm = torch.randn(rows, width, dtype=dtype, requires_grad=True), nn.LayerNorm(width, dtype=dtype)
        return lambda: norm(x).sum().backward()

    report = predict(build, gpu=AMPERE)
    assert report.forward_end_by_category["activations"] == 2 * moment * rows + 2 * SEED


# --- attention


def attention(dtype=torch.float32, width=16, *, heads=2, kv_heads=None, query_len=24, key_len=24, grad=True, **options):
    """A step of `scaled_dot_product_attention`; `mask` is given as a function of no arguments."""

    def build():
        shapes = [(heads, query_len), *[(kv_heads or heads, key_len)] * 2]
        query, key, value = (torch.randn(2, *shape, width, dtype=dtype, requires_grad=grad) for shape in shapes)
        mask = options["mask"]() if "mask" in options else None
        others = {name: option for name, option in options.items() if name != "mask"}

        def step():
            output = F.scaled_dot_product_attention(query, key, value, mask, **others)
            if grad:
                output.sum().backward()

        return step

    return build


KERNELS = {
    "_scaled_dot_product_flash_attention": "flash",
    "_scaled_dot_product_efficient_attention": "efficient",
    "_scaled_dot_product_cudnn_attention": "cudnn",
    "_safe_softmax": "math",
}


def kernel(card, *args, grad=True, **options):
    seen, report = ops_of(attention(*args, grad=grad, **options), card)
    (chosen,) = [KERNELS[name] for name, _ in seen.ops if name in KERNELS]
    backward = [name for name, _ in seen.ops if name.endswith("attention_backward")]
    assert backward == ([f"_scaled_dot_product_{chosen}_attention_backward"] if grad and chosen != "math" else [])
    unverified = [f"aten::_scaled_dot_product_cudnn_attention{end}" for end in ("", "_backward")[: 1 + grad]]
    assert report.unverified == (tuple(unverified) if chosen == "cudnn" else ())
    return chosen


def bool_mask(query_len=24, key_len=24):
    return torch.ones(query_len, key_len, dtype=torch.bool)


FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    ("card", "chosen"),
    [
        ("T4", ["efficient", "efficient", "math"]),
        ("V100-16GB", ["efficient", "efficient", "math"]),
        ("A100-40GB", ["efficient", "flash", "flash"]),
        ("RTX4090", ["efficient", "flash", "flash"]),
        ("RTX5090", ["efficient", "flash", "flash"]),
        ("H100-80GB", ["efficient", "cudnn", "cudnn"]),
        ("B200", ["efficient", "cudnn", "cudnn"]),
    ],
)
def test_the_kernel_by_generation_and_dtype(card, chosen):
    assert [kernel(card, dtype) for dtype in (FP32, FP16, BF16)] == chosen


@pytest.mark.parametrize(
    ("card", "dtype", "width", "options", "chosen"),
    [
        # a mask rules flash out, whatever its dtype; causality does not, unless the lengths differ
        ("A100-40GB", BF16, 16, {"mask": bool_mask}, "efficient"),
        ("A100-40GB", BF16, 16, {"mask": lambda: torch.zeros(24, 24, dtype=BF16)}, "efficient"),
        ("A100-40GB", BF16, 16, {"is_causal": True}, "flash"),
        ("A100-40GB", BF16, 16, {"is_causal": True, "key_len": 32}, "efficient"),
        ("A100-40GB", BF16, 16, {"dropout_p": 0.1}, "flash"),
        ("H100-80GB", BF16, 16, {"mask": bool_mask}, "cudnn"),
        # head sizes: flash up to 256, padded to a multiple of 8; efficient if aligned to 16 bytes for tensor cores
        ("A100-40GB", BF16, 256, {}, "flash"),
        ("A100-40GB", BF16, 264, {}, "efficient"),
        ("A100-40GB", BF16, 20, {}, "flash"),
        ("A100-40GB", BF16, 20, {"mask": bool_mask}, "math"),
        ("A100-40GB", FP32, 20, {}, "efficient"),
        ("A100-40GB", FP32, 18, {}, "math"),
        ("T4", FP32, 17, {}, "efficient"),
        ("T4", FP16, 20, {}, "math"),
        ("H100-80GB", BF16, 128, {}, "cudnn"),
        ("H100-80GB", BF16, 136, {}, "flash"),
        ("H100-80GB", BF16, 20, {}, "flash"),
        # training with head sizes around the limit of the RTX 4090's small shared memory
        ("RTX4090", BF16, 192, {}, "flash"),
        ("RTX4090", BF16, 200, {}, "efficient"),
        ("RTX4090", BF16, 200, {"grad": False}, "flash"),
        ("RTX4090", BF16, 232, {}, "flash"),
        ("RTX4090", BF16, 232, {"dropout_p": 0.1}, "efficient"),
        ("A100-40GB", BF16, 200, {}, "flash"),
        # grouped queries: supported by flash and cuDNN
        ("A100-40GB", BF16, 16, {"kv_heads": 1, "enable_gqa": True}, "flash"),
        ("H100-80GB", BF16, 16, {"kv_heads": 1, "enable_gqa": True}, "cudnn"),
        ("A100-40GB", FP32, 16, {"kv_heads": 1, "enable_gqa": True}, "math"),
        # cases that cuDNN does not take
        ("H100-80GB", BF16, 16, {"dropout_p": 0.1}, "flash"),
        ("H100-80GB", BF16, 16, {"dropout_p": 0.25}, "cudnn"),
        ("H100-80GB", BF16, 16, {"key_len": 1}, "flash"),
    ],
)
def test_the_kernel_by_mask_head_size_and_dropout(card, dtype, width, options, chosen):
    assert kernel(card, dtype, width, **options) == chosen


def test_flash_keeps_one_number_a_row_and_math_whole_matrices():
    """Batch 2, 2 heads, 128 queries, 128 keys, head_dim 16."""
    fused, whole = (
        predict(attention(BF16, query_len=128, key_len=128), gpu=card).forward_end_by_category["activations"]
        for card in (AMPERE, TURING)
    )
    output, row = 2 * 2 * 2 * 128 * 16, 4 * 2 * 2 * 128
    rng_state = 2 * block(8)
    assert fused == output + row + rng_state + 2 * block(2)
    assert whole >= 2 * 2 * 2 * 128 * 128  # the weights alone


def test_flash_keeps_what_it_padded():
    """The kernel pads 20 columns to 24; the step holds 20 of the output's columns."""
    report = predict(attention(BF16, 20), gpu=AMPERE)
    padded, row, rng_state = 2 * 2 * 2 * 24 * 24, 4 * 2 * 2 * 24, 2 * block(8)
    assert report.forward_end_by_category["activations"] == 4 * block(padded) + block(row) + rng_state + 2 * block(2)


@pytest.mark.parametrize(
    ("make", "copies"),
    [
        (lambda: torch.zeros(24, 24, dtype=BF16), 0),
        (lambda: torch.zeros(24, 20, dtype=BF16), 1),  # rows of 40 bytes
        (lambda: torch.zeros(24, 24, dtype=BF16)[:, :20], 0),  # rows of 48 bytes
        (lambda: torch.zeros(24, 44, dtype=BF16)[:, 4:28], 1),
    ],
    ids=["aligned", "unaligned", "slice-aligned", "slice-unaligned"],
)
def test_a_mask_is_copied_when_its_rows_are_not_aligned(make, copies):
    key_len = make().shape[1]
    seen, _ = ops_of(attention(BF16, key_len=key_len, mask=make, grad=False), AMPERE)
    assert len(seen.dtypes("_scaled_dot_product_efficient_attention")) == 1
    assert len(seen.dtypes("constant_pad_nd")) == copies


# --- autocast


def autocast(run, dtype=BF16, **options):
    """A step of `run(x)` under autocast for CUDA."""

    def build():
        x = torch.randn(8, 64, requires_grad=True)

        def step():
            with torch.autocast("cuda", dtype=dtype, **options):
                run(x)

        return step

    return build


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_autocast_gives_softmax_layer_norm_and_sums_in_fp32(dtype):
    results = {}

    def run(x):
        half = x @ x.T
        results["matmul"] = half.dtype
        results["softmax"] = F.softmax(half, -1).dtype
        results["log_softmax"] = F.log_softmax(half, -1).dtype
        results["layer_norm"] = F.layer_norm(half, (8,)).dtype
        results["exp"] = half.exp().dtype
        results["sum"] = half.sum().dtype
        results["tanh"] = half.tanh().dtype
        results["cat"] = torch.cat([half, half]).dtype
        results["mean"] = half.mean().dtype

    seen, _ = ops_of(autocast(run, dtype), AMPERE)
    fp32 = ("softmax", "log_softmax", "layer_norm", "exp", "sum")
    assert results == dict.fromkeys(fp32, FP32) | dict.fromkeys(("matmul", "tanh", "cat", "mean"), dtype)
    assert seen.dtypes("native_layer_norm") == [(FP32,) * 3]


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_autocast_leaves_the_log_softmax_of_cross_entropy_in_half(dtype):
    def run(x):
        F.cross_entropy(x @ x.T, torch.arange(8)).backward()

    seen, _ = ops_of(autocast(run, dtype), AMPERE)
    assert seen.dtypes("_log_softmax") == [(dtype,)]
    assert seen.dtypes("nll_loss_forward") == [(FP32, FP32)]


def test_autocast_for_cuda_is_fp16_by_default_and_can_be_off():
    seen, _ = ops_of(autocast(lambda x: x @ x.T, None), AMPERE)
    assert seen.dtypes("mm") == [(FP16,)]
    seen, _ = ops_of(autocast(lambda x: x @ x.T, enabled=False), AMPERE)
    assert seen.dtypes("mm") == [(FP32,)]


# --- optimizers, gradient scaling, offload


def test_foreach_adamw_holds_one_more_copy_of_the_parameters_than_fused():
    foreach = predict(mlp(), gpu=AMPERE)
    fused = predict(mlp(fused=True), gpu=AMPERE)
    one_by_one = predict(mlp(foreach=False), gpu=AMPERE)
    counters = 4 * block(4)  # fused AdamW keeps its step counters on the GPU
    of_foreach, of_fused, of_one = (r.peak_by_phase["optimizer"] for r in (foreach, fused, one_by_one))
    assert of_foreach - of_fused == MLP - counters
    assert of_one < of_fused + 2 * LARGEST
    assert fused.peak_by_category["optimizer"] == 2 * MLP + counters


def test_step_counters_are_not_on_the_gpu():
    assert predict(mlp(), gpu=AMPERE).timeline[-1][2]["optimizer"] == 2 * MLP
    assert predict(mlp()).timeline[-1][2]["optimizer"] == 2 * MLP + 4 * 4  # a CPU prediction counts them


@pytest.mark.parametrize("clip", [False, True])
def test_gradient_scaling_lets_the_optimizer_step(clip):
    stepped = []

    def build():
        model = nn.Linear(64, 64)
        updates = torch.optim.AdamW(model.parameters())
        scaler = torch.amp.GradScaler("cuda")
        inputs = torch.randn(8, 64)
        updates.register_step_post_hook(lambda *_: stepped.append(1))

        def step():
            with torch.autocast("cuda", dtype=torch.float16):
                loss = model(inputs).square().mean()
            scaler.scale(loss).backward()
            if clip:
                scaler.unscale_(updates)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(updates)
            scaler.update()
            updates.zero_grad()

        return step

    report = predict(build, gpu=TURING, iterations=3)
    assert len(stepped) == 3
    weights = 4 * 64 * 64 + block(4 * 64)
    assert report.timeline[-1][2]["optimizer"] == 2 * weights
    assert report.peak_by_phase["optimizer"] >= 4 * weights


def test_offloaded_activations_are_not_there_between_forward_and_backward():
    layers, rows = 4, 4 * 64 * 64

    def make(offload):
        def build():
            x = torch.randn(64, 64, requires_grad=True)

            def step():
                with torch.autograd.graph.save_on_cpu(pin_memory=True) if offload else warnings.catch_warnings():
                    y = x
                    for _ in range(layers):
                        y = torch.exp(y)  # saves its result for backward
                y.sum().backward()
                x.grad = None

            return step

        return build

    kept, offloaded = (predict(make(offload), gpu=AMPERE) for offload in (False, True))
    assert kept.forward_end_by_category["activations"] == layers * rows + 2 * SEED
    assert offloaded.forward_end_by_category["activations"] == rows + 2 * SEED  # the step holds `y`
    # Backward holds one activation at a time, the gradients before and after it, `x` and `y`.
    assert offloaded.peak_by_phase["backward"] == 5 * rows + 2 * SEED


# --- workspaces and scratch of kernels


@pytest.mark.parametrize(
    ("card", "size"),
    [("T4", 8.125), ("A100-40GB", 8.125), ("RTX4090", 8.125), ("H100-80GB", 32), ("RTX5090", 32), ("B200", 32)],
)
def test_a_workspace_for_each_thread_that_multiplies(card, size):
    def forward_only():
        x = torch.randn(8, 8)
        return lambda: x @ x

    one, two = predict(forward_only, gpu=card), predict(mlp(), gpu=card)
    assert one.workspace_bytes == size * MIB
    assert two.workspace_bytes == 2 * size * MIB
    assert one.peak_bytes == size * MIB + 2 * block(4 * 8 * 8)


def test_no_workspace_where_nothing_is_multiplied():
    def build():
        x = torch.randn(64, 64, requires_grad=True)
        return lambda: x.exp().sum().backward()

    assert predict(build, gpu=AMPERE).workspace_bytes == 0


def test_the_workspace_is_neither_activations_nor_a_modules():
    first = predict(mlp(), gpu=AMPERE, iterations=1)
    assert first.forward_end_by_category["activations"] < MIB
    assert first.forward_end_by_category["other"] == 8.125 * MIB + 4 * 8 * 64
    assert sum(first.modules.values()) == first.forward_end_by_category["activations"]


def test_only_the_workspaces_of_the_peak_are_told():
    """The peak is in forward, before autograd's thread has a workspace."""

    def build():
        x = torch.randn(128, 128, requires_grad=True)

        def step():
            loss = (x @ x).sum()
            torch.zeros(16 * MIB, dtype=torch.int8)
            loss.backward()

        return step

    report = predict(build, gpu=AMPERE, iterations=1)
    assert report.workspace_bytes == 8.125 * MIB
    assert report.waterfall_mib()["other"] == 4 * 128 * 128 / MIB


def test_the_scratch_of_flash_backward():
    report = predict(attention(BF16, 24, heads=3, query_len=40, key_len=40), gpu=AMPERE)
    rowsum, gradient = 4 * 2 * 3 * 128, 4 * 2 * 128 * 3 * 32  # 40 rows in tiles of 128, 24 columns of 32
    assert has_run(asked_for(report), [rowsum, gradient])


def test_scratch_is_there_with_the_results():
    """The gradients of query, key and value are allocated before the scratch of their kernel."""
    report = predict(attention(BF16, 32, heads=4, query_len=128, key_len=128), gpu=AMPERE)
    one = 2 * 2 * 4 * 128 * 32
    inputs, expanded, output, row = 3 * one, one, one, 4 * 2 * 4 * 128
    gradients, scratch = 3 * one, row + 2 * one
    small = 2 * block(8) + 2 * block(2)  # random generator's state; loss and seed
    of_first = predict(attention(BF16, 32, heads=4, query_len=128, key_len=128), gpu=AMPERE, iterations=1)
    assert of_first.peak_by_phase["backward"] == inputs + output + expanded + row + gradients + scratch + small
    assert report.peak_bytes == of_first.peak_bytes + gradients  # the second step still holds the first step's


def test_the_scratch_of_flash_backward_with_grouped_queries():
    report = predict(attention(BF16, 192, heads=4, kv_heads=2, query_len=16, key_len=8, enable_gqa=True), gpu=AMPERE)
    rowsum, gradient = 4 * 2 * 4 * 128, 4 * 2 * 128 * 4 * 192
    expanded = 2 * 2 * 8 * 4 * 192  # keys or values repeated for each query head
    assert has_run(asked_for(report), [rowsum, gradient, expanded, expanded])


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["flash", "efficient"])
@pytest.mark.parametrize("merged", [True, False])
def test_a_gradient_that_does_not_lie_in_rows_is_copied_first(dtype, merged):
    def build():
        query = torch.randn(2, 4, 128, 32, dtype=dtype, requires_grad=True)

        def step():
            output = F.scaled_dot_product_attention(query, query, query)
            output = output.transpose(1, 2).reshape(2, 128, 4 * 32) if merged else output.contiguous()
            output.exp().sum().backward()
            query.grad = None

        return step

    size, rowsum = dtype.itemsize * 2 * 4 * 128 * 32, 4 * 2 * 4 * 128
    # The gradients of exp, query, key and value, and the copy.
    assert has_run(asked_for(predict(build, gpu=AMPERE)), [size] * (4 + (not merged)) + [rowsum])
    assert not has_run(asked_for(predict(build, gpu=AMPERE)), [size] * (5 + (not merged)) + [rowsum])


@pytest.mark.parametrize(
    ("dtype", "width", "workspace"),
    [
        (FP32, 24, 1 * (16 + 4 * 64 * 64)),  # 40 rows x 24 columns: one tile of 64 x 64 and its header
        (FP16, 24, 1 * (16 + 4 * 64 * 64)),
        (FP32, 72, 1 * 2 * (16 + 4 * 128 * 64)),
        (FP16, 72, 1 * 2 * (16 + 4 * 128 * 64)),
        (FP16, 160, 1 * 3 * (16 + 4 * 128 * 64)),
    ],
)
def test_the_scratch_of_memory_efficient_backward(dtype, width, workspace):
    report = predict(attention(dtype, width, heads=3, query_len=40, key_len=40), gpu=TURING)
    assert has_run(asked_for(report), [block(4 * 2 * 3 * 40), block(2 * 3 * workspace)])


@pytest.mark.parametrize(
    ("dtype", "width", "sums"), [(FP16, 128, []), (FP16, 136, [4 * 2 * 3 * 40 * 136]), (FP32, 136, [])]
)
def test_the_scratch_of_memory_efficient_forward(dtype, width, sums):
    """Only half precision keeps its sums in a separate buffer."""
    report = predict(attention(dtype, width, heads=3, query_len=40, key_len=40, grad=False), gpu=TURING)
    output = block(dtype.itemsize * 2 * 3 * 40 * width)
    assert [size for size in asked_for(report)[1:] if size > 1024] == [output, *map(block, sums)]


def embedding(tokens, dtype=FP32):
    def build():
        table = nn.Embedding(50, 8, dtype=dtype)
        indices = torch.zeros(tokens, dtype=torch.long)
        return lambda: table(indices).sum().backward()

    return build


def test_the_scratch_of_embedding_backward():
    runs = 4096 // 10 + 50
    sort = [8 * 4096] * 3 + [block(8 * 50)] * 2 + [block(8 * runs), block(4 * runs * 8)]
    assert has_run(asked_for(predict(embedding(4096), gpu=AMPERE)), sort)
    assert has_run(asked_for(predict(embedding(4096, BF16), gpu=AMPERE)), sort)  # partial sums stay fp32
    assert not has_run(asked_for(predict(embedding(3072), gpu=AMPERE)), [8 * 3072] * 3)


def test_the_scratch_of_index_backward():
    def build():
        x, rows = torch.randn(1000, 64, requires_grad=True), torch.arange(500)

        def step():
            x[rows].sum().backward()
            x.grad = None

        return step

    assert has_run(asked_for(predict(build, gpu=AMPERE)), [block(8 * 500)] * 6)


def test_the_scratch_of_gradient_norms():
    def build():
        weights = [torch.randn(size, requires_grad=True) for size in (10, 200 * 65_536 + 1)]
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        return lambda: nn.utils.clip_grad_norm_(weights, 1.0)

    found = asked_for(predict(build, gpu=AMPERE))
    partial = block(4 * 2 * 201)  # one norm per 65,536 elements; as many for the short weight
    assert found[1:4] == [block(4), block(4), partial]


# --- building, and the report


def test_what_building_dropped_does_not_count():
    """A model is built on the host; only tensors alive after building move to the GPU."""

    def build():
        scratch = torch.randn(1024, 1024)
        kept = (scratch @ scratch)[:1].clone()
        del scratch
        kept_too = torch.linalg.qr(torch.randn(16, 16))[0].clone()
        return lambda: kept.sum() + kept_too.sum()

    report = predict(build, gpu=AMPERE)
    assert report.peak_by_phase["build"] == 4 * 1024 + 4 * 16 * 16
    assert report.peak_bytes < 4 * 1024 + 4 * 16 * 16 + 4 * 512
    assert report.requested_bytes == 4 * 1024 + 4 * 16 * 16 + 4 * 3
    assert report.workspace_bytes == 0
    assert report.unverified == ()


def test_requested_bytes_are_the_tensors_alone():
    def build():
        x = torch.randn(65, 3)
        return lambda: x + 1

    report = predict(build, gpu=AMPERE)
    assert report.requested_bytes == 2 * 4 * 65 * 3
    assert report.peak_bytes == 2 * block(4 * 65 * 3)
    assert report.peak_reserved_bytes == 2 * MIB


def test_ops_that_no_rule_covers_are_named():
    library = torch.library.Library("memstudy_test", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x.repeat(2), "CompositeExplicitAutograd")

    def build():
        x = torch.randn(8)

        def step():
            torch.fft.rfft(x)
            torch.ops.memstudy_test.twice(x)
            x.tanh() + x.view(2, 4).sum()

        return step

    try:
        assert predict(build, gpu=AMPERE).unverified == ("aten::_fft_r2c", "memstudy_test::twice")
        assert predict(build).unverified == ()
    finally:
        library._destroy()


@pytest.mark.parametrize("expandable", [False, True])
@pytest.mark.parametrize(
    "build", [mlp(), mlp(fused=True), attention(BF16), embedding(4096)], ids=["mlp", "fused", "attention", "embedding"]
)
@pytest.mark.parametrize("iterations", [1, 3])
def test_the_waterfall_adds_up_to_the_whole_gpu(build, expandable, iterations):
    report = predict(build, gpu=AMPERE, expandable_segments=expandable, iterations=iterations)
    parts = report.waterfall_mib()
    assert tuple(parts) == (*CATEGORIES, "workspace", "fragmentation", "context")
    assert min(parts.values()) >= 0
    assert sum(parts.values()) == pytest.approx(report.whole_gpu_mib, rel=1e-12)
    assert parts["context"] == find_gpu(AMPERE).context_mib
    assert report.peak_bytes >= report.requested_bytes
    assert report.memory_bytes == find_gpu(AMPERE).memory_mib * MIB


def test_expandable_segments_reserve_what_they_map():
    kwargs = {"gpu": AMPERE, "iterations": 1}
    default, expandable = (predict(mlp(), expandable_segments=flag, **kwargs) for flag in (False, True))
    assert default.peak_bytes == expandable.peak_bytes
    assert default.peak_reserved_bytes == expandable.peak_reserved_bytes == 2 * MIB + 20 * MIB


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(1024, 8192, bias=False), nn.Linear(8192, 1024, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def test_out_of_memory_names_the_module(tmp_path):
    """Parameters take 64 MiB, the workspace 8.125; `up` and tanh make 32 MiB each, `down` makes 4."""
    path = tmp_path / "tiny.yaml"

    def build():
        model = Block()
        x = torch.randn(1024, 1024)
        return lambda: model(x).sum().backward()

    found = []
    for memory, context in ((60, 10), (110, 10), (130, 10), (160, 10), (400, 10), (400, 300)):
        path.write_text(f'compute_capability: "8.0"\nmemory_mib: {memory}\ncontext_mib: {context}\n')
        report = predict(build, gpu=str(path))
        found.append(report.out_of_memory)
        assert report.device == "tiny"
    assert [str(refusal) if refusal else None for refusal in found] == [
        "out of memory moving the model to the GPU, asking for 32.0 MiB",
        "out of memory in forward of step 1 in up, asking for 32.0 MiB",
        "out of memory in forward of step 1 in Block, asking for 32.0 MiB",
        "out of memory in backward of step 1 in cuBLAS workspace, asking for 8.1 MiB",
        None,
        "out of memory in forward of step 1 in up, asking for 32.0 MiB",
    ]


def test_a_report_of_a_card_given_as_an_object():
    card = Gpu(name="mine", compute_capability=(8, 0), memory_mib=1000, context_mib=100)
    report = predict(mlp(), gpu=card)
    assert (report.device, report.kind, report.out_of_memory) == ("mine", "predicted", None)
    assert report.whole_gpu_mib == report.peak_reserved_mib + 100
    assert report.scalars()["peak_reserved_mib"] == report.peak_reserved_mib


def without_time(report):
    return replace(report, timeline=[row[1:] for row in report.timeline])


@pytest.mark.parametrize("build", [mlp(), attention(BF16, dropout_p=0.1)], ids=["mlp", "attention"])
def test_two_predictions_are_the_same(build):
    first, second = predict(build, gpu=AMPERE), predict(build, gpu=AMPERE)
    assert without_time(first) == without_time(second)


# --- what is refused, and what is left behind


@pytest.mark.parametrize("card", [None, AMPERE])
@pytest.mark.parametrize(
    "ask",
    [
        lambda: torch.randn(3, device="cuda"),
        lambda: torch.tensor([1.0], device="cuda:0"),
        lambda: torch.ones(3).to("cuda"),
        lambda: torch.ones(3).cuda(),
        lambda: nn.Linear(3, 3).to("cuda"),
        lambda: nn.Linear(3, 3, device="cuda"),
        lambda: torch.Generator("cuda"),
        lambda: torch.cuda.synchronize(),
    ],
    ids=["randn", "tensor", "to", "cuda", "module.to", "module", "generator", "synchronize"],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA build says other things")
def test_a_build_or_step_that_asks_for_cuda_is_refused(card, ask):
    for make in (lambda: ask() and torch.ones_like, lambda: ask):
        with pytest.raises(ValueError, match="asks for a CUDA device: leave everything on the CPU"):
            predict(make, gpu=card)


def test_other_errors_pass_unchanged():
    def build():
        raise RuntimeError("the CUDA in this message is the user's")

    with pytest.raises(RuntimeError, match="the user's"):
        predict(build, gpu=AMPERE)


def test_an_unknown_card_is_refused_before_anything_is_built():
    built = []
    with pytest.raises(ValueError, match="unknown GPU 'GTX970'"):
        predict(lambda: built.append(1), gpu="GTX970")
    assert built == []


def on_this_cpu():
    """The ops that this CPU dispatches where a prediction overrides them, in fp32 and under CPU autocast."""
    x = torch.randn(1, 2, 8, 16, requires_grad=True)
    with Seen() as seen:
        F.dropout(x, 0.5).sum().backward()
        F.softmax(x.half(), -1, dtype=torch.float32)
        F.log_softmax(x.half(), -1, dtype=torch.float32)
        F.scaled_dot_product_attention(x, x, x)
        for half in (BF16, FP16):
            with torch.autocast("cpu", dtype=half):
                y = x @ x.mT
                for op in (F.softmax, F.log_softmax):
                    op(y, -1)
                F.layer_norm(y, (8,))
                y.exp(), y.sum(), y.cumsum(-1), torch.cat([y, x @ x.mT])
                F.cross_entropy(y.flatten(0, 2), torch.zeros(16, dtype=torch.long))
    weight = nn.Parameter(torch.ones(4))
    weight.grad = torch.ones(4)
    with seen:
        torch.optim.AdamW([weight]).step()
    gc.collect()
    return seen.ops


class Refused(Exception):
    """Raised by the steps below."""


@pytest.mark.parametrize("where", ["nowhere", "build", "forward", "backward", "cuda"])
def test_nothing_is_left_behind_and_nothing_is_warned_of(where, capfd):
    def refuse(*_):
        raise Refused

    def build():
        x = torch.randn(1, 2, 8, 16, requires_grad=True)
        if where == "build":
            refuse()
        if where == "cuda":
            torch.ones(1).cuda()

        def step():
            with torch.autocast("cuda", dtype=BF16), torch.autograd.graph.save_on_cpu():
                y = F.dropout(F.softmax(x @ x.mT, -1), 0.1)
                if where == "forward":
                    refuse()
            scaler = torch.amp.GradScaler("cuda")
            if where == "backward":
                y.register_hook(refuse)
            scaler.scale(y.sum()).backward()

        return step

    before = on_this_cpu()
    made = torch.autocast.__init__, torch.amp.GradScaler.__init__, torch.autograd.graph.save_on_cpu.__init__
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if where == "nowhere":
                predict(build, gpu=AMPERE)
            else:
                with pytest.raises(ValueError if where == "cuda" else Refused):
                    predict(build, gpu=AMPERE)
    finally:
        torch.set_warn_always(False)
    assert capfd.readouterr() == ("", "")
    assert on_this_cpu() == before
    assert made == (torch.autocast.__init__, torch.amp.GradScaler.__init__, torch.autograd.graph.save_on_cpu.__init__)


@pytest.mark.parametrize(
    "attention", [{"variant": "softmax"}, {"variant": "window", "window": 16}], ids=["softmax", "window"]
)
def test_the_package_flash_attn_is_predicted_as_its_copy_in_pytorch(attention):
    """The package, not installed here, is gone after the prediction; modules imported meanwhile stay."""

    def run(attention):
        return LanguageModelRun(
            experiment="test", n_layers=1, hidden_size=64, n_heads=2, feed_forward=64, vocab_size=300, seq_len=128,
            batch_size=2, measure_steps=1, techniques=("bf16", "adamw_8bit"), attention=attention,
        )  # fmt: skip

    package = run(attention | {"implementation": "flash_attention_2"})
    for _ in range(2):
        report = predict(package.build(gpu=AMPERE), gpu=AMPERE)
    copy = run({"variant": "softmax", "implementation": "sdpa"})
    assert report.peak_bytes == predict(copy.build(gpu=AMPERE), gpu=AMPERE).peak_bytes
    assert report.unverified == ()
    assert "flash_attn" not in sys.modules
    assert "bitsandbytes" in sys.modules


def test_autocast_frees_its_copies_of_weights_in_the_order_of_their_allocation():
    def build():
        layers = nn.ModuleList(nn.Linear(16, 16 * n) for n in range(1, 30))

        def step():
            with torch.autocast("cuda", torch.bfloat16):
                for layer in layers:
                    layer(torch.zeros(2, 16))

        return step

    _, events = follow(build, 1, find_gpu("A100-80GB"), 1, TODAY)
    allocated = {event.block: place for place, event in enumerate(events) if event.kind == "alloc"}
    bursts = [[*run] for frees, run in itertools.groupby(events, key=lambda event: event.kind == "free") if frees]
    places = [allocated[event.block] for event in max(bursts, key=len)]
    assert len(places) > 50
    assert places == sorted(places)
    assert [event.time_ms for event in events] == sorted(event.time_ms for event in events)
