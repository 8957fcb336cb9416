"""An out-of-memory error of a Hugging Face Trainer: where it was, and what ``memstudy advise`` would add."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import psutil
import torch
import yaml
from transformers import Trainer

from memstudy.profiler import MIB, Gpu, gpus
from memstudy.profiler.events import OutOfMemory
from memstudy.profiler.internals import _engine_run_backward

_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
# What torch's allocators of CUDA and of the CPU say.
_ASKED = re.compile(r"ried to allocate ([\d.]+) (bytes|KiB|MiB|GiB|TiB)")

_BLOCK = re.compile(r"(.*\.\d+(?=\.)|[^.]+)")  # in a parameter's name: up to the number of a block, or the first part


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory, of a GPU or of the host, has run out."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def request(error: BaseException, trainer: Trainer) -> OutOfMemory:
    """The request that ``error`` is about, from its message and its traceback.

    The backward pass runs outside Python. It has then come to the last block of the model that lacks a gradient; from
    an update's second part on, all have one, and the module is unknown.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    owners = [frame.f_locals.get("self") for frame in frames]
    names = {id(module): name for name, module in trainer.model.named_modules()}
    inside = [names[id(owner)] for owner in owners if id(owner) in names]
    phase, module = "forward", inside[-1] if inside else ""
    if any(isinstance(owner, torch.optim.Optimizer) for owner in owners):
        phase = "optimizer"
    elif any(frame.f_code is _engine_run_backward.__code__ for frame in frames):
        missing = [name for name, p in trainer.model.named_parameters() if p.requires_grad and p.grad is None]
        phase, module = "backward", module or (_BLOCK.match(missing[-1])[0] if missing else "")
    asked = _ASKED.search(str(error))
    size = int(float(asked[1]) * _UNITS[asked[2]]) if asked else 0
    return OutOfMemory(size, phase, trainer.state.global_step + 1, module)


def advice(trainer: Trainer, seq_len: int, card: Gpu | None) -> str:
    """What ``memstudy advise``, in a process of its own, would add for the Trainer's step, in one line."""
    try:
        model, techniques = _described(trainer)
    except ValueError as error:
        return f"memstudy advise: {error}"
    batch = trainer.state.train_batch_size * trainer.args.gradient_accumulation_steps
    optimizer = str(trainer.args.optim.value)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "config.json")
        # A model that was not loaded names no class of its own; quantised weights are among the techniques.
        told = model.config.to_dict() | {"architectures": [type(model).__name__], "quantization_config": None}
        config.write_text(json.dumps(told, default=str))
        options = {
            "model": config,
            "batch": batch,
            "seq-len": seq_len,
            "technique": ",".join(techniques),
            "optimizer": "adamw" if optimizer == "adamw_torch_fused" else optimizer,
            "task": "classification" if "Classification" in type(model).__name__ else "lm",
        }
        if card is None:
            options["budget-mib"] = psutil.virtual_memory().total / MIB
        else:
            options["gpu"] = card.name if card.name in gpus() else _described_card(card, Path(folder))
        command = [sys.executable, "-m", "memstudy.cli", "advise", "--json"]
        command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        return f"memstudy advise: {answer.stderr.strip().splitlines()[-1]}"
    last = json.loads(answer.stdout)[-1]
    if not last["fits"]:
        return "memstudy advise: nothing fits: take a shorter sequence, a smaller model or a larger GPU"
    added = [text for text in last["techniques"] if text not in techniques]
    return f"memstudy advise would add {', '.join(added) or 'nothing'}: {last['needed_mib'] / 1024:,.1f} GiB, predicted"


def _described(trainer: Trainer) -> tuple[torch.nn.Module, list[str]]:
    """The model without adapters, and the techniques of the Trainer by name."""
    args, model = trainer.args, trainer.model
    techniques = [name for name in ("bf16", "fp16") if getattr(args, name)]
    loaded = {"is_loaded_in_4bit": "nf4_weights", "is_loaded_in_8bit": "int8_weights"}
    techniques += [name for flag, name in loaded.items() if getattr(model, flag, False)]
    if getattr(model, "is_activation_checkpointing", False):
        techniques.append("checkpointing")
    if args.gradient_accumulation_steps > 1:
        techniques.append(f"accumulation={args.gradient_accumulation_steps}")
    if adapters := getattr(model, "peft_config", None):
        adapter = next(iter(adapters.values()))
        if adapter.peft_type != "LORA" or not isinstance(adapter.target_modules, (set, list)):
            raise ValueError(f"adapters of peft's {adapter.peft_type} are not among its techniques")
        techniques.append(f"lora={adapter.r}:{'+'.join(sorted(adapter.target_modules))}")
        model = model.get_base_model()
    if not hasattr(model, "config"):
        raise ValueError(f"{type(model).__name__} has no config, by which it knows a model")
    return model, techniques


def _described_card(card: Gpu, folder: Path) -> Path:
    """A file that describes a ``card`` that the catalogue lacks."""
    path = folder / f"{card.name}.yaml"
    told = card.model_dump(exclude={"name"}, exclude_none=True)
    path.write_text(yaml.safe_dump(told | {"compute_capability": ".".join(map(str, card.compute_capability))}))
    return path
