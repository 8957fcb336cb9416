"""Modules given to ``torch.compile``: their memory op by op, to the byte; with fused kernels, by hand."""

import pytest
import torch
from support.tiers import slow_but
from support.tiny_models import config_file
from torch import nn

from memstudy.profiler import measure, predict
from memstudy.trainers.hub_model import HubModelRun

PARTITIONED = {"backend": "aot_eager_decomp_partition"}


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Dropout(dropout), nn.Linear(64, 32)
        )

    def forward(self, x):
        return x + self.layers(x)


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block(0.1)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def whole(model):
    return torch.compile(model, **PARTITIONED)


def in_place(model):
    model.compile(**PARTITIONED)
    return model


def by_layer(model):
    for block in model.blocks:
        block.compile(**PARTITIONED)
    return model


def trained(model, x):
    optimizer = torch.optim.AdamW(model.parameters())

    def step():
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@pytest.mark.parametrize("compiled", slow_but([in_place], [whole, in_place, by_layer]))
def test_op_by_op_the_prediction_is_the_measurement_to_the_byte(compiled):
    def build():
        torch.manual_seed(0)
        return trained(compiled(Blocks()), torch.randn(48, 32))

    measured = measure(build)
    torch._dynamo.reset()
    predicted = predict(build)
    # The blocks' rates of dropout differ: compiling the second one, Dynamo keeps a tensor with a float for the rate.
    kept = 8 if compiled is by_layer else 0
    others = predicted.peak_by_category["other"] + kept
    assert predicted.peak_by_category | {"other": others} == measured.peak_by_category
    assert tuple(peak + kept for peak in predicted.iteration_peaks) == measured.iteration_peaks
    assert predicted.fused.peak_bytes <= predicted.peak_bytes
    assert not predicted.unverified


class Chain(nn.Module):
    def forward(self, x):
        sine, cosine = x.sin(), x.cos()
        return ((sine + cosine) * (sine - cosine)).sum()


class Product(nn.Module):
    def forward(self, x):
        return (x.sin() @ x).cos()


def evaluated(module):
    def build():
        model, x = whole(module()), torch.randn(64, 64)

        def step():
            with torch.no_grad():
                model(x)

        return step

    return build


def test_fused_kernels_keep_in_registers_what_no_other_kernel_reads():
    report, size = predict(evaluated(Chain)), 4 * 64 * 64
    assert report.peak_bytes == 5 * size  # x, its sine and cosine, their sum and difference
    assert report.fused.peak_bytes == size + 4


def test_fused_kernels_write_what_a_product_reads_and_over_what_they_read_last():
    report, size = predict(evaluated(Product)), 4 * 64 * 64
    assert report.peak_bytes == 3 * size
    assert report.fused.peak_bytes == 3 * size  # x, its sine and the product, over which the result is written
    assert report.fused.timeline[-1][2]["other"] == size


@pytest.mark.slow
def test_a_budget_of_activations_is_kept(tmp_path):
    def tiny(*texts):
        model = config_file(tmp_path, "llama")
        run = HubModelRun(experiment="test", model=model, batch_size=8, seq_len=64, techniques=texts)
        return run.foretell().forward_end_by_category["activations"]

    saved = [tiny(text) for text in ("compile", "compile=0.3")]
    assert saved[1] < 0.6 * saved[0]


class Breaks(nn.Module):
    def forward(self, x):
        torch._dynamo.graph_break()
        return x.sum()


REFUSED = {
    "a graph break, whose memory is not predicted": (Breaks, {}, [4]),
    "a second length makes the shapes dynamic": (Chain, {}, [4, 6]),
    "mode='reduce-overhead' runs CUDA graphs": (Chain, {"mode": "reduce-overhead"}, [4]),
    "mode=None runs CUDA graphs": (Chain, {"options": {"triton.cudagraphs": True}}, [4]),
    "dynamic=True is not predicted": (Chain, {"dynamic": True}, [4]),
    "backend='cudagraphs' is not predicted; inductor and": (Chain, {"backend": "cudagraphs"}, [4]),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_is_not_predicted_is_refused_in_one_line(said):
    module, options, lengths = REFUSED[said]

    def build():
        model = torch.compile(module(), **options)
        return lambda: [model(torch.ones(length, 4, requires_grad=True)).backward() for length in lengths]

    with pytest.raises(ValueError, match=f"torch.compile: .*{said}") as error:
        predict(build)
    assert "\n" not in str(error.value)


def test_a_prediction_leaves_nothing_compiled_on_fake_tensors():
    model, x = in_place(Block()), torch.randn(4, 32)
    predict(evaluated(Chain))
    assert model(x).requires_grad
    assert predict(lambda: lambda: None).fused is None


class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 4096, bias=False, dtype=torch.bfloat16)

    def forward(self, x, labels):
        return nn.functional.cross_entropy(self.head(x).float(), labels)


def test_on_a_gpu_no_kernel_writes_the_logits_in_fp32():
    """Inductor computes them in the kernels that read them."""

    def peak(backend):
        def build():
            model = torch.compile(Loss(), backend=backend)
            x, labels = torch.randn(512, 16, dtype=torch.bfloat16), torch.randint(4096, (512,))
            return lambda: model(x, labels).backward()

        return predict(build, gpu="A100-80GB").peak_bytes

    logits = 512 * 4096 * 4
    assert peak("aot_eager_decomp_partition") - peak("inductor") > 0.99 * logits
