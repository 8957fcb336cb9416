"""`MemoryCallback`: a Trainer's own step predicted, measured and logged, and its training left as it is."""

import os
import random
import re
import subprocess
import sys
import tempfile
import textwrap
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers as hf
from support.tiers import slow_but
from torch import nn

from memstudy.huggingface.callback import MemoryCallback
from memstudy.huggingface.out_of_memory import is_out_of_memory, request
from memstudy.profiler import measurement
from memstudy.profiler.local import find_by_cuda_name

pytestmark = [
    pytest.mark.usefixtures("one_thread", "young_garbage_only"),
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning"),
]

VOCAB = 200
LLAMA = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 48, "use_cache": False,
}  # fmt: skip
LENGTH = 24


def llama():
    return hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA))


def with_lora():
    return peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


def quantised(**bits):
    """A LoRA model on weights that bitsandbytes has quantised, as ``from_pretrained`` makes it."""
    with tempfile.TemporaryDirectory() as folder:
        llama().save_pretrained(folder)
        config = hf.BitsAndBytesConfig(**bits)
        model = hf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


def with_dropout():
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=48))


def rows(length=LENGTH):
    return [{"input_ids": torch.randint(2, VOCAB, (length,))} for _ in range(64)]


def collate(batch):
    tokens = nn.utils.rnn.pad_sequence([row["input_ids"] for row in batch], batch_first=True)
    return {"input_ids": tokens, "labels": tokens}


def trainer(folder, model=llama, kind=hf.Trainer, data=None, **flags):
    hf.set_seed(0)
    flags = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "gradient_accumulation_steps": 1,
    } | flags
    arguments = hf.TrainingArguments(
        str(folder), report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", **flags
    )
    return kind(model(), arguments, train_dataset=data or rows(), data_collator=collate)


def watched(made, **options):
    callback = MemoryCallback(made, **options)
    made.add_callback(callback)
    return callback


class Preferring(hf.Trainer):
    """Has a second model, which its loss compares with, as TRL's DPOTrainer."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.reference = llama().eval().requires_grad_(False)

    def compute_loss(self, model, inputs, **kwargs):
        with torch.no_grad():
            preferred = self.reference(**inputs).logits
        return (model(**inputs).logits - preferred).square().mean()


STEPS = {
    "accumulated": {"gradient_accumulation_steps": 3},
    "checkpointing": {"activation_checkpointing": True},
    "lora": {"model": with_lora},
    "plain": {},
    "dropout": {"model": with_dropout},
    "bf16": {"bf16": True},
    "not clipped": {"optim": "sgd", "max_grad_norm": 0.0},
    "smoothed labels": {"label_smoothing_factor": 0.1},
    "adafactor": {"optim": "adafactor"},
    "lora, bf16 and checkpointing": {"model": with_lora, "bf16": True, "activation_checkpointing": True},
    "8-bit": {"optim": "adamw_bnb_8bit"},
    "qlora": {"model": partial(quantised, load_in_4bit=True, bnb_4bit_use_double_quant=True)},
    "8-bit weights": {"model": partial(quantised, load_in_8bit=True)},
    "a reference": {"kind": Preferring},
}


@pytest.mark.parametrize("step", slow_but(["accumulated", "checkpointing", "lora"], list(STEPS)))
def test_the_prediction_before_training_is_the_measurement_in_training_to_the_byte(step, tmp_path):
    made = trainer(tmp_path, **STEPS[step])
    callback = watched(made)
    made.train()
    predicted, measured = callback.predicted, callback.measured
    assert (predicted.kind, measured.kind) == ("predicted", "measured")
    assert predicted.peak_by_category == measured.peak_by_category
    assert predicted.iteration_peaks == measured.iteration_peaks
    assert measured.peak_by_category["parameters"] > 0
    assert measured.peak_bytes == sum(measured.peak_by_category.values())


class Drawing(torch.utils.data.Dataset):
    """Rows that draw random numbers of three kinds, as augmentation does."""

    def __len__(self):
        return 64

    def __getitem__(self, place):
        number = 2 + np.random.randint(50) + random.randrange(50) + int(torch.randint(50, ()))  # noqa: NPY002
        return {"input_ids": torch.full((LENGTH,), number)}


class Remembering(hf.Trainer):
    """Keeps something of every step, as TRL's trainers do."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.__dict__.setdefault("seen", {"losses": []})["losses"].append(
            loss if kwargs.get("return_outputs") else loss.detach()
        )
        return loss


