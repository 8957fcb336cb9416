"""The predicted peak equals the CPU allocator's peak to the byte: architectures × settings.

Each model is tiny, with random weights (two layers, its config's own dropout), and takes two updates. Reformer's
blocks are reversible and exclude checkpointing; the chunked loss is for decoders that predict the next token.
Longformer predicts masked tokens, so that its attention is local for any data.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from bitsandbytes.optim import AdamW8bit  # if first made under fake tensors, its tables would stay fake
from support.tiers import cover, slow_but
from torch.utils.checkpoint import checkpoint
from transformers.optimization import Adafactor

from memstudy.attention import ATTENTION
from memstudy.huggingface.convert import convert_attention
from memstudy.huggingface.decoder import decoder
from memstudy.profiler import measure, predict
from memstudy.techniques import Checkpointing, ChunkedLoss

pytestmark = pytest.mark.usefixtures("one_thread", "young_garbage_only")


VOCAB, LABELS, ROWS = 200, 3, 4
ENCODER = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 48, "num_labels": LABELS,
}  # fmt: skip
LLAMA = ENCODER | {"num_key_value_heads": 2, "use_cache": False}


def t5():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    config = hf.T5Config(vocab_size=VOCAB, decoder_start_token_id=0, use_cache=False, **sizes)
    return hf.T5ForConditionalGeneration(config)


def bart():
    sides = ("encoder", "decoder")
    sizes = {f"{s}_layers": 1 for s in sides} | {f"{s}_attention_heads": 4 for s in sides}
    sizes |= {f"{s}_ffn_dim": 64 for s in sides} | {"d_model": 32, "max_position_embeddings": 48}
    return hf.BartForConditionalGeneration(hf.BartConfig(vocab_size=VOCAB, use_cache=False, **sizes))


def reformer():
    config = hf.ReformerConfig(
        vocab_size=VOCAB, hidden_size=32, num_attention_heads=4, attention_head_size=8, feed_forward_size=64,
        attn_layers=["local", "lsh"], axial_pos_shape=[4, 8], axial_pos_embds_dim=[16, 16], num_buckets=4,
        local_attn_chunk_length=8, lsh_attn_chunk_length=8, max_position_embeddings=48, is_decoder=True,
        use_cache=False,
    )  # fmt: skip
    return hf.ReformerModelWithLMHead(config)


# The model's constructor, and its inputs: tokens with a class, tokens that are also the labels (few for Mamba, which
# loops over tokens), or images.
MODELS = {
    "bert": (lambda: hf.BertForSequenceClassification(hf.BertConfig(**ENCODER)), "class"),
    "roberta": (lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**ENCODER)), "class"),
    "distilbert": (
        lambda: hf.DistilBertForSequenceClassification(
            hf.DistilBertConfig(vocab_size=VOCAB, dim=32, n_layers=2, n_heads=4, hidden_dim=64, num_labels=LABELS)
        ),
        "class",
    ),
    "longformer": (
        lambda: hf.LongformerForMaskedLM(hf.LongformerConfig(**ENCODER, attention_window=8)), "tokens",
    ),
    "gpt2": (
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=48, use_cache=False)
        ),
        "tokens",
    ),
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)), "tokens"),
    "mistral": (lambda: hf.MistralForCausalLM(hf.MistralConfig(**LLAMA, sliding_window=8)), "tokens"),
    "decoder": (
        lambda: decoder(
            vocab_size=VOCAB, n_layers=2, hidden_size=32, n_heads=4, feed_forward=64, max_len=48,
            attention=ATTENTION["softmax"](),
        ),
        "tokens",
    ),
    "mamba": (
        lambda: hf.MambaForCausalLM(
            hf.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4, use_cache=False)
        ),
        "few tokens",
    ),
    "reformer": (reformer, "tokens"),
    "t5": (t5, "tokens"),
    "bart": (bart, "tokens"),
    "vit": (
        lambda: hf.ViTForImageClassification(
            hf.ViTConfig(image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                         intermediate_size=64, num_labels=LABELS)
        ),
        "images",
    ),
}  # fmt: skip


def adamw_8bit(parameters):
    return AdamW8bit(parameters, lr=1e-3)


def adafactor(parameters):
    """Adafactor with the settings of `Trainer` for `optim="adafactor"`."""
    return Adafactor(parameters, lr=1e-3, scale_parameter=False, relative_step=False)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3)


SETTINGS = {
    "fp32": {},
    "bf16": {"autocast": True},
    "checkpointing": {"techniques": (Checkpointing(),)},
    "accumulation": {"parts": 2},
    "adafactor": {"optimizer": adafactor},
    "adamw_8bit": {"optimizer": adamw_8bit},
    "chunked_loss": {"techniques": (ChunkedLoss(),)},
}


def batch(given):
    if given == "images":
        return {"pixel_values": torch.randn(ROWS, 3, 16, 16), "labels": torch.randint(LABELS, (ROWS,))}
    tokens = torch.randint(2, VOCAB, (ROWS, 8 if given == "few tokens" else 32))
    return {"input_ids": tokens, "labels": torch.randint(LABELS, (ROWS,)) if given == "class" else tokens}


def training(make_model, given, *, autocast=False, techniques=(), parts=1, optimizer=adamw):
    def make():
        torch.manual_seed(0)
        model = make_model().train()
        for technique in techniques:
            technique.prepare(model)
        updates = optimizer(model.parameters())
        pieces = zip(*([(k, p) for p in v.chunk(parts)] for k, v in batch(given).items()), strict=True)
        pieces = [dict(piece) for piece in pieces]

        def step():
            for piece in pieces:
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = model(**piece)["loss"] / parts
                loss.backward()
                del loss
            updates.step()
            updates.zero_grad()

        return step

    return make


def fits(model, setting):
    if setting == "chunked_loss":
        return model in ("gpt2", "llama", "mistral", "decoder", "mamba")
    return (model, setting) != ("reformer", "checkpointing")


CASES = [(model, setting) for model in MODELS for setting in SETTINGS if fits(model, setting)]
EXACT = [case for case in CASES if case[1] != "bf16"]


@pytest.mark.parametrize(("model", "setting"), slow_but(cover(EXACT), EXACT))
def test_the_predicted_peaks_are_the_measured_to_the_byte(model, setting):
    make = training(*MODELS[model], **SETTINGS[setting])
    measured, predicted = measure(make), predict(make)
    assert predicted.peak_bytes == measured.peak_bytes
    assert predicted.peak_by_category == measured.peak_by_category
    assert predicted.peak_by_phase == measured.peak_by_phase
    assert predicted.iteration_peaks == measured.iteration_peaks
    assert predicted.forward_end_by_category == measured.forward_end_by_category


def a_layer(config, is_causal):
    def make():
        torch.manual_seed(0)
        layer = config.module(32, 4, config, is_causal=is_causal)
        updates, tokens = adamw(layer.parameters()), torch.randn(ROWS, 40, 32)

        def step():
            layer(tokens).square().sum().backward()
            updates.step()
            updates.zero_grad()

        return step

    return make


# Settings small enough that 40 tokens take the variant's own path.
LAYERS = [
    ATTENTION[variant](**settings)
    for variant, settings in {
        "softmax": {}, "window": {"window": 8}, "linformer": {"rank": 6, "max_len": 48}, "lowrank": {"rank": 6},
        "nystrom": {"landmarks": 6}, "lsh": {"num_hashes": 3, "chunk_length": 8}, "memsizer": {},
        "performer": {"features": 10},
    }.items()
]  # fmt: skip


def test_every_variant_has_its_layer_here():
    assert {config.name for config in LAYERS} == set(ATTENTION)


@pytest.mark.parametrize("config", LAYERS, ids=lambda config: config.name)
def test_a_layer_of_each_variant(config):
    for is_causal in config.causal:
        make = a_layer(config, is_causal)
        measured, predicted = measure(make), predict(make)
        assert predicted.peak_bytes == measured.peak_bytes
        assert predicted.peak_by_category == measured.peak_by_category
        assert predicted.peak_by_phase == measured.peak_by_phase
        assert predicted.iteration_peaks == measured.iteration_peaks


@pytest.mark.parametrize(
    "config", [config for config in LAYERS if config.name in ("linformer", "lowrank")], ids=lambda config: config.name
)
def test_a_model_that_is_converted_in_building_it(config):
    """No rule covers LAPACK's scratch for decomposing the weights (lowrank), which is part of building."""
    make = training(lambda: convert_attention(MODELS["bert"][0](), config), "class")
    measured, predicted = measure(make), predict(make)
    assert predicted.peak_bytes == measured.peak_bytes
    assert predicted.iteration_peaks == measured.iteration_peaks


