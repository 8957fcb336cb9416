"""A layer measured alone: refused choices, the contents of the peak, its prediction, and the peers' layers."""

import importlib.metadata
import itertools
import json
import sys

import pytest
import torch
from pydantic import ValidationError
from support.tiers import cover, slow_but
from torch import nn

from memstudy import machine, records
from memstudy.attention import ATTENTION, Unavailable
from memstudy.kinds import parse_run
from memstudy.profiler import MIB, measure, predict
from memstudy.studies.attention_layer.peers import PEERS
from memstudy.studies.attention_layer.run import LayerRun, _Along

pytestmark = pytest.mark.usefixtures("one_thread", "young_garbage_only")

SETTINGS = {
    "softmax": {},
    "window": {"window": 8},
    "lsh": {"num_hashes": 2, "chunk_length": 8},
    "linformer": {"rank": 8, "max_len": 32},
    "memsizer": {"slots": 4},
    "performer": {"features": 16},
}


def layer_run(variant="window", **changes) -> LayerRun:
    sizes = {"seq_len": 32, "hidden_size": 16, "n_heads": 2, "is_causal": True, "measure_steps": 1}
    return LayerRun(
        **{"experiment": "tiny", "attention": {"variant": variant, **SETTINGS.get(variant, {})}, **sizes, **changes}
    )


def peer_run(who: str) -> LayerRun:
    """Return a tiny run of a peer, causal if the variant can be."""
    variant = PEERS[who].variant
    return layer_run(variant, who=who, is_causal=True in ATTENTION[variant].causal)


# --- what a run may be


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 15}, "hidden_size=15 is not a multiple of n_heads=2"),
        ({"seq_len": 1}, "seq_len"),
        ({"batch_size": 0}, "batch_size"),
        ({"measure_steps": 0}, "measure_steps"),
        ({"is_causal": None}, "is_causal"),
        ({"layers": 2}, "layers"),
        ({"attention": {"variant": "linear"}}, "unknown attention variant 'linear'; known: "),
        ({"attention": {"variant": "window", "size": 4}}, "attention 'window': "),
        ({"attention": {"variant": "window", "window": 0}}, "window=0"),
        ({"attention": {"variant": "window", "window": 33}}, "window=33 is larger than seq_len=32"),
        ({"who": "nobody"}, "unknown who 'nobody'; known: memstudy, torch, local-attention"),
        ({"who": "torch"}, "who='torch' has 'softmax', not 'window'"),
        ({"cross": True}, "cross=true needs is_causal=false"),
        ({"cross": True, "is_causal": False}, "the layer of 'window' attends to its own sequence only"),
    ],
    ids=str,
)
def test_bad_choices_are_refused(changes, said):
    with pytest.raises(ValidationError) as refusal:
        layer_run(**changes)
    (error,) = refusal.value.errors()
    assert said in str(refusal.value)
    assert "\n" not in error["msg"]


def test_a_run_survives_json_and_cannot_be_changed():
    run = layer_run(who="local-attention")
    assert parse_run(json.loads(run.model_dump_json())) == run
    with pytest.raises(ValidationError):
        run.seed = 1


# --- what is measured


STEPS = list(itertools.product(["softmax", "window"], [False, True]))


@pytest.mark.parametrize(("variant", "is_causal"), slow_but(cover(STEPS), STEPS))
def test_the_peak_repeats_itself_and_is_predicted_to_the_byte(variant, is_causal, tmp_path):
    run = layer_run(variant, is_causal=is_causal, batch_size=2)
    peak = run.peak_bytes(measure)
    assert peak == run.peak_bytes(measure) == run.peak_bytes(predict)
    metrics = run.execute(tmp_path)["metrics"]
    assert metrics["predicted_peak_mib"] == metrics["peak_allocated_mib"] == peak / MIB
    assert metrics["peak_u"] == peak / (2 * 32 * 16 * 4)


def test_what_a_run_reports(tmp_path):
    result = layer_run(measure_steps=3).execute(tmp_path)
    json.dumps(result, allow_nan=False)
    metrics, curves = result["metrics"], result["curves"]
    for name in ("step", "projections"):
        assert len(curves[f"{name}_times_ms"]) == 3
        assert 0 < metrics[f"{name}_time_min_ms"] <= metrics[f"{name}_time_ms"] <= metrics[f"{name}_time_max_ms"]
    assert metrics["time_ratio"] == metrics["step_time_ms"] / metrics["projections_time_ms"]
    assert 0 < metrics["time_ratio_min"] <= metrics["time_ratio_max"]


