"""Weights in 4 and 8 bits by bitsandbytes: predicted to the byte on this CPU; what its CUDA kernels allocate."""

import functools

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers as hf
from bitsandbytes.backends import utils
from bitsandbytes.backends.default import ops
from torch import nn
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from memstudy.profiler import measure, predict
from memstudy.profiler.cuda import Semantics
from memstudy.profiler.cuda.bitsandbytes import gemm_4bit_until_0_49
from memstudy.profiler.internals import FakeTensor

pytestmark = [
    pytest.mark.usefixtures("one_thread", "young_garbage_only"),
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.utils.checkpoint. the use_reentrant:UserWarning"),
]

SIZES = {
    "vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "max_position_embeddings": 48, "num_key_value_heads": 2, "use_cache": False,
}  # fmt: skip
AMPERE = "A100-80GB"


@pytest.fixture(scope="module", autouse=True)
def tables():
    """Let bitsandbytes make its tables of the formats, which it keeps for the process."""
    bnb.functional.quantize_4bit(torch.randn(64, 64), quant_type="nf4", compress_statistics=True)
    bnb.functional.quantize_4bit(torch.randn(64, 64), quant_type="fp4")


def in_four_bits(layer, **settings):
    """`layer` as a user builds it by hand; it is quantised when it moves to its device."""
    made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=layer.bias is not None, **settings)
    kept = {name: value for name, value in settings.items() if name != "compute_dtype"}
    made.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, module=made, **kept)
    return made


def in_eight_bits(layer, threshold):
    made = bnb.nn.Linear8bitLt(
        layer.in_features, layer.out_features, bias=False, has_fp16_weights=False, threshold=threshold
    )
    made.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    return made


def by_hand(replace, **settings):
    """A change of a model: each of its linear layers but the head, replaced."""

    def change(model):
        for name, layer in list(model.named_modules()):
            if isinstance(layer, nn.Linear) and name != "lm_head":
                model.set_submodule(name, replace(layer, **settings))
        del layer
        model.to("cpu")
        model.is_loaded_in_4bit = True

    return change


def by_transformers(model):
    """As `from_pretrained` does with a `BitsAndBytesConfig`, with random weights."""
    config = hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    replace_with_bnb_linear(model, ["lm_head"], config)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = torch.randn(module.out_features, module.in_features)
            kept = vars(module.weight)
            module.weight = bnb.nn.Params4bit(weight, requires_grad=False, **kept).to("cpu")


def training(change, *, dtype=torch.float32, prepare=None, adapters=None, config=None, batch=4, seq_len=32):
    """Two updates of LoRA adapters on a quantised Llama."""

    def build():
        torch.manual_seed(0)
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        model = hf.LlamaForCausalLM(config or hf.LlamaConfig(**SIZES))
        torch.set_default_dtype(default)
        change(model)
        if prepare is not None:
            model = peft.prepare_model_for_kbit_training(model, **prepare)
        lora = {"r": 4, "target_modules": ["q_proj", "v_proj"]} | (adapters or {})
        model = peft.get_peft_model(model, peft.LoraConfig(**lora)).train()
        updates = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        tokens = torch.randint(2, model.config.vocab_size, (batch, seq_len))

        def step():
            model(input_ids=tokens, labels=tokens).loss.backward()
            updates.step()
            updates.zero_grad()

        return step

    return build


NF4, BF16 = {"quant_type": "nf4"}, torch.bfloat16
PLAIN, CHECKPOINTS = {"use_gradient_checkpointing": False}, {"use_gradient_checkpointing": True}
LOOPS = {
    "nf4": training(by_hand(in_four_bits, **NF4)),
    "nf4-once": training(by_hand(in_four_bits, **NF4, compress_statistics=False)),
    "fp4": training(by_hand(in_four_bits, quant_type="fp4")),
    "bf16": training(by_hand(in_four_bits, **NF4, compute_dtype=BF16), dtype=BF16),
    "prepared": training(by_hand(in_four_bits, **NF4, compute_dtype=BF16), dtype=BF16, prepare=PLAIN),
    "checkpointing": training(by_hand(in_four_bits, **NF4), prepare=CHECKPOINTS),
    "dora": training(by_hand(in_four_bits, **NF4), adapters={"use_dora": True}),
    "transformers": training(by_transformers),
    "8-bit": training(by_hand(in_eight_bits, threshold=0.0)),
    "8-bit-with-threshold": training(by_hand(in_eight_bits, threshold=6.0)),
}


@pytest.mark.parametrize("build", LOOPS.values(), ids=LOOPS)
def test_the_predicted_peaks_are_the_measured_to_the_byte(build):
    measured, predicted = measure(build), predict(build)
    assert predicted.peak_by_category == measured.peak_by_category
    assert predicted.peak_by_phase == measured.peak_by_phase
    assert predicted.iteration_peaks == measured.iteration_peaks
    assert predicted.forward_end_by_category == measured.forward_end_by_category