def rows(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype, requires_grad=dtype.is_floating_point)


def attention(queries, keys, dtype=torch.float32):
    query, key = rows(2, 3, queries, 8, dtype=dtype), rows(2, 3, keys, 8, dtype=dtype)
    return lambda: F.scaled_dot_product_attention(query, key, key).sum().backward()


def layer_norm(dtype, weight_dtype):
    x, weight, bias = rows(5, 16, dtype=dtype), rows(16, dtype=weight_dtype), rows(16, dtype=weight_dtype)
    return lambda: F.layer_norm(x, (16,), weight, bias).sum().backward()


def backward_of_a_sum(function):
    """A step whose gradient is one expanded number, since the loss is a sum."""
    x = rows(9, 16)
    return lambda: function(x).sum().backward()


def recurrent(layer):
    x = torch.randn(5, 3, 16)
    return lambda: layer(x)[0].sum().backward()


def nested_numbers():
    x = rows(9, 16)
    return lambda: (2.0 * (x * 0.5 + 1) / 3).sum().backward()


def numbers_in_a_graph_that_is_kept():
    x, kept = rows(9, 16), []

    def step():
        y = (x * 0.5).sum()
        y.backward(retain_graph=True)
        kept[:] = [y]  # keeps the graph alive

    return step


def numbers_in_a_graph_that_is_dropped():
    x = rows(9, 16)

    def step():
        y = x * 0.5
        del y
        return torch.ones(3)

    return step


