"""Training techniques: the loss that exact ones must keep, the memory that they save, and the allowed pairs."""

import copy
import itertools
import re

import pytest
import torch
import transformers
from support.techniques import ALONE, EXACT, HERE, INSTALLED
from support.tiers import cover, slow_but
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from memstudy import data, records
from memstudy.attention import Unavailable
from memstudy.kinds import parse_run
from memstudy.profiler import measure, predict
from memstudy.techniques import (
    TECHNIQUES,
    Accumulation,
    Bf16,
    Checkpointing,
    SelectiveCheckpointing,
    check_available,
    excluded,
    parse,
)
from memstudy.techniques.pruning import FewerHeads, Masks, Narrow, _feed_forwards
from memstudy.trainers.language_model import LanguageModelRun
from memstudy.trainers.trainer import make_trainer

pytestmark = pytest.mark.usefixtures("one_thread", "cache", "young_garbage_only")

STEPS = 20
# Techniques with the same operations in the same order, so that even rounding is equal.
IDENTICAL = {"checkpointing", "selective_checkpointing", "optimizer_in_backward"}
# Largest allowed distance of any of the 20 losses from the baseline's (5.60 falling to 4.82); seen: 0.0003 and 0.0001.
INEXACT = {
    "bf16": 0.003, "bf16_weights": 0.02, "pure_bf16": 0.02, "adamw_8bit": 0.001, "adamw_8bit_torchao": 0.01,
    "adamw_4bit_torchao": 0.2, "paged_adamw_8bit": 0.001,
}  # fmt: skip
# Other ways down: they must get there too, and need not stay close.
OTHER = {
    "adafactor": 0.3, "sgd": 0.1, "muon": 0.1, "galore=8": 0.1, "apollo=8": 0.1, "lora": 0.01,
    "masks=0.5": 0.3, "pruned=0.5": 0.3, "narrow=0.5": 0.3, "fewer_heads=0.5": 0.3, "dora": 0.01,
}  # fmt: skip


def of_config(family, config):
    torch.manual_seed(0)
    tokens = torch.randint(2, 100, (2, 8))
    given = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if config.is_encoder_decoder else {})
    return family(config).double().eval(), given


FAMILIES = {
    "decoder": lambda: (lm().make_model().double().eval(), {"input_ids": torch.randint(2, 100, (2, 8))}),
    "bert": lambda: of_config(
        transformers.BertForSequenceClassification,
        transformers.BertConfig(
            vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        ),
    ),
    "marian": lambda: of_config(
        transformers.MarianModel,
        transformers.MarianConfig(
            vocab_size=100, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, pad_token_id=0, decoder_start_token_id=0,
        ),
    ),
}  # fmt: skip


def here(cases):
    """The part of ``cases`` whose packages are installed."""
    return {text: case for text, case in cases.items() if text.partition("=")[0] in INSTALLED}


def lm(techniques=(), **changes):
    """A run of a small decoder, with matrices large enough for 8-bit states (4,096 elements)."""
    sizes = {"n_layers": 2, "hidden_size": 64, "n_heads": 4, "feed_forward": 128, "vocab_size": 300, "seq_len": 32}
    given = {"experiment": "test", "batch_size": 4, "measure_steps": 1, **sizes, **changes}
    return LanguageModelRun(**given, techniques=techniques)


def train(techniques, folder, steps=STEPS, **changes):
    """Loss of every step (4 digits), and loss on the validation split after the last step (all digits)."""
    known = data.load("miniature").content_hash
    changes = {"measure_steps": 0, "train_steps": steps, "eval_blocks": 4, **changes}
    result = lm(techniques, dataset="miniature", data_hash=known, **changes).execute(folder)
    return [loss for _, loss in result["curves"]["train_loss"]], result["metrics"]["validation_loss"]


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    """Train without techniques."""
    curve, validation = train((), tmp_path_factory.mktemp("baseline"))
    assert len(curve) == STEPS
    assert curve[-1] < curve[0] - 0.3  # so that equal curves mean something
    return curve, validation


