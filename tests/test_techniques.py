"""The training levers: what they may not change (the loss), what they must (the memory), and what goes with what."""

import itertools
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memstudy import data
from memstudy.attention import Unavailable
from memstudy.memory import measure
from memstudy.techniques import TECHNIQUES, Accumulation, Bf16, SelectiveCheckpointing, parse
from memstudy.trainers import LanguageModelRun, build, execute

pytestmark = pytest.mark.usefixtures("one_thread", "cache")

STEPS = 20
HERE = sorted(name for name, technique in TECHNIQUES.items() if not technique.requires)
EXACT = [
    "accumulation=2",
    "accumulation=4",
    "checkpointing",
    "selective_checkpointing=0",
    "selective_checkpointing",
    "selective_checkpointing=1",
    "chunked_loss",
    "optimizer_in_backward",
]
# The same operations in the same order: no rounding either.
IDENTICAL = {"checkpointing", "selective_checkpointing", "optimizer_in_backward"}
# How far the loss of any of the 20 steps may be from the baseline's (5.60 falling to 4.82); seen: 0.0003 and 0.0001.
INEXACT = {"bf16": 0.003, "adamw_8bit": 0.001}


def lm(techniques=(), **changes):
    """A run of a small decoder; its matrices are large enough for 8-bit states (4,096 elements)."""
    sizes = {"n_layers": 2, "hidden_size": 64, "n_heads": 4, "feed_forward": 128, "vocab_size": 300, "seq_len": 32}
    given = {"experiment": "test", "batch_size": 4, "measure_steps": 1, **sizes, **changes}
    return LanguageModelRun(**given, techniques=techniques)


def train(techniques, folder, steps=STEPS, **changes):
    """Loss of every step (4 digits), and that of the validation split after the last (all digits)."""
    known = data.load("miniature").content_hash
    changes = {"measure_steps": 0, "train_steps": steps, "eval_blocks": 4, **changes}
    result = execute(lm(techniques, dataset="miniature", data_hash=known, **changes), folder)
    return [loss for _, loss in result["curves"]["train_loss"]], result["metrics"]["validation_loss"]


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    """Train without techniques."""
    curve, validation = train((), tmp_path_factory.mktemp("baseline"))
    assert len(curve) == STEPS
    assert curve[-1] < curve[0] - 0.3  # or equal curves would mean little
    return curve, validation


# --- the loss


def test_every_technique_is_here():
    assert {text.partition("=")[0] for text in (*EXACT, *INEXACT)} == set(HERE)
    assert {name for name in HERE if TECHNIQUES[name].exact} == {text.partition("=")[0] for text in EXACT}
    assert all(technique.summary for technique in TECHNIQUES.values())


@pytest.mark.parametrize("text", EXACT)
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


@pytest.mark.parametrize(("text", "distance"), INEXACT.items(), ids=INEXACT)
def test_inexact_techniques_stay_close(text, distance, baseline, tmp_path):
    curve, validation = train((text,), tmp_path)
    furthest = max(abs(a - b) for a, b in zip([*curve, validation], [*baseline[0], baseline[1]], strict=True))
    assert 0 < furthest < distance


# --- the memory


@pytest.fixture(scope="module")
def plain():
    """Measure a step without techniques."""
    return measure(build(lm(batch_size=8)))


def activations(report):
    return report.forward_end_by_category["activations"]


def gradients(report):
    return max(live["gradients"] for _, _, live in report.timeline)


def with_technique(text):
    return measure(build(lm((text,), batch_size=8)))


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
    # Of a block its output stays, the next one's input, the random generator's state, and the scale of the scores.
    assert sum(of_blocks.values()) == 2 * (hidden + 5056 + 8)
    assert activations(report) < 0.5 * activations(plain)
    assert report.peak_bytes < plain.peak_bytes


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
        step = build(lm(techniques))()
        step()  # the first block of the first step is recomputed whole: it makes the plan
        with Count() as count:
            step()
        return count.products

    plain, full = products(), products("checkpointing")
    counts = [products(f"selective_checkpointing={budget}") for budget in (0, 0.25, 0.5, 0.75, 1)]
    # A block has qkv, scores, context, projection and two of the feed-forward: recomputing stops before the last.
    assert full == plain + 2 * 5
    assert counts[0] == full
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == plain