def checkpointed():
    x = rows(9, 16)
    return lambda: checkpoint(lambda x: (x * 0.5).tanh() * 3, x, use_reentrant=False).sum().backward()


def op(function, *shapes_and_dtypes):
    """Make the tensors, then apply `function` to them in the step, outside autograd."""

    def make():
        tensors = [rows(*shape, dtype=dtype).detach() for *shape, dtype in shapes_and_dtypes]
        return lambda: function(*tensors)

    return make


BF16, INT, BOOL = torch.bfloat16, torch.int64, torch.bool
FP32, FP64 = torch.float32, torch.float64
RULES = {
    "number": op(lambda x: x * 0.5, (9, FP32)),
    "number-bf16": op(lambda x: x * 0.5, (9, BF16)),
    "number-fp64": op(lambda x: x * 0.5, (9, FP64)),
    "number-int": op(lambda x: x + 1, (9, INT)),
    "number-in-place": op(lambda x: x.div_(3), (9, FP32)),
    "number-reversed": op(lambda x: 1 - x, (9, FP32)),
    "number-compared": op(lambda x: x < 0.5, (9, FP32)),
    "quotient-of-ints": op(lambda x: x / 3, (9, INT)),
    "promotion": op(torch.add, (9, FP32), (9, BF16)),
    "promotion-in-place": op(lambda x, y: x.mul_(y), (9, BF16), (9, FP32)),
    "promotion-of-a-scalar": op(torch.mul, (9, FP32), (FP64,)),
    "promotion-broadcast": op(torch.maximum, (4, 9, FP32), (9, BF16)),
    "foreach": op(lambda x, y: torch._foreach_add_([x, y], 1), (9, FP32), (3, FP32)),
    "sum-of-bools": op(lambda x: x.sum(-1), (9, 5, BOOL)),
    "sum-in-fp32": op(lambda x: x.sum(-1, dtype=FP32), (9, 5, BF16)),
    "cumsum": op(lambda x: x.cumsum(-1), (9, 5, BOOL)),
    "mean": op(lambda x: x.mean(-1), (9, 5, FP32)),
    "mean-in-fp32": op(lambda x: x.mean(-1, dtype=FP32), (9, 5, BF16)),
    "safe-softmax": op(lambda x: torch._safe_softmax(x, -1), (2, 9, 5, FP32)),
    "logsumexp": op(lambda x: x.logsumexp(-1), (9, 5, FP32)),
    "sort": op(lambda x: x.sort(-1), (9, 5, FP32)),
    "sort-ints": op(lambda x: x.argsort(-1), (9, 5, INT)),
    "layer-norm": lambda: layer_norm(FP32, FP32),
    "layer-norm-bf16": lambda: layer_norm(BF16, BF16),
    "layer-norm-mixed": lambda: layer_norm(BF16, FP32),
    "attention": lambda: attention(20, 24),
    "attention-192": lambda: attention(192, 600),
    "attention-768": lambda: attention(768, 24),
    "softmax-of-a-transposed": op(lambda x: x.t().softmax(-1), (9, 5, FP32)),
    "log-softmax-of-a-transposed": op(lambda x: x.t().log_softmax(-1), (9, 5, FP32)),
    "softmax-of-a-sum": lambda: backward_of_a_sum(lambda x: x.softmax(-1)),
    "log-softmax-of-a-sum": lambda: backward_of_a_sum(lambda x: x.log_softmax(-1)),
    "layer-norm-of-a-transposed": op(lambda x: F.layer_norm(x.t(), (9,)), (9, 5, FP32)),
    "embedding-of-a-sum": lambda: backward_of_a_sum(lambda x: F.embedding(torch.tensor([1, 1, 2]), x)),
    "saved-numbers": nested_numbers,
    "saved-numbers-kept": numbers_in_a_graph_that_is_kept,
    "saved-numbers-dropped": numbers_in_a_graph_that_is_dropped,
    "checkpointed": checkpointed,
    "lstm": lambda: recurrent(torch.nn.LSTM(16, 32)),
    "lstm-deep": lambda: recurrent(torch.nn.LSTM(16, 32, num_layers=2, bidirectional=True, bias=False)),
    "lstm-without-gradients": lambda: torch.no_grad()(partial(torch.nn.LSTM(16, 32), rows(5, 3, 16))),
    "convolution": lambda: backward_of_a_sum(lambda x: F.conv1d(x[None], rows(4, 9, 3))),
}