# --- the loss


def test_every_technique_is_here():
    assert {text.partition("=")[0] for text in (*EXACT, *INEXACT, *OTHER)} & INSTALLED == set(HERE)
    assert {name for name in HERE if TECHNIQUES[name].exact} == {text.partition("=")[0] for text in EXACT}
    assert all(technique.summary for technique in TECHNIQUES.values())


@pytest.mark.parametrize("text", slow_but(cover(EXACT, lambda text: {text.partition("=")[0]}), EXACT))
def test_exact_techniques_keep_the_loss_to_rounding(text, baseline, tmp_path):
    curve, validation = train((text,), tmp_path)
    assert curve == pytest.approx(baseline[0], abs=1.01e-4)  # the curve has four digits
    assert validation == pytest.approx(baseline[1], rel=1e-6)  # seen: 1e-7
    if text.partition("=")[0] in IDENTICAL:
        assert (curve, validation) == baseline


def test_all_exact_techniques_at_once(baseline, tmp_path):
    for others in (("optimizer_in_backward",), ("accumulation=2",)):
        curve, validation = train(("selective_checkpointing", "chunked_loss", *others), tmp_path)
        assert curve == pytest.approx(baseline[0], abs=1.01e-4)
        assert validation == pytest.approx(baseline[1], rel=1e-6)


@pytest.mark.parametrize(("text", "distance"), here(INEXACT).items(), ids=here(INEXACT))
def test_inexact_techniques_stay_close(text, distance, baseline, tmp_path):
    curve, validation = train((text,), tmp_path)
    furthest = max(abs(a - b) for a, b in zip([*curve, validation], [*baseline[0], baseline[1]], strict=True))
    assert 0 < furthest < distance


@pytest.mark.parametrize(("text", "falls"), here(OTHER).items(), ids=here(OTHER))
def test_other_ways_lower_the_loss_too(text, falls, baseline, tmp_path):
    of_weights = TECHNIQUES[text.partition("=")[0]].group == "pruning"
    curve, _ = train((text,), tmp_path, learning_rate=0.3 if text == "sgd" else 1e-3)
    assert curve[0] == pytest.approx(baseline[0][0], abs=0.05 if of_weights else 1.01e-4)  # before the first update
    assert curve[-1] < curve[0] - falls


# --- the memory


@pytest.fixture(scope="module")
def plain():
    """Measure a step without techniques."""
    return measure(lm(batch_size=8).build())


def activations(report):
    return report.forward_end_by_category["activations"]


def gradients(report):
    return max(live["gradients"] for _, _, live in report.timeline)


def with_technique(text):
    for package in TECHNIQUES[text.partition("=")[0]].packages:
        pytest.importorskip(package)
    return measure(lm((text,), batch_size=8).build())


def test_bf16_keeps_smaller_activations(plain):
    report = with_technique("bf16")
    assert 0.5 < activations(report) / activations(plain) < 0.8  # softmax, norms and the loss stay fp32
    assert report.peak_bytes < plain.peak_bytes
    for category in ("parameters", "optimizer"):
        assert report.peak_by_category[category] == plain.peak_by_category[category]


def test_checkpointing_keeps_little_but_the_blocks_inputs(plain):
    report = with_technique("checkpointing")
    hidden = 4 * 8 * 32 * 64
    of_blocks = {name: size for name, size in report.modules.items() if ".h." in name}
    # Each block keeps its output (the next block's input), the random generator's state and the scale of the scores.
    assert sum(of_blocks.values()) == 2 * (hidden + 5056 + 8)
    assert activations(report) < 0.5 * activations(plain)
    assert report.peak_bytes < plain.peak_bytes


