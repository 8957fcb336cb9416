"""The step of a Hugging Face Trainer, predicted: its own training loop, on a twin of the Trainer with fake tensors."""

from __future__ import annotations

import copy
import random
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, cycle
from unittest.mock import patch

import numpy as np
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import recursively_apply
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl

from memstudy.profiler import Gpu, MemoryReport, predict, roles
from memstudy.profiler.recorder import CannotFollow

UPDATES = 2  # the first ends with new optimizer state
PARTS = 2  # of an accumulated batch: they reach the peak of any larger number
SAMPLE = 256  # rows among which the longest are looked for
_CONTAINERS = (dict, list, set, deque, defaultdict)


def unsupported(trainer: Trainer) -> str:
    """Why memory of the step of ``trainer`` cannot be told apart; empty if it can."""
    if trainer.is_deepspeed_enabled:
        return "DeepSpeed takes the step"
    if trainer.is_fsdp_enabled:
        return "FSDP shards the model: memstudy predict --technique fsdp --processes N predicts that"
    if trainer.args.world_size > 1:
        return f"{trainer.args.world_size} processes share the step: memstudy predict --processes N predicts that"
    if trainer.args.n_gpu > 1:
        return f"torch.nn.DataParallel shares the step among {trainer.args.n_gpu} GPUs: set CUDA_VISIBLE_DEVICES to one"
    if trainer.args.torch_compile:
        return "torch.compile wraps the model: leave torch_compile out to see its memory without compilation"
    held = models(trainer)
    for name, tensor in chain(held.named_parameters(), held.named_buffers()):
        if type(tensor) not in _followed() or tensor.layout is not torch.strided:
            return f"{name.partition('.')[2]} is a {type(tensor).__name__}, and no plain tensor"
    return ""


def models(trainer: Trainer) -> torch.nn.ModuleList:
    """The model of ``trainer``, and others that it holds, as the reference of a preference loss."""
    return torch.nn.ModuleList(value for value in vars(trainer).values() if isinstance(value, torch.nn.Module))