@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
def test_each_rule_alone(make):
    measured, predicted = measure(make), predict(make)
    assert predicted.peak_by_phase == measured.peak_by_phase
    assert predicted.iteration_peaks == measured.iteration_peaks


@pytest.mark.parametrize(
    "make", [lambda: layer_norm(FP32, FP32), lambda: attention(20, 24)], ids=["layer-norm", "attention"]
)
def test_each_thread_has_its_buffer(make):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        measured, predicted = measure(make), predict(make)
    finally:
        torch.set_num_threads(threads)
    assert predicted.peak_by_phase == measured.peak_by_phase
    assert predicted.peak_bytes > predict(make).peak_bytes


def longformer(chosen):
    """A step of Longformer, whose tokens that ``chosen`` gives attend to all others."""

    def make():
        torch.manual_seed(0)
        model = hf.LongformerForSequenceClassification(hf.LongformerConfig(**ENCODER, attention_window=8))
        tokens = batch("class") | {"global_attention_mask": chosen().expand(ROWS, 32)}
        return lambda: model(**tokens).loss.backward()

    return make


@pytest.mark.parametrize("global_tokens", [0, 1])
def test_tokens_that_the_step_itself_chooses_are_followed(global_tokens):
    make = longformer(lambda: torch.arange(32) < global_tokens)
    assert predict(make).peak_by_phase == measure(make).peak_by_phase


def test_what_only_the_data_can_say_is_taken_for_no():
    """Longformer asks whether any token is global; a value that a layer computes is not known."""
    make = longformer(lambda: torch.nn.Linear(1, 32)(torch.ones(1)) > -100)
    assert predict(make).peak_bytes < measure(make).peak_bytes


@pytest.mark.parametrize("model", slow_but(["gpt2", "vit"], MODELS))
def test_the_predicted_peak_in_bf16(model):
    """oneDNN's scratch depends on the processor: with AVX-512, it is part of the peak of ViT."""
    make = training(*MODELS[model], **SETTINGS["bf16"])
    assert predict(make).iteration_peaks == measure(make).iteration_peaks


PICKS = {
    "gather": lambda values, rows: values.gather(1, rows.expand(-1, 5)),
    "index": lambda values, rows: values[rows[:, 0]],
    "index_select": lambda values, rows: values.index_select(0, rows[:, 0]),
    "take": lambda values, rows: values.take(rows),
    "max": lambda values, rows: values.max(1)[0],
    "topk": lambda values, rows: values.topk(3)[0],
    "sort": lambda values, rows: values.sort(1)[0],
}


@pytest.mark.parametrize("pick", PICKS)
def test_the_backward_of_a_pick_writes_into_one_gradient(pick):
    """Autograd's formulas take ops out of place for subclasses of tensors, as fake tensors are, and else in place."""

    def build():
        values = torch.randn(300, 200, requires_grad=True)
        rows = torch.randint(200, (300, 1))

        def step():
            values.grad = None
            PICKS[pick](values, rows).sum().backward()

        return step

    assert abs(predict(build).peak_bytes - measure(build).peak_bytes) <= 4  # a scalar's life