def test_checkpointing_every_second_block_is_in_the_middle(plain):
    every, second = (
        activations(measure(lm((text,), batch_size=8, n_layers=4).build()))
        for text in ("checkpointing", "checkpointing=2")
    )
    none = activations(measure(lm(batch_size=8, n_layers=4).build()))
    assert second - every == pytest.approx((none - every) / 2, rel=0.01)


def test_a_model_whose_blocks_are_not_known_says_so():
    model = lm().make_model()
    model.transformer.h = torch.nn.ModuleList()
    with pytest.raises(ValueError, match="checkpointing=2: DecoderLM recomputes all blocks or none"):
        Checkpointing(2).prepare(model)


def test_selective_checkpointing_keeps_more_with_its_budget(plain):
    kept = [activations(with_technique(f"selective_checkpointing={budget}")) for budget in (0, 0.25, 0.5, 0.75, 1)]
    assert kept[0] == activations(with_technique("checkpointing"))
    assert kept == sorted(kept)
    assert len(set(kept)) >= 4
    assert kept[-1] < activations(plain)


class Count(TorchDispatchMode):
    """Count the matrix products."""

    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        self.products += func.overloadpacket in (aten.mm, aten.addmm, aten.bmm)
        return func(*args, **(kwargs or {}))


def test_selective_checkpointing_recomputes_less_with_its_budget():
    def products(*techniques):
        step = lm(techniques).build()()
        step()  # the first step recomputes the first block whole, to make the plan
        with Count() as count:
            step()
        return count.products

    plain, full = products(), products("checkpointing")
    counts = [products(f"selective_checkpointing={budget}") for budget in (0, 0.25, 0.5, 0.75, 1)]
    # A block's products: qkv, scores, context, projection, two in the feed-forward. Recomputing stops before the last.
    assert full == plain + 2 * 5
    assert counts[0] == full
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == plain


def test_the_budget_is_kept():
    """Kept products stay within their share of bytes; with a budget of 1, only each block's last is not kept."""
    none, all_ = (activations(with_technique(f"selective_checkpointing={budget}")) for budget in (0, 1))
    tokens, heads = 8 * 32, 4
    products = 4 * tokens * (3 * 64 + 64 + 64 + 128)  # qkv, context, projection, feed-forward up
    products += 4 * 8 * heads * 32 * 32  # scores
    last = 4 * tokens * 64  # feed-forward down
    assert all_ - none == 2 * products
    for budget in (0.25, 0.5, 0.75):
        kept = activations(with_technique(f"selective_checkpointing={budget}"))
        assert kept - none <= 2 * budget * (products + last)


def test_accumulation_keeps_the_activations_of_a_part(plain):
    quarter = activations(measure(lm(batch_size=2).build()))
    report = with_technique("accumulation=4")
    assert activations(report) == pytest.approx(quarter, abs=64)
    assert report.peak_bytes < plain.peak_bytes


def test_chunked_loss_never_has_the_logits(plain):
    logits = 4 * 8 * 31 * 300
    report = with_technique("chunked_loss")
    assert activations(report) <= activations(plain) - logits + 4 * 300 * 64 + 4 * 8 * 32 * 64  # two gradients instead
    assert report.peak_bytes < plain.peak_bytes
    largest = max(b - a for a, b in itertools.pairwise(sum(live.values()) for _, _, live in report.timeline))
    assert largest < logits


def test_adamw_8bit_has_a_smaller_state(plain):
    report = with_technique("adamw_8bit")
    matrices = 2 * 64 * (3 * 64 + 64 + 2 * 128)  # two blocks: qkv, projection, feed-forward
    # Two moments of one byte instead of four, a scale of 4 B per block of 256, and different step counters.
    saved = plain.peak_by_category["optimizer"] - report.peak_by_category["optimizer"]
    assert saved == pytest.approx(2 * 3 * matrices, rel=0.05)
    assert report.peak_bytes < plain.peak_bytes