def longest_parts(trainer: Trainer, loader: DataLoader) -> list[object]:
    """The first parts of an update on the longest of a sample of rows, as the Trainer's own collator makes them.

    The sampler is not asked, since it counts its rows, and the random numbers that a data set draws are given back.

    Raises
    ------
    CannotFollow
        When there are no rows to look at.
    """
    if not isinstance(loader, DataLoader):
        raise CannotFollow(f"its batches come from a {type(loader).__name__}, and a DataLoader is needed")
    if isinstance(loader.dataset, IterableDataset):
        raise CannotFollow("its data set is a stream, whose rows training would miss: give one with a length")
    rows, accumulation = loader.dataset, trainer.args.gradient_accumulation_steps
    size, parts = trainer.state.train_batch_size, min(accumulation, PARTS)
    with random_numbers_kept():
        places = range(0, len(rows), max(1, len(rows) // max(SAMPLE, size * parts)))
        sample = sorted((rows[place] for place in places), key=_length, reverse=True)[: size * parts]
        return [loader.collate_fn(sample[start : start + size]) for start in range(0, len(sample), size)]


def foretell(trainer: Trainer, parts: list[object], gpu: str | Gpu | None) -> MemoryReport:
    """Predict updates of ``trainer``, whose training is about to begin, on batches like ``parts``.

    ``gpu`` is the GPU to predict for, None for this CPU. Nothing of the Trainer changes.
    """
    accumulation = trainer.args.gradient_accumulation_steps

    def build() -> Callable[[], None]:
        each = min(accumulation, PARTS)
        twin = _twin(trainer, _Fakes(), each)

        def step() -> None:
            twin._run_epoch(
                model=twin.model,
                epoch=0,
                train_dataloader=_batches(parts, on_cpu=gpu is None),
                steps_in_epoch=UPDATES * each,
                num_update_steps_per_epoch=UPDATES,
                trial=None,
                ignore_keys_for_eval=None,
                start_time=0.0,
                resume_from_checkpoint=None,
                epochs_trained=0,
                steps_trained_in_current_epoch=0,
            )

        # The Trainer fetches all parts of an update before the first runs.
        step.fetched = [_copy(parts[-1], on_cpu=gpu is None) for _ in range(accumulation - each)]
        return step

    with random_numbers_kept():
        report = predict(build, gpu=gpu, iterations=1, repeats=max(0, accumulation - PARTS))
    # Before the first update the twin only fetches a batch.
    return replace(report, iteration_peaks=report.iteration_peaks[1:])


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """Give back the random numbers that the block draws."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - training draws from it
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def _length(row: object) -> int:
    """Elements of a row's longest field."""
    fields = row.values() if isinstance(row, dict) else row if isinstance(row, (tuple, list)) else [row]
    sizes = (field.numel() if isinstance(field, torch.Tensor) else np.size(field) for field in fields)
    return max(sizes, default=0)


def _batches(parts: list[object], *, on_cpu: bool) -> Iterator[object]:
    """Batches like ``parts`` without end.

    Accelerate's `DataLoaderShard` has the next batch on the host before it gives one.
    """
    made = (_copy(part, on_cpu=on_cpu) for part in cycle(parts))
    if not on_cpu:
        yield from made
    current = next(made)
    for coming in made:
        yield current
        current = coming


def _copy(batch: object, *, on_cpu: bool) -> object:
    """A fake ``batch``. What the collator names twice moves to a GPU twice."""
    made: dict[int, torch.Tensor] = {}

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made or not on_cpu:
            made[id(tensor)] = tensor.clone()
        return made[id(tensor)]

    return recursively_apply(copied, batch)


def _followed() -> list[type[torch.Tensor]]:
    """The types of tensors that have fakes: plain ones, and bitsandbytes' weights in 4 and 8 bits."""
    layers = sys.modules.get("bitsandbytes.nn.modules")
    quantised = [layers.Params4bit, layers.Int8Params] if layers else []
    return [torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, *quantised]


class _Fakes:
    """Deep copies that have fake tensors in place of real ones; those of one storage share one."""

    def __init__(self):
        self._memo: dict[int, object] = {}  # as `copy.deepcopy` takes it
        self._storages: dict[int, torch.Tensor] = {}

    def copy(self, value: object) -> object:
        """A deep copy of ``value``; what is copied twice is one object."""
        with patch.dict(copy._deepcopy_dispatch, dict.fromkeys(_followed(), self._fake)):
            return copy.deepcopy(value, self._memo)

    def _fake(self, value: torch.Tensor, memo: dict) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = torch.empty(storage.nbytes(), dtype=torch.uint8)
        flat = self._storages[storage._cdata].view(value.dtype)
        fake = flat.as_strided(value.shape, value.stride(), value.storage_offset())
        if not isinstance(value, torch.nn.Parameter):
            return fake
        parameter = memo[id(value)] = type(value)(fake, requires_grad=value.requires_grad)
        vars(parameter).update(copy.deepcopy(vars(value), memo))  # among them a quantised weight's scales
        return parameter


def _twin(trainer: Trainer, fakes: _Fakes, parts: int) -> Trainer:
    """A Trainer that does what ``trainer`` does, on ``fakes``; it shares no mutable state."""
    model = fakes.copy(trainer.model)
    twin = copy.copy(trainer)
    for name, value in vars(trainer).items():
        if isinstance(value, torch.nn.Module) or (type(value) in _CONTAINERS and not name.endswith("_dataset")):
            setattr(twin, name, fakes.copy(value))
    for module in models(twin).modules():
        for name, parameter in module._parameters.items():
            module.register_parameter(name, parameter)  # tells the profiler, which watches registrations
    twin.args = copy.copy(trainer.args)
    twin.args.gradient_accumulation_steps = parts
    vars(twin.args)["_setup_devices"] = torch.device("cpu")  # where a prediction runs, for whatever device
    twin._prepare_inputs = lambda inputs: inputs
    twin.model = twin.model_wrapped = model
    twin.accelerator = copy.copy(trainer.accelerator)
    if trainer.accelerator.scaler is not None:
        twin.accelerator.scaler = torch.amp.GradScaler("cuda")
    optimizer = _optimizer(trainer.optimizer.optimizer, fakes)
    twin.optimizer = AcceleratedOptimizer(optimizer, device_placement=False, scaler=twin.accelerator.scaler)
    twin.accelerator._models, twin.accelerator._optimizers = [model], [twin.optimizer]
    twin.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(twin.optimizer, lambda step: 1.0)
    twin.state, twin.control = copy.copy(trainer.state), TrainerControl()
    twin.callback_handler = copy.copy(trainer.callback_handler)
    twin.callback_handler.callbacks = [_Iterations()]
    twin._tr_loss = torch.tensor(0.0)
    return twin


def _optimizer(optimizer: torch.optim.Optimizer, fakes: _Fakes) -> torch.optim.Optimizer:
    """The ``optimizer`` of the fakes. `copy.deepcopy` would lose what `Optimizer.__getstate__` leaves out."""
    twin = object.__new__(type(optimizer))
    vars(twin).update(
        (name, copy.copy(value) if type(value) in _CONTAINERS else value) for name, value in vars(optimizer).items()
    )
    vars(twin).pop("step", None)  # a scheduler's wrapper, which steps the other
    twin.param_groups, twin.state = fakes.copy(optimizer.param_groups), fakes.copy(optimizer.state)
    if hasattr(optimizer, "mng"):
        twin.mng = _overrides(optimizer)
    return twin


def _overrides(optimizer: torch.optim.Optimizer) -> object:
    """A copy of bitsandbytes' manager that knows by their places the weights whose state keeps 32 bits.

    It finds them by their addresses, which fakes lack: bitsandbytes/optim/optimizer.py, ``check_overrides``.
    """
    manager = copy.copy(optimizer.mng)
    kept = {id(getattr(module, name)): config for module, name, config in manager.module_weight_config_triple}
    manager.module_weight_config_triple = []
    manager.index2config = manager.index2config | {
        (group, place): kept[id(parameter)]
        for group, others in enumerate(optimizer.param_groups)
        for place, parameter in enumerate(others["params"])
        if id(parameter) in kept
    }
    return manager


class _Iterations(TrainerCallback):
    """Tells the profiler where an update begins."""

    def on_step_begin(self, args, state, control, **_):
        roles.next_iteration()
