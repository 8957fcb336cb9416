"""Adapters, quantised weights and conventions of number formats: what they train, and their memory as predicted."""

from contextlib import nullcontext

import pytest
import torch
import transformers as hf
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from support.tiny_models import SIZES, config_file
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from memstudy.profiler import measure, predict
from memstudy.techniques.weights import Nf4Weights
from memstudy.trainers.hub_model import HubModelRun
from memstudy.trainers.trainer import make_trainer

pytestmark = pytest.mark.usefixtures("one_thread", "young_garbage_only")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Give a run of a small Llama with some techniques."""
    path = config_file(tmp_path_factory.mktemp("models"), "llama")

    def run(*techniques, **changes):
        given = {"experiment": "test", "model": path, "seq_len": 32, "batch_size": 4} | changes
        return HubModelRun(**given, techniques=techniques)

    return run


@pytest.fixture(scope="module", autouse=True)
def _codes():
    """Quantise once: bitsandbytes makes its table of 8-bit codes at the first use in a process, and keeps it."""
    quantize_4bit(torch.zeros(64), compress_statistics=True, quant_type="nf4")


def trainer_of(run, folder):
    """Return the Trainer of `run`, ready for single steps."""
    trainer = make_trainer(run, run.make_model(), folder, train_steps=1)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def prepared(run, folder):
    """Return the model of `run` with its techniques, as it is trained."""
    return trainer_of(run, folder).model


def shapes(model):
    """Return the shapes of the trained parameters by name."""
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}


def dtypes(model):
    """Return the formats of the embeddings, of a norm and of the trained parameters."""
    trained = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    return model.get_input_embeddings().weight.dtype, model.model.norm.weight.dtype, trained


@pytest.mark.parametrize(
    "techniques",
    [
        ("lora=4",),
        ("lora=4:attention",),
        ("lora=4:q_proj+v_proj:bf16",),
        ("dora=4",),
        ("dora=4:q_proj", "checkpointing"),
        ("ia3",),
        ("ia3=k_proj+v_proj",),
        ("prompt=4",),
        ("prefix=4",),
        ("pure_bf16",),
        ("pure_bf16", "adamw_8bit", "checkpointing"),
        ("lora=4", "checkpointing", "chunked_loss", "accumulation=2"),
        ("prompt=4", "checkpointing"),
        ("prompt=4", "chunked_loss"),
        ("lora=4", "adamw_8bit", "optimizer_in_backward"),
        ("convention=uncast", "lora=4", "checkpointing"),
        ("convention=peft", "lora=4"),
        ("convention=trl-0.13", "lora=4"),
        ("convention=trl", "lora=4", "adamw_8bit"),
        ("qlora=4",),
        ("convention=trl", "qlora=4", "checkpointing"),
        ("nf4_weights=single:fp32", "dora=4"),
        ("int8_weights", "lora=4"),
    ],
    ids="+".join,
)
def test_a_step_takes_what_is_predicted(techniques, llama):
    run = llama(*techniques)
    measured, predicted = measure(run.build()), predict(run.build())
    assert predicted.iteration_peaks == measured.iteration_peaks
    assert measured.iteration_peaks != measure(llama().build()).iteration_peaks


def test_buffers_of_products_in_half_precision_are_as_the_processor_makes_them(llama):
    run = llama("qlora=4", "checkpointing", seq_len=64, batch_size=8)
    assert predict(run.build()).iteration_peaks == measure(run.build()).iteration_peaks


def test_targets_are_the_layers_named(llama, tmp_path):
    def targets(text):
        return {name.split(".")[-4] for name in shapes(prepared(llama(text), tmp_path))}

    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert targets("lora=4:attention") == attention
    assert targets("lora=4") == targets("lora=4:all-linear") == attention | {"gate_proj", "up_proj", "down_proj"}
    assert targets("lora=4:q_proj+down_proj") == {"q_proj", "down_proj"}


@pytest.mark.parametrize(
    ("text", "elements"),  # two layers of width 128; keys and values are 64 wide
    [
        ("lora=4:q_proj", 2 * 4 * (128 + 128)),
        ("dora=4:q_proj", 2 * (4 * (128 + 128) + 128)),
        ("ia3=k_proj+v_proj", 2 * 2 * 64),
        ("prompt=4", 4 * 128),
        ("prefix=4", 4 * 2 * 2 * 64),
    ],
)
def test_an_adapter_has_its_published_number_of_weights(text, elements, llama, tmp_path):
    trained = shapes(prepared(llama(text), tmp_path))
    assert sum(torch.Size(shape).numel() for shape in trained.values()) == elements


@pytest.mark.parametrize(
    "techniques",
    [
        ("lora=4", "checkpointing"),
        ("dora=4", "checkpointing=2"),
        ("prompt=4", "checkpointing"),
        ("qlora=4", "checkpointing"),
    ],
    ids="+".join,
)
def test_with_checkpointing_every_adapter_gets_its_gradient(techniques, llama, tmp_path):
    run = llama(*techniques)
    trainer = trainer_of(run, tmp_path)
    trainer.training_step(trainer.model, run.make_batch())
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None for parameter in trained)


FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("techniques", "found"),
    [
        (("lora=4",), (FP32, FP32, {FP32})),
        (("lora=4:attention:bf16",), (FP32, FP32, {BF16})),
        (("pure_bf16", "lora=4"), (BF16, BF16, {BF16})),
        (("qlora=4",), (BF16, BF16, {BF16})),
        (("qlora=4:attention:fp32",), (BF16, BF16, {FP32})),
        (("convention=uncast", "lora=4"), (BF16, BF16, {FP32})),
        (("convention=uncast", "qlora=4"), (BF16, BF16, {FP32})),
        (("convention=peft", "qlora=4"), (FP32, FP32, {FP32})),
        (("convention=trl-0.13", "qlora=4"), (BF16, FP32, {FP32})),
        (("convention=trl", "qlora=4"), (BF16, BF16, {BF16})),
        (("convention=trl", "lora=4"), (BF16, BF16, {FP32})),
        (("convention=trl", "lora=4", "int8_weights"), (BF16, BF16, {BF16})),
    ],
    ids=lambda value: "+".join(value) if isinstance(value[0], str) else "",
)
def test_number_formats_are_the_conventions(techniques, found, llama, tmp_path):
    assert dtypes(prepared(llama(*techniques), tmp_path)) == found


@pytest.mark.parametrize("scales", ["double", "single"])
def test_4_bit_weights_are_stored_in_their_published_bytes(scales, llama, tmp_path):
    """Half a byte a weight, a scale for each 64: four bytes, or one and four for each 256 scales and an offset."""
    model = prepared(llama(f"nf4_weights={scales}", "lora=4"), tmp_path)
    layers = [module.get_base_layer() for module in model.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == 2 * 7
    for layer in layers:
        n, state = layer.in_features * layer.out_features, layer.weight.quant_state
        assert layer.weight.nbytes == n // 2
        if scales == "single":
            assert state.absmax.nbytes == 4 * n // 64
        else:
            assert state.absmax.nbytes == n // 64
            assert (state.state2.absmax.nbytes, state.offset.nbytes) == (4 * -(-n // 64 // 256), 4)
    assert model.lm_head.weight.dtype == BF16


@pytest.mark.parametrize("width", [40, 64, 80, 96, 128])
def test_4_bit_rows_are_unpacked_as_they_were_packed_or_refused(width):
    """bitsandbytes 0.50.2 mixes the scales of blocks that end within a row, on processors with AVX-512."""
    packed, state = quantize_4bit(torch.randn(32, width), quant_type="nf4")
    first, second = packed.flatten().long() >> 4, packed.flatten().long() & 15
    values = state.code[torch.stack([first, second], dim=1)].view(-1, 64) * state.absmax[:, None]
    right = torch.allclose(dequantize_4bit(packed, state), values.view(32, width), atol=1e-6)
    assert right or width % 64
    with nullcontext() if right else pytest.raises(ValueError, match=f"^4-bit weights of {width} inputs: "):
        Nf4Weights().layer(torch.randn(32, width))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """Give a run of a small mixture of experts with some techniques."""
    path = tmp_path_factory.mktemp("models") / "config.json"
    experts = {"num_local_experts": 4, "num_key_value_heads": 2, "architectures": ["MixtralForCausalLM"]}
    hf.MixtralConfig(**SIZES, **experts).to_json_file(path)

    def run(*techniques):
        given = {"experiment": "test", "model": str(path), "seq_len": 32, "batch_size": 2}
        return HubModelRun(**given, techniques=techniques)

    return run


@pytest.mark.filterwarnings("ignore:.*stay in bfloat16")
@pytest.mark.parametrize("techniques", [("lora=4",), ("qlora=4",)], ids="+".join)
def test_adapters_beside_experts_take_what_is_predicted(techniques, mixtral):
    run = mixtral(*techniques)
    assert predict(run.build()).iteration_peaks == measure(run.build()).iteration_peaks


def test_experts_in_one_tensor_stay_as_transformers_leaves_them(mixtral):
    ours, theirs = mixtral().make_model(), mixtral().make_model()
    with pytest.warns(UserWarning, match="^0.000786 billion weights stay in bfloat16: experts"):
        Nf4Weights().prepare(ours)
    replace_with_bnb_linear(theirs, ["lm_head"], hf.BitsAndBytesConfig(load_in_4bit=True))
    packed = [{name for name, m in model.named_modules() if isinstance(m, Linear4bit)} for model in (ours, theirs)]
    assert packed[0] == packed[1]
    assert len(packed[0]) == 2 * 4
    assert 2 * 4 * 3 * 128 * 256 == 786_432 == sum(p.numel() for p in ours.parameters() if p.dim() == 3)


def test_dora_beside_experts_is_refused_in_one_line(mixtral):
    with pytest.raises(
        ValueError, match=r"^dora=4: peft has no DoRA beside experts, .* take dora=4:attention, or lora$"
    ):
        mixtral("dora=4").build()()


@pytest.mark.parametrize(
    "techniques",
    [
        ("qlora=4",),
        ("nf4_weights=single:fp32", "dora=4"),
        ("int8_weights", "lora=4"),
    ],
)
def test_adapters_train_beside_quantised_weights(techniques, llama, tmp_path):
    run = llama(*techniques, learning_rate=1e-2)
    torch.manual_seed(0)
    trainer = trainer_of(run, tmp_path)
    optimizer, batch, losses = trainer.create_optimizer(), run.make_batch(), []
    frozen = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    for _ in range(8):
        losses.append(trainer.training_step(trainer.model, batch).item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    kept = dict(trainer.model.named_parameters())
    assert all(torch.equal(weight, kept[name]) for name, weight in frozen.items())


@pytest.mark.parametrize(
    ("family", "text", "said"),
    [
        ("llama", "lora=4:q_prj", "targets 'q_prj': LlamaForCausalLM has no such linear layer, but q_proj, k_proj"),
        ("bert", "prompt=4", "prompt=4: virtual tokens are for decoders, and BertForMaskedLM is none: take lora"),
        ("t5", "prefix", "prefix=20: virtual tokens are for decoders, and T5ForConditionalGeneration is none"),
        (
            "gpt2",
            "prompt=40",
            "seq_len=32 and 40 virtual tokens are more than the model's 64 positions: take seq_len=24",
        ),
    ],
)
def test_what_a_model_cannot_take_is_told_in_one_line(family, text, said, tmp_path):
    run = HubModelRun(
        experiment="test", model=config_file(tmp_path, family), seq_len=32, batch_size=4, techniques=(text,)
    )
    with pytest.raises(ValueError, match=said) as refusal:
        run.build()()
    assert "\n" not in str(refusal.value)


def test_ia3_of_a_family_that_peft_does_not_know_wants_names(llama, tmp_path):
    run = llama("ia3")
    model = run.make_model()
    model.config.model_type = "mine"
    with pytest.raises(ValueError, match="ia3: peft knows no targets in models of type mine: name them"):
        make_trainer(run, model, tmp_path, train_steps=1)