def test_paged_states_are_not_the_allocators():
    """On a GPU, the states of matrices from 100,000 elements on; the embedding has 320,000 and keeps 32-bit states."""
    sizes = {"vocab_size": 5000, "hidden_size": 64}
    whole, paged = (
        predict(lm((text,), **sizes).build(gpu="A100-40GB"), gpu="A100-40GB").most_by_category["optimizer"]
        for text in ("adamw_8bit", "paged_adamw_8bit")
    )
    assert whole - paged == pytest.approx(2 * 4 * 5000 * 64, rel=0.01)


BLOCK = (64 * 192, 64 * 64, 64 * 128, 128 * 64)  # qkv, projection, feed-forward up and down
ALL = 300 * 64 + 32 * 64 + 2 * (sum(BLOCK) + 192 + 64 + 128 + 64 + 4 * 64) + 2 * 64


def low_rank(moments):
    """Elements of ``moments`` moments at rank 8, and of the projection, over two blocks."""
    sides = [(64, 192), (64, 64), (64, 128), (128, 64)]
    return 2 * 8 * sum(moments * max(side) + min(side) for side in sides)


@pytest.mark.parametrize(
    ("text", "elements"),
    [
        ("sgd", 0),
        ("muon", 2 * ALL - 2 * sum(BLOCK)),
        ("galore=8", 2 * (ALL - 2 * sum(BLOCK)) + low_rank(2)),
        ("apollo=8", 2 * (ALL - 2 * sum(BLOCK)) + low_rank(2) + 8 + 1),  # 8 scales, and a new one beside an old one
        (
            "adafactor",  # first: a root mean square for each of 28 parameters, and a new one beside an old one
            28
            + 1
            + 300
            + 64
            + 32
            + 64
            + 2 * (64 + 192 + 64 + 64 + 64 + 128 + 128 + 64)
            + 2 * (192 + 64 + 128 + 64 + 4 * 64)
            + 2 * 64,
        ),
    ],
)
def test_an_optimizers_state_is_its_closed_form(text, elements):
    report = with_technique(text)
    state = max(live["optimizer"] for _, _, live in report.timeline)
    assert state == 4 * elements


def test_muon_and_adamw_beside_it_take_the_runs_rate(tmp_path):
    pytest.importorskip("pytorch_optimizer")
    run = lm(("muon",), learning_rate=0.004)
    trainer = make_trainer(run, run.make_model(), tmp_path, train_steps=1)
    assert [group["lr"] for group in trainer.create_optimizer().param_groups] == [0.004, 0.004]


@pytest.mark.parametrize(("text", "bits"), [("adamw_8bit_torchao", 8), ("adamw_4bit_torchao", 4)])
def test_low_bit_states_are_their_closed_form(text, bits):
    state = max(live["optimizer"] for _, _, live in with_technique(text).timeline)
    matrices = 300 * 64 + 2 * sum(BLOCK)  # each of at least 4,096 elements
    assert state == pytest.approx(
        2 * matrices * (bits / 8 + 4 / 256) + 2 * 4 * (ALL - matrices), rel=0.15
    )  # the tolerance is for tables


@pytest.mark.parametrize("text", ["bf16_weights", "pure_bf16"])
def test_bf16_weights_halve_everything_kept(text, plain):
    report = with_technique(text)
    for category in ("parameters", "optimizer"):
        assert report.peak_by_category[category] == pytest.approx(plain.peak_by_category[category] / 2, rel=0.01)
    assert gradients(report) == pytest.approx(gradients(plain) / 2, rel=0.01)


def test_masks_take_more_until_they_are_removed(plain):
    """A mask for every matrix, and the masked matrices, which are saved for backward."""
    matrices = 4 * 2 * sum(BLOCK)
    masked, removed = with_technique("masks=0.8"), with_technique("pruned=0.8")
    assert masked.peak_by_category["other"] - plain.peak_by_category["other"] == matrices
    assert activations(masked) - activations(plain) == matrices
    assert removed.peak_by_category == plain.peak_by_category