def test_the_budget_is_kept():
    """What is kept of the products is within the share of their bytes; with all, only a block's last is not kept."""
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
    quarter = activations(measure(build(lm(batch_size=2))))
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
    # Two moments of one byte instead of four; then 4 B a block of 256, and step counters gone or come.
    saved = plain.peak_by_category["optimizer"] - report.peak_by_category["optimizer"]
    assert saved == pytest.approx(2 * 3 * matrices, rel=0.05)
    assert report.peak_bytes < plain.peak_bytes


def test_optimizer_in_backward_has_few_gradients_at_once(plain):
    report = with_technique("optimizer_in_backward")
    parameters = plain.peak_by_category["parameters"]
    assert gradients(plain) == parameters
    # The embedding is the head too: its gradient begins with the first of backward and is whole with its last.
    embedding, layer = 4 * 300 * 64, 4 * (128 * 64 + 128)
    assert gradients(report) <= embedding + 2 * layer < 0.5 * parameters
    assert report.peak_by_category["optimizer"] == plain.peak_by_category["optimizer"]


# --- what goes with what


def excluded(pair):
    names = {text.partition("=")[0] for text in pair}
    return names in ({"checkpointing", "selective_checkpointing"}, {"accumulation", "optimizer_in_backward"})


PAIRS = list(itertools.combinations(HERE, 2))


@pytest.mark.parametrize("pair", [p for p in PAIRS if not excluded(p)], ids="+".join)
def test_pairs_train(pair, baseline, tmp_path):
    curve, validation = train(pair, tmp_path, steps=2, eval_blocks=1)
    assert curve == pytest.approx(baseline[0][:2], abs=0.01)
    assert validation == pytest.approx(validation, abs=1)  # not NaN


@pytest.mark.parametrize("pair", [p for p in PAIRS if excluded(p)], ids="+".join)
def test_excluded_pairs_are_refused(pair):
    for texts in (pair, pair[::-1]):
        with pytest.raises(ValueError, match=r"only one of kind|excludes accumulation"):
            parse(texts)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["fp8"], "unknown technique 'fp8'; known: bf16,"),
        ([""], "unknown technique ''"),
        (["Bf16"], "unknown technique 'Bf16'"),
        (["bf16=1"], "'bf16' has no setting, but got '1'"),
        (["accumulation=two"], "'accumulation=two': a number is needed"),
        (["accumulation="], "a number is needed"),
        (["accumulation=0"], "a whole number from 1"),
        (["accumulation=-2"], "a whole number from 1"),
        (["accumulation=1.5"], "a whole number from 1"),
        (["accumulation=nan"], "a whole number from 1"),
        (["accumulation=inf"], "a whole number from 1"),
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


def test_text_becomes_the_technique():
    assert parse(["bf16", "accumulation=8", "selective_checkpointing=0.25"]) == (
        Bf16(),
        Accumulation(8),
        SelectiveCheckpointing(0.25),
    )
    assert parse([]) == ()
    assert parse(["selective_checkpointing"]) == (SelectiveCheckpointing(),)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", sorted(set(TECHNIQUES) - set(HERE)))
def test_what_needs_cuda_says_so(name, tmp_path):
    with pytest.raises(Unavailable, match=f"^{name} needs a CUDA device"):
        build(lm((name,)))
    with pytest.raises(Unavailable, match="needs a CUDA device"):
        train((name,), tmp_path)


@pytest.mark.gpu
def test_offloading_keeps_the_loss_and_frees_the_device(baseline, tmp_path):
    plain, offloaded = (measure(build(lm(t, batch_size=8))) for t in ((), ("offload_activations",)))
    assert activations(offloaded) < 0.5 * activations(plain)
    curve, _ = train(("offload_activations",), tmp_path / "offloaded")
    assert curve == pytest.approx(train((), tmp_path / "plain")[0], abs=1.01e-4)


@pytest.mark.gpu
def test_tf32_stays_close(tmp_path):
    curve, _ = train(("tf32",), tmp_path / "tf32")
    assert curve == pytest.approx(train((), tmp_path / "plain")[0], abs=0.01)