def test_the_peak_has_inputs_and_gradients_but_not_weights_and_the_next_layers_gradient(monkeypatch):
    monkeypatch.setattr(LayerRun, "make_layer", lambda run: nn.Linear(run.hidden_size, run.hidden_size))
    tensor, weights = 4 * 32 * 16, 4 * (16 * 16 + 16)  # bytes
    peak = layer_run().peak_bytes(measure)
    assert 0 <= peak - (2 * tensor + weights) <= 16  # input, its gradient, weights' gradients; loss and its gradient


def test_a_second_sequence_and_its_gradient_count(monkeypatch):
    class Sum(nn.Module):
        def forward(self, hidden_states, *, memory):
            return hidden_states + memory

    monkeypatch.setattr(LayerRun, "make_layer", lambda run: Sum())
    run = layer_run().model_copy(update={"cross": True})  # without a check that the variant has this form
    assert 0 <= run.peak_bytes(measure) - 4 * 4 * 32 * 16 <= 16


def test_the_loss_hands_on_its_direction_and_nothing_else():
    output = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(2, 3, 4, dtype=torch.float64)
    loss = _Along.apply(output, direction)
    assert torch.allclose(loss, (output * direction).sum())
    (gradient,) = torch.autograd.grad(loss, output)
    assert gradient.data_ptr() == direction.data_ptr()


def test_a_layer_is_predicted_for_a_gpu_as_a_run(tmp_path):
    run = layer_run("softmax", is_causal=False)
    predicted = parse_run({"kind": "prediction", "experiment": "tiny", "of": run.model_dump(mode="json"), "gpu": "T4"})
    assert predicted.of == run
    metrics = predicted.execute(tmp_path)["metrics"]
    assert metrics["fits"]
    assert 0 < metrics["step_time_low_ms"] < metrics["step_time_ms"] < metrics["step_time_high_ms"]
    weights = 4 * (16 * 16 + 16)
    direction = run.seq_len * run.hidden_size
    report = run.foretell()
    assert max(report.iteration_peaks) == run.peak_bytes(predict) + 4 * (weights + direction)


# --- the peers


@pytest.mark.parametrize("who", PEERS)
def test_a_peer_is_a_layer_of_the_same_contract(who):
    run = peer_run(who)
    try:
        layer = run.make_layer()
    except Unavailable as missing:
        pytest.skip(str(missing))
    hidden_states = torch.randn(1, 32, 16, requires_grad=True)
    torch.manual_seed(0)
    output = layer(hidden_states)
    assert output.shape == hidden_states.shape
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    # In LSH, later tokens change the chunks; performer-pytorch scales all keys by the largest one.
    if run.is_causal and PEERS[who].variant not in ("lsh", "performer"):
        changed = hidden_states.detach().clone()
        changed[:, 20:] += 1
        assert torch.allclose(layer(changed)[:, :20], output[:, :20], atol=1e-5)


def test_torchs_layer_equals_the_exact_variant():
    run = layer_run("softmax")
    ours, torchs = run.make_layer(), run.model_copy(update={"who": "torch"}).make_layer()
    torchs.load_state_dict(ours.state_dict())
    hidden_states = torch.randn(2, 32, 16)
    assert torch.equal(ours(hidden_states), torchs(hidden_states))


@pytest.mark.parametrize("is_causal", [False, True])
def test_memsizer_as_released_equals_the_variant(is_causal):
    run = layer_run("memsizer", is_causal=is_causal)
    ours, released = run.make_layer(), run.model_copy(update={"who": "MemSizer as released"}).make_layer()
    released.load_state_dict(ours.state_dict())
    hidden_states = torch.randn(2, 32, 16)
    assert torch.allclose(ours(hidden_states), released(hidden_states), atol=1e-5)


def test_a_peer_that_is_not_installed_is_a_row_that_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "local_attention", None)
    run = layer_run(who="local-attention")
    record = records.perform(
        run.model_dump(mode="json"), tmp_path, lambda folder: run.execute(folder), unavailable=(Unavailable,)
    )
    assert record["status"] == "unavailable"
    assert record["reason"].startswith("local-attention cannot be imported")
    assert record["reason"].endswith("pip install 'memstudy[bench]'")
    assert record["metrics"] == {}


def test_a_record_names_the_peers_versions():
    for package in ("local-attention", "reformer-pytorch", "linformer", "performer-pytorch"):
        try:
            assert machine.versions()[package] == importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            assert machine.versions()[package] == "not installed"