def test_narrow_layers_have_fewer_neurons_and_all_that_goes_with_them(plain):
    report = with_technique("narrow=0.75")
    gone = 2 * 96 * (64 + 64 + 1)  # in two blocks, each of 96 neurons' input weights, output weights and bias
    assert plain.peak_by_category["parameters"] - report.peak_by_category["parameters"] == 4 * gone
    assert report.peak_by_category["optimizer"] < plain.peak_by_category["optimizer"] - 8 * gone + 64
    assert activations(report) < activations(plain)


def test_the_largest_weights_are_kept():
    model = lm().make_model()
    block = model.transformer.h[0].mlp
    whole = {name: getattr(block, name).weight.detach().clone() for name in ("c_fc", "c_proj")}
    Masks(0.9).prepare(model)
    for name, before in whole.items():
        kept = getattr(block, name).weight != 0
        assert kept.sum() == round(0.1 * before.numel())
        assert before[kept].abs().min() >= before[~kept].abs().max()


@pytest.mark.parametrize("family", ["decoder", "bert", "marian"])
def test_a_narrow_model_is_the_model_without_the_neurons(family):
    """Equal to the model with zero output weights for the half of the neurons with the smallest weights."""
    model, tokens = FAMILIES[family]()
    narrow = copy.deepcopy(model)
    Narrow(0.5).prepare(narrow)
    assert sum(p.numel() for p in narrow.parameters()) < sum(p.numel() for p in model.parameters())
    for up, down in _feed_forwards(model):
        transposed = isinstance(up, Conv1D)
        made, read = (up.weight.T, down.weight) if transposed else (up.weight, down.weight.T)  # (neurons, ...) each
        smallest = (made.square().sum(1) + read.square().sum(1)).argsort()[: len(made) // 2]
        with torch.no_grad():
            read[smallest] = 0
    torch.testing.assert_close(narrow(**tokens)[0], model(**tokens)[0])


def test_half_of_the_heads_take_half_of_the_projections(plain):
    report = with_technique("fewer_heads=0.5")
    gone = 2 * (32 * 4 * 64 + 3 * 32)  # in two blocks, two heads of 16: q, k, v and output weights, q, k, v biases
    assert plain.peak_by_category["parameters"] - report.peak_by_category["parameters"] == 4 * gone
    assert activations(report) < activations(plain)


@pytest.mark.parametrize("family", ["decoder", "bert"])
def test_a_model_with_fewer_heads_is_the_model_without_them(family):
    """Equal to the model with zero output weights for the half of the heads with the smallest weights."""
    model, tokens = FAMILIES[family]()
    fewer = copy.deepcopy(model)
    FewerHeads(0.5).prepare(fewer)
    assert sum(p.numel() for p in fewer.parameters()) < sum(p.numel() for p in model.parameters())
    modules = dict(model.named_modules())
    attentions = [
        name for name, module in modules.items() if type(module).__name__ in ("GPT2Attention", "BertAttention")
    ]
    assert len(attentions) == 2
    for name in attentions:
        if family == "decoder":  # (in, out) weights, with the heads of q, then of k, then of v
            qkv, out = (modules[f"{name}.{part}"].weight for part in ("c_attn", "c_proj"))
            made, read = qkv.T.unflatten(0, (3, 4, 16)).transpose(0, 1), out.unflatten(0, (4, 16))
        else:
            qkv = [modules[f"{name}.self.{part}"].weight.unflatten(0, (2, 16)) for part in ("query", "key", "value")]
            made, read = torch.stack(qkv, 1), modules[f"{name}.output.dense"].weight.T.unflatten(0, (2, 16))
        smallest = (made.square().sum((1, 2, 3)) + read.square().sum((1, 2))).argsort()[: len(read) // 2]
        with torch.no_grad():
            read[smallest] = 0
    torch.testing.assert_close(fewer(**tokens)[0], model(**tokens)[0])


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: torch.nn.Linear(2, 2), r"the attention projections of Linear are not known"),
        (
            lambda: transformers.LlamaForCausalLM(
                transformers.LlamaConfig(
                    vocab_size=10, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                    intermediate_size=32,
                )
            ),
            r"fewer_heads=0\.5: the heads of a LlamaAttention share keys or a bias",
        ),
    ],
    ids=["unknown", "grouped"],
)  # fmt: skip
def test_heads_that_cannot_go_alone_stay(model, said):
    with pytest.raises(ValueError, match=said):
        FewerHeads(0.5).prepare(model())