@pytest.mark.parametrize("gpu", [None, AMPERE])
def test_the_first_prediction_of_a_process_leaves_no_fake_table(gpu, monkeypatch):
    monkeypatch.setattr(bnb.functional, "name2qmap", {})
    monkeypatch.setattr(utils, "_code_4bit_cache", {})
    monkeypatch.setattr(ops, "_get_4bit_quantize_bounds", functools.cache(ops._get_4bit_quantize_bounds.__wrapped__))
    predict(LOOPS["nf4"], gpu=gpu)
    tables = [*bnb.functional.name2qmap.values(), *utils._code_4bit_cache.values()]
    tables += ops._get_4bit_quantize_bounds("nf4", torch.device("cpu"))
    assert not any(isinstance(table, FakeTensor) for table in tables)
    layer = in_four_bits(nn.Linear(64, 64), quant_type="nf4").to("cpu")
    assert type(layer.weight) is bnb.nn.Params4bit
    assert layer(torch.ones(2, 64)).isfinite().all()


# --- on CUDA


def at_rest(report):
    """Bytes allocated after the last step."""
    return sum(report.timeline[-1][2].values())


MISTRAL = {
    "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "intermediate_size": 14336, "num_key_value_heads": 8, "use_cache": False,
}  # fmt: skip
ATTENTION = {"r": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}


def test_mistral_7b_in_four_bits_is_at_rest_what_an_a100_had():
    """fms-acceleration, scripts/benchmarks/refs/a100_80gb.csv: QLoRA of 4 x 4,096 tokens, by bitsandbytes 0.43.

    Since 0.50, each weight has its own copy of the nested code (functional.py, ``quantize_blockwise``); three tensors
    of tokens were the batch there, one is here. An allocator rounds each of the thousands of tensors.
    """
    change = by_hand(in_four_bits, **NF4, compute_dtype=BF16, device="meta")
    build = training(
        change, dtype=BF16, adapters=ATTENTION, config=hf.LlamaConfig(**MISTRAL), batch=4, seq_len=4096
    )  # fmt: skip
    weights, nested_code, tokens = 32 * 7, 1024, 8 * 4 * 4096
    rest = at_rest(predict(build, gpu=AMPERE)) - weights * nested_code + 2 * tokens
    assert rest == pytest.approx(4_306_496_512, rel=1e-5)


@functools.cache
def one_product(tokens, semantics=None, double=True):
    """The most that a layer has in a step without gradients beyond what is at rest, and what is unverified."""

    def build():
        layer = in_four_bits(
            nn.Linear(4096, 8192, bias=False, dtype=BF16), **NF4, compress_statistics=double, compute_dtype=BF16
        )
        x = torch.empty(tokens, 4096, dtype=BF16)
        layer.to("cpu")

        def step():
            with torch.no_grad():
                layer(x)

        return step

    report = predict(build, gpu=AMPERE, semantics=semantics or Semantics(workspace_bytes=lambda gpu: 0))
    return report.iteration_peaks[-1] - at_rest(report), report.unverified


WEIGHT, SCALES = 2 * 4096 * 8192, 4 * 4096 * 8192 // 64


def test_a_product_of_few_tokens_makes_only_its_result():
    assert one_product(4) == (2 * 4 * 8192, ())


def test_a_product_of_many_tokens_makes_the_whole_weight():
    """The scales are dequantised, then shifted."""
    assert one_product(2048) == (2 * 2048 * 8192 + WEIGHT + 2 * SCALES, ())
    assert one_product(2048, double=False) == (2 * 2048 * 8192 + WEIGHT, ())


def test_in_between_the_larger_way_is_named():
    assert one_product(512) == (
        2 * 512 * 8192 + WEIGHT + 2 * SCALES,
        ("bitsandbytes::gemm_4bit of 5 to 1,536 tokens (counted with the whole weight)",),
    )


def test_bitsandbytes_0_49_shifted_the_scales_in_place():
    before = Semantics(workspace_bytes=lambda gpu: 0, gemm_4bit=gemm_4bit_until_0_49)
    assert one_product(2048, before)[0] == 2 * 2048 * 8192 + WEIGHT + SCALES
    assert one_product(4, before)[0] == 2 * 4 * 8192 + WEIGHT + SCALES
    assert one_product(1, before)[0] == 2 * 8192


def test_an_8bit_product_is_int32_then_fp16_on_cuda():
    """The weight in fp16 for the gradient is CUDA's way; the CPU would make the weight in the forward pass."""

    def build():
        layer = in_eight_bits(nn.Linear(4096, 8192, bias=False), threshold=6.0).to("cpu")
        x = torch.empty(512, 4096, dtype=torch.float16)

        def step():
            with torch.no_grad():
                layer(x)

        return step

    report = predict(build, gpu=AMPERE)
    quantised, stats, int32, fp16 = 512 * 4096, 4 * 512, 4 * 512 * 8192, 2 * 512 * 8192
    assert report.iteration_peaks[-1] - at_rest(report) == quantised + stats + int32 + fp16
    assert report.unverified == ("outliers in bitsandbytes' 8-bit products (none assumed)",)