def state_after(made):
    made.seen = {"losses": []}
    made.train()
    return {
        "losses": [row["loss"] for row in made.state.log_history if "loss" in row],
        "steps": [row["step"] for row in made.state.log_history if "loss" in row],
        "seen": [loss.item() for loss in made.seen["losses"]],
        "weights": [p.tolist() for p in made.model.parameters()],
        "state": [str(value) for each in made.optimizer.state.values() for value in each.values()],
        "random": (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),  # noqa: NPY002
        "hooks": [len(module._forward_hooks) for module in made.model.modules()],
        "attributes": [vars(p) for p in made.model.parameters()],
    }


@pytest.mark.parametrize("optim", slow_but(["adamw_torch_fused"], ["adamw_torch_fused", "adamw_bnb_8bit"]))
def test_training_is_the_same_with_and_without(optim, tmp_path):
    options = {"model": with_dropout, "kind": Remembering, "data": Drawing(), "logging_steps": 2, "max_steps": 4}
    options["optim"] = optim
    without = state_after(trainer(tmp_path, **options))
    made = trainer(tmp_path, **options)
    callback = watched(made)
    assert state_after(made) == without
    assert callback.predicted.peak_bytes == callback.measured.peak_bytes
    assert without["steps"] == [2, 4]


def test_the_log_has_the_peak_by_category_under_names_that_people_know(tmp_path):
    made = trainer(tmp_path)
    callback = watched(made)
    made.train()
    (logged,) = (row for row in made.state.log_history if "memory/max_allocated (GiB)" in row)
    assert logged["step"] == 2
    assert logged["memory/max_allocated (GiB)"] == callback.measured.peak_bytes / 2**30
    parts = [value for name, value in logged.items() if name.startswith("memory/peak_")]
    assert sum(parts) == pytest.approx(logged["memory/max_allocated (GiB)"])


def test_the_longest_rows_are_predicted_with_a_verdict(tmp_path, capsys):
    made = trainer(tmp_path, data=[*rows(8), *rows(40)[:4]], max_steps=1)
    callback = watched(made, gpu="T4")
    made.train()
    told = capsys.readouterr().err
    assert "batches of 4 × 40, predicted for T4" in told
    assert re.search(r"^fits: 0\.2 of 14\.6 GiB$", told, re.MULTILINE)
    assert "activations" in told
    assert callback.predicted.whole_gpu_mib > 137


class Stream(torch.utils.data.IterableDataset):
    """Rows that are there once."""

    def __init__(self):
        self._rows = iter(rows())

    def __iter__(self):
        return self._rows


def test_a_stream_is_not_predicted_and_loses_no_row(tmp_path, capsys):
    data = Stream()
    made = trainer(tmp_path, data=data, max_steps=2)
    callback = watched(made)
    made.train()
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert (
        line == "memory not predicted: its data set is a stream, whose rows training would miss: give one with a length"
    )
    assert callback.predicted is None
    assert callback.measured.peak_bytes > 0
    assert len(list(islice(data, 64))) >= 64 - 3 * 4  # two batches and the one fetched ahead


@pytest.mark.parametrize(
    ("attribute", "said"),
    [("is_deepspeed_enabled", "DeepSpeed takes the step"), ("is_fsdp_enabled", "FSDP shards the model: ")],
)
def test_an_unsupported_trainer_gets_one_line(attribute, said, tmp_path, capsys):
    """The attribute is set after the training has begun, since neither is installed here."""
    made = trainer(tmp_path, max_steps=1)
    watched(made)

    class Marked(hf.TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            setattr(made, attribute, True)

        def on_step_begin(self, *args, **kwargs):
            setattr(made, attribute, False)

    made.callback_handler.callbacks.insert(0, Marked())
    made.train()
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"memory neither predicted nor measured by category: {said}")
    assert made.state.global_step == 1


def test_a_model_that_cannot_be_followed_is_named_and_trained(tmp_path, capsys):
    class Odd(hf.LlamaForCausalLM):
        def forward(self, input_ids, labels):
            if self.lm_head.weight.sum() > 1e9:
                return None
            return super().forward(input_ids, labels=labels)

    made = trainer(tmp_path, model=lambda: Odd(hf.LlamaConfig(**LLAMA)), max_steps=1)
    callback = watched(made)
    made.train()
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.match("memory not predicted: [A-Za-z]+Error: ", line)
    assert made.state.global_step == 1
    assert callback.measured.peak_bytes > 0


TOO_MUCH = 2**46  # bytes: no machine gives them


class Greedy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, where):
        ctx.where = where
        if where == "forward":
            torch.empty(TOO_MUCH, dtype=torch.uint8)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if ctx.where == "backward":
            torch.empty(TOO_MUCH, dtype=torch.uint8)
        return gradient, None