def test_a_model_without_known_feed_forward_parts_says_so():
    with pytest.raises(ValueError, match=r"narrow=0\.5: no feed-forward part is known in Linear"):
        Narrow(0.5).prepare(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("text", ["onnxruntime", "int8", "tensorrt", "sparse=0.5", "semi_structured"])
def test_what_is_for_inference_is_refused_in_training(text):
    with pytest.raises(ValueError, match=f"technique '{text}' is for inference alone"):
        lm((text,))


def test_lora_has_gradients_and_states_of_its_own_matrices_alone():
    report = with_technique("lora=4")
    trained = 4 * 4 * 2 * sum(a + b for a, b in [(64, 192), (64, 64), (64, 128), (128, 64)])
    assert gradients(report) == trained
    assert max(live["optimizer"] for _, _, live in report.timeline) == pytest.approx(2 * trained, rel=0.02)


def test_optimizer_in_backward_has_few_gradients_at_once(plain):
    report = with_technique("optimizer_in_backward")
    parameters = plain.peak_by_category["parameters"]
    assert gradients(plain) == parameters
    # The embedding is also the head: its gradient is started first in backward and completed last.
    embedding, layer = 4 * 300 * 64, 4 * (128 * 64 + 128)
    assert gradients(report) <= embedding + 2 * layer < 0.5 * parameters
    assert report.peak_by_category["optimizer"] == plain.peak_by_category["optimizer"]


@pytest.fixture(scope="module")
def plain_on_a_gpu():
    return predict(lm().build(gpu="A100-40GB"), gpu="A100-40GB")


@pytest.mark.parametrize("name", sorted(ALONE))
def test_each_can_be_predicted_for_a_gpu(name, plain_on_a_gpu):
    report = predict(lm((name,)).build(gpu="A100-40GB"), gpu="A100-40GB")
    assert report.peak_bytes != plain_on_a_gpu.peak_bytes or name in ("tf32", "pruned", "optimizer_in_backward")


@pytest.mark.parametrize(
    "name",
    [
        "cfc8d9a0b475393c",  # bf16_weights
        "cb7b127d9423da65",  # adamw_8bit_torchao
        "3a369148a21995ee",  # adamw_4bit_torchao
        pytest.param("032ddd4030d656d9", marks=pytest.mark.slow),  # bf16_weights and adamw_8bit_torchao: Llama 3 8B
    ],
)
def test_torchaos_optimizers_are_predicted_alike_with_and_without_it(name):
    """The records were predicted with torchao's optimizers, and before cast weights' gradients counted as gradients."""
    record = records.read_record(*(records.ROOT / "results").glob(f"*/{name}.json"))
    run = parse_run(record["config"])
    assert any("torchao" in technique.packages for technique in run.of.parsed_techniques())
    found = run.of.foretell(run.gpu).scalars()
    assert found.pop("most_gradients_mib") >= record["metrics"]["most_gradients_mib"]
    assert found == {key: record["metrics"][key] for key in found}


def test_fp16_is_predicted_as_bf16_but_for_what_the_scaler_takes():
    """Autocast to fp16 or bf16 halves the same tensors; the scaler holds a scale, a counter and a found-inf flag."""
    of = {
        name: predict(lm((name,)).build(gpu="A100-40GB"), gpu="A100-40GB").forward_end_by_category
        for name in ("fp16", "bf16")
    }
    assert of["fp16"]["parameters"] == of["bf16"]["parameters"]
    scaler = 3 * 512
    assert (
        of["fp16"]["activations"] <= of["bf16"]["activations"] + scaler
    )  # softmax reads fp16 directly, bf16 through a copy


# --- pairs


def go_apart(pair):
    groups = [TECHNIQUES[name].group or name for name in pair]
    optimizers = [TECHNIQUES[name] for name in pair if TECHNIQUES[name].group == "optimizer"]
    return (
        groups[0] == groups[1]
        or set(pair) == {"accumulation", "optimizer_in_backward"}
        or ("optimizer_in_backward" in pair and any(technique.one_count_of_steps for technique in optimizers))
        or ("bf16_weights" in pair and not all(technique.rounds_stochastically for technique in optimizers))
    )


PAIRS = list(itertools.combinations(HERE, 2))
TOGETHER = [pair for pair in PAIRS if not go_apart(pair)]


@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(pair, marks=() if pair in cover(TOGETHER) else pytest.mark.slow, id="+".join(pair))
        for pair in TOGETHER
    ],
)
def test_pairs_train(pair, baseline, tmp_path):
    curve, validation = train(pair, tmp_path, steps=2, eval_blocks=1)
    of_another_kind = {text.partition("=")[0] for text in OTHER} | {"bf16_weights", "pure_bf16", "adamw_4bit_torchao"}
    assert curve == pytest.approx(baseline[0][:2], abs=0.2 if of_another_kind & set(pair) else 0.01)
    assert validation == pytest.approx(validation, abs=1)  # not NaN