class Wide(nn.Module):
    def __init__(self, where):
        super().__init__()
        self.linear, self.where = nn.Linear(32, 32), where

    def forward(self, x):
        return Greedy.apply(self.linear(x), self.where)


class Hungry(torch.optim.SGD):
    def step(self, closure=None):
        torch.empty(TOO_MUCH, dtype=torch.uint8)


@pytest.mark.parametrize("phase", ["forward", "backward", "optimizer"])
def test_an_out_of_memory_error_is_placed(phase, tmp_path):
    def model():
        made = llama()
        made.model.layers[1].mlp = Wide(phase)
        return made

    made = trainer(tmp_path, model=model)
    if phase == "optimizer":
        made.optimizer = Hungry(made.model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError) as raised:
        made.train()
    assert is_out_of_memory(raised.value)
    where = request(raised.value, made)
    assert (where.bytes, where.phase, where.iteration) == (TOO_MUCH, phase, 1)
    assert where.module == {"forward": "model.layers.1.mlp", "backward": "model.layers.1", "optimizer": ""}[phase]


@pytest.mark.slow
def test_an_out_of_memory_error_is_explained_and_advised_on(tmp_path, capsys):
    def model():
        made = llama()
        made.model.layers[1].mlp = Wide("forward")
        return made

    made = trainer(tmp_path, model=model)
    watched(made)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        made.train()
    *_, foreseen, explained, advised = capsys.readouterr().err.strip().splitlines()
    assert foreseen.startswith("does not fit: 65536.0 GiB more, ")
    assert explained == "out of memory in forward of step 1 in model.layers.1.mlp, asking for 67,108,864.0 MiB"
    assert advised.startswith("memstudy advise would add nothing: ")


@pytest.mark.slow
def test_a_training_that_finds_its_batch_size_is_followed_again(tmp_path, monkeypatch):
    class Range(measurement.record_function):
        def __enter__(self):
            open_ranges.append(self)
            return super().__enter__()

        def __exit__(self, *error):
            open_ranges.remove(self)
            return super().__exit__(*error)

    def end(recording, *error):
        left_open.append(len(open_ranges))
        return exit_recording(recording, *error)

    open_ranges, left_open, exit_recording = [], [], measurement.Recording.__exit__
    monkeypatch.setattr(measurement, "record_function", Range)
    monkeypatch.setattr(measurement.Recording, "__exit__", end)

    class Fussy(hf.LlamaForCausalLM):
        def forward(self, input_ids, labels):
            if len(input_ids) > 3:
                torch.empty(TOO_MUCH, dtype=torch.uint8)
            return super().forward(input_ids, labels=labels)

    made = trainer(tmp_path, model=lambda: Fussy(hf.LlamaConfig(**LLAMA)), auto_find_batch_size=True)
    callback = watched(made)
    made.train()
    assert made.state.train_batch_size == 3
    assert callback.predicted.peak_by_category == callback.measured.peak_by_category
    assert not any(module._forward_hooks for module in made.model.modules())
    assert len(left_open) > 1  # one recording for each batch size
    assert not any(left_open)  # else torch's profiler crashes, now and then


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "tutorials" / "trainer.rst").read_text("utf-8")
    (code,) = re.findall(r"code-block:: python\n\n((?:    .*\n|\n)+)", page)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "updates on batches of 8 × 128, predicted for cpu" in done.stderr
    for name in re.findall(r"``(memory/(?:max_allocated|peak_\w+) \(GiB\))``", page):
        assert name in done.stdout


@pytest.mark.parametrize(
    ("told", "capability", "memory_mib", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", (8, 0), 81_154, "A100-80GB"),
        ("NVIDIA A10G", (8, 6), 22_503, "A10G"),
        ("NVIDIA A10", (8, 6), 22_503, "A10"),
        ("Tesla V100-PCIE-16GB", (7, 0), 16_160, "V100-PCIe-16GB"),
        ("Tesla V100-SXM2-32GB", (7, 0), 32_494, "V100-32GB"),
        ("Tesla T4", (7, 5), 14_913, "T4"),
        ("NVIDIA GeForce RTX 4090", (8, 9), 24_080, "RTX4090"),
        ("NVIDIA H100 NVL", (9, 0), 95_000, None),
        ("NVIDIA GeForce GTX 1080", (6, 1), 8_192, None),
    ],
)
def test_a_card_is_found_by_the_name_that_cuda_gives_it(told, capability, memory_mib, name):
    found = find_by_cuda_name(told, capability, memory_mib)
    assert (found.name if found else None) == name