@pytest.mark.parametrize("pair", [p for p in PAIRS if go_apart(p)], ids="+".join)
def test_excluded_pairs_are_refused(pair):
    for texts in (pair, pair[::-1]):
        with pytest.raises(ValueError, match=r"only one of kind|and so excludes"):
            parse(texts)
        assert excluded(texts)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["fp8"], "unknown technique 'fp8'; known: bf16,"),
        ([""], "unknown technique ''"),
        (["Bf16"], "unknown technique 'Bf16'"),
        (["bf16=1"], "'bf16' has no setting, but got '1'"),
        (["galore=8:2"], "'galore' has rank for settings, but got '8:2'"),
        (["lora=8:attention:bf16:1"], "'lora' has rank:targets:dtype for settings"),
        (["lora=attention"], "a number is needed"),
        (["dora=0"], "rank 0.0: a whole number from 1 is needed"),
        (["lora=8:attention:fp8"], "number format 'fp8': fp32, bf16, fp16 are known"),
        (["prompt=1.5"], "1.5 tokens: a whole number from 1 is needed"),
        (["lora", "dora"], "only one of kind 'adapters'"),
        (["nf4_weights=triple", "lora"], "scales 'triple': double or single is needed"),
        (["nf4_weights"], "quantised weights are frozen: add an adapter, as lora=16"),
        (["nf4_weights", "int8_weights", "lora"], "only one of kind 'weights'"),
        (["nf4_weights", "qlora"], "qlora quantises the weights and so excludes nf4_weights"),
        (["qlora", "fsdp"], "quantised weights are not divided among processes and so exclude fsdp"),
        (["convention=trl"], "a convention is for adapters: add one, as lora=16"),
        (["convention=axolotl", "lora"], "convention 'axolotl': uncast, peft, trl-0.13 and trl are known"),
        (["convention=trl", "bf16", "lora"], "only one of kind 'precision'"),
        (["prefix", "checkpointing"], "prefix hands keys and values to the blocks and so excludes checkpointing"),
        (["accumulation=two"], "'accumulation=two': a number is needed"),
        (["accumulation="], "a number is needed"),
        (["accumulation=0"], "a whole number from 1"),
        (["accumulation=-2"], "a whole number from 1"),
        (["accumulation=1.5"], "a whole number from 1"),
        (["accumulation=nan"], "a whole number from 1"),
        (["accumulation=inf"], "a whole number from 1"),
        (["checkpointing=0"], "a whole number from 1"),
        (["checkpointing=1.5"], "a whole number from 1"),
        (["galore=0"], "a whole number from 1 is needed"),
        (["apollo=nan"], "a whole number from 1 is needed"),
        (["masks=1"], "a share to remove is needed, between 0 and 1"),
        (["sparse=0"], "a share to remove is needed, between 0 and 1"),
        (["fewer_heads=1"], "a share to remove is needed, between 0 and 1"),
        (["narrow=nan"], "a share to remove is needed, between 0 and 1"),
        (["masks=0.5", "narrow=0.5"], "only one of kind 'pruning'"),
        (["compile=1.1"], "a share from 0 to 1 is needed"),
        (["compile=nan"], "a share from 0 to 1 is needed"),
        (["compile", "int8"], "only one of kind 'engine'"),
        (["lora=0.5"], "a whole number from 1 is needed"),
        (["muon", "optimizer_in_backward"], "muon counts steps for all parameters together"),
        (["bf16_weights", "sgd"], "sgd does not round stochastically"),
        (["fsdp", "adafactor"], "adafactor needs whole parameters and so excludes fsdp"),
        (["galore", "fsdp"], "galore needs whole parameters and so excludes fsdp"),
        (["sgd", "muon"], "only one of kind 'optimizer'"),
        (["bf16", "bf16_weights"], "only one of kind 'precision'"),
        (["selective_checkpointing=1.1"], "a share, 0 to 1"),
        (["selective_checkpointing=-0.1"], "a share, 0 to 1"),
        (["selective_checkpointing=nan"], "a share, 0 to 1"),
        (["bf16", "bf16"], "only one of kind 'precision'"),
        (["bf16", "tf32"], "only one of kind 'precision'"),
        (["accumulation=2", "accumulation=4"], "only one of kind 'Accumulation'"),
        (["chunked_loss", "chunked_loss"], "only one of kind 'ChunkedLoss'"),
    ],
)
def test_bad_techniques_are_refused(texts, said):
    with pytest.raises(ValueError, match=re.escape(said)) as refusal:
        parse(texts)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", sorted(set(TECHNIQUES) - INSTALLED))
def test_what_needs_a_package_says_so(name):
    with pytest.raises(Unavailable, match=rf"^{name} needs \w+, which is not installed: pip install"):
        check_available(parse((name,)))


def test_text_becomes_the_technique():
    assert parse(["bf16", "accumulation=8", "selective_checkpointing=0.25"]) == (
        Bf16(),
        Accumulation(8),
        SelectiveCheckpointing(0.25),
    )
    assert parse([]) == ()
    assert parse(["selective_checkpointing"]) == (SelectiveCheckpointing(),)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", [name for name, t in TECHNIQUES.items() if t.in_training and t.requires])
def test_what_needs_cuda_says_so(name, tmp_path):
    with pytest.raises(Unavailable, match=f"^{name} needs a CUDA device"):
        lm((name,)).build()
    with pytest.raises(Unavailable, match="needs a CUDA device"):
        train((name,), tmp_path)


@pytest.mark.gpu
def test_offloading_keeps_the_loss_and_frees_the_device(baseline, tmp_path):
    plain, offloaded = (measure(lm(t, batch_size=8).build()) for t in ((), ("offload_activations",)))
    assert activations(offloaded) < 0.5 * activations(plain)
    curve, _ = train(("offload_activations",), tmp_path / "offloaded")
    assert curve == pytest.approx(train((), tmp_path / "plain")[0], abs=1.01e-4)


@pytest.mark.gpu
def test_tf32_stays_close(tmp_path):
    curve, _ = train(("tf32",), tmp_path / "tf32")
    assert curve == pytest.approx(train((), tmp_path / "plain")[0], abs=0.01)
