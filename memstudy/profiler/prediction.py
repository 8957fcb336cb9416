"""Training memory, predicted: the real step on fake tensors, which have shapes but no bytes.

The step runs under PyTorch's ``FakeTensorMode``, so it takes no memory and no arithmetic. A dispatch mode
sees each new storage once and, by a weak reference, its release. A kernel's internal allocations are seen if the kernel
is written in Python (a ``torch.library.custom_op``); otherwise rules compute them: `cpu` for this machine, `cuda` for a
GPU. For a GPU, the step also runs with CUDA's semantics and its requests go through a replay of the caching allocator
(`allocator`). Predicted and measured events share the accounting (`accounting`).
"""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import groupby
from unittest.mock import patch

import torch

from memstudy.profiler import cuda
from memstudy.profiler.accounting import account
from memstudy.profiler.allocator import replay
from memstudy.profiler.catalogue import Gpu, find_gpu
from memstudy.profiler.compiled import forget, refusal
from memstudy.profiler.events import MIB, Event, with_fused_kernels
from memstudy.profiler.internals import (
    FOREACH_TYPES,
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from memstudy.profiler.isolation import files_on_real_tensors, modules_on_real_tensors, tables_of_bitsandbytes
from memstudy.profiler.recorder import ON_CUDA, CannotFollow, Recorder, key_of
from memstudy.profiler.report import MemoryReport
from memstudy.profiler.roles import Roles, Step, watch_modules, watch_optimizers
from memstudy.profiler.subclasses import copying_fake_tensors, making_fake_subclasses
from memstudy.profiler.time.cost import StepTime, step_time

_BY_DATA = (DynamicOutputShapeException, DataDependentOutputException)
# Errors of a CPU build of PyTorch when build() asks for CUDA without making a tensor.
_NO_CUDA = ("not compiled with CUDA", "not linked with support for cuda", "Cannot get CUDA generator")


def predict(
    build: Callable[[], Step],
    *,
    gpu: str | Gpu | None = None,
    iterations: int = 2,
    expandable_segments: bool = False,
    processes: int = 1,
    repeats: int = 0,
    semantics: cuda.Semantics = cuda.TODAY,
) -> MemoryReport:
    """Predict what :func:`~memstudy.profiler.measure` would report, without running the step.

    Parameters
    ----------
    build : callable
        Makes model, optimizer and inputs, and returns ``step``; runs on fake tensors. Everything must be on the CPU,
        even for a GPU; ``torch.autocast("cuda")`` and ``GradScaler("cuda")`` may be used.
    gpu : str or Gpu, optional
        The GPU to predict for: a name in `catalogue`, or the path of a YAML file that describes one. None
        predicts for this CPU.
    iterations : int
        How many steps to predict; at least 1.
    expandable_segments : bool
        Whether the GPU's allocator runs with ``PYTORCH_ALLOC_CONF=expandable_segments:True``.
    processes : int
        How many processes share the step, each on its own device. The first process is predicted: ``build`` finds
        ``torch.distributed`` as ``torchrun`` and ``init_process_group`` set it up there.
    repeats : int
        How often the step that is timed repeats its last forward and backward pass: ``build`` may accumulate two parts
        of many, which reach the peak of all.
    semantics : Semantics
        CUDA's semantics in the PyTorch release to predict for.

    Returns
    -------
    MemoryReport
        ``kind="predicted"``. For a GPU, allocated bytes are the sizes of the caching allocator's blocks, and the report
        has the reserved memory, the process's whole memory, and the first request to fail if the step does not fit.

    Raises
    ------
    ValueError
        When ``iterations`` or ``processes`` is below 1, the GPU is unknown, the step trains a parameter
        made outside ``build``, ``build`` asks for a CUDA device, the step asks for what only its data can say, or this
        process is one of several already.
    """
    if iterations < 1:
        raise ValueError(f"iterations={iterations}: at least 1 step must run")
    if processes < 1:
        raise ValueError(f"processes={processes}: at least 1 process must run the step")
    card = find_gpu(gpu) if isinstance(gpu, str) else gpu
    recorder, events = follow(build, iterations, card, processes, semantics)
    reported = partial(
        report_of,
        recorder=recorder,
        card=card,
        expandable_segments=expandable_segments,
        uncounted=["NCCL's buffers (not counted)"] * (processes > 1),
    )
    return reported(
        events,
        requested_bytes=None if card is None else recorder.requested_bytes,
        time=time_of(recorder, card, repeats=repeats, processes=processes),
        fused=reported(with_fused_kernels(events)) if recorder.compiler.used else None,
        issued=recorder.issued.now if card is not None and card.speed else (),
    )


def report_of(
    events: Iterable[Event],
    recorder: Recorder,
    card: Gpu | None,
    *,
    expandable_segments: bool,
    uncounted: Iterable[str] = (),
    **others,
) -> MemoryReport:
    """The report of predicted ``events``, on a GPU after a replay of its allocator; ``others`` as in `account`."""
    unverified = (*sorted(recorder.below.unverified | recorder.assumed), *uncounted)
    if card is None:
        return account(events, device="cpu", kind="predicted", unverified=unverified, **others)
    replayed = replay(events, capacity=card.capacity_bytes, expandable_segments=expandable_segments)
    return account(
        replayed.events,
        device=card.name,
        kind="predicted",
        peak_reserved_bytes=replayed.peak_reserved,
        context_bytes=int(card.context_mib * MIB),
        memory_bytes=int(card.memory_mib * MIB),
        out_of_memory=replayed.out_of_memory,
        gpu=card,
        unverified=unverified,
        **others,
    )


def time_of(
    recorder: Recorder, card: Gpu | None, *, step: int = -1, repeats: int = 0, processes: int = 1
) -> StepTime | None:
    """The time of the ``step``, by its index, whose last forward and backward pass come ``repeats`` more times.

    None without a GPU of known speed, and with compiled modules, whose kernels are not known.
    """
    if card is None or not card.speed or recorder.compiler.used:
        return None
    issued, untimed = recorder.issued.by_step[step], recorder.issued.untimed.copy()
    if processes > 1:
        untimed.add("communication between processes")
    if card.speed.watts < 100:
        untimed.add(f"the power limit of {card.speed.watts:g} W, but for products on tensor cores")
    if repeats:
        phases = [phase for phase, _ in issued]
        end = len(phases) - phases[::-1].index("backward")
        begin = next(i for i in range(1, end) if phases[i - 1 : i + 1] == ["backward", "forward"])
        issued = [*issued[:end], *issued[begin:end] * repeats, *issued[end:]]
    return step_time(issued, card, untimed=tuple(sorted(untimed)))


def follow(
    build: Callable[[], Step], iterations: int, card: Gpu | None, processes: int, semantics: cuda.Semantics
) -> tuple[Recorder, list[Event]]:
    """Run ``build`` and the steps on fake tensors; return the recorder and its events."""
    if "transformers" in sys.modules:
        # transformers imports lazily, and must not detect flash-attn while our stand-in is installed.
        import transformers.modeling_utils  # noqa: F401
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    recorder = Recorder(fake, card, semantics)
    if processes > 1:
        from torch.distributed.tensor import DTensor

        from memstudy.profiler.ranks import first_of, on_fake_tensors

        recorder.wrapper = DTensor
    roles = Roles(mark=lambda: recorder.mark(roles.told[-1]), key=key_of)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # Trainer counts parameters by it
        warnings.filterwarnings("ignore", "Using `torch.compile.module.` when there are global hooks")
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        stack.enter_context(roles.watch())
        stack.enter_context(watch_optimizers(recorder.begin_optimizer, recorder.end_optimizer))
        stack.enter_context(watch_modules(recorder.modules.append, recorder.modules.pop))
        stack.enter_context(patch("memstudy.profiler.roles.next_iteration", recorder.begin_step))
        stack.enter_context(modules_on_real_tensors())
        stack.enter_context(files_on_real_tensors())
        stack.enter_context(patch("torch.cuda.empty_cache", recorder.empty_cache))
        stack.enter_context(patch("torch.compile", recorder.compiler.compile))
        stack.enter_context(patch.object(FakeTensor, "numpy", lambda tensor, **_: recorder.array(tensor), create=True))
        # Without this, torch's foreach path rejects FakeTensor parameters.
        types = [torch.Tensor, torch.nn.Parameter, FakeTensor]
        for name in FOREACH_TYPES:
            stack.enter_context(patch(name, types))
        if card is not None:
            stack.enter_context(cuda.as_on(card, semantics, recorder.transfer))
        else:
            # The state's tensor is made below dispatch; checkpointing keeps one per block.
            stack.enter_context(patch("torch.get_rng_state", recorder.noting(torch.get_rng_state)))
        stack.enter_context(patch("torch.utils.swap_tensors", swap_tensors))
        stack.enter_context(making_fake_subclasses())
        stack.enter_context(copying_fake_tensors())
        stack.enter_context(tables_of_bitsandbytes(anew=card is not None))
        stack.enter_context(fake)
        stack.enter_context(recorder)
        if processes > 1:
            stack.enter_context(first_of(processes))
            stack.enter_context(on_fake_tensors())
            stack.enter_context(patch("torch.UntypedStorage.resize_", recorder.resizing(torch.UntypedStorage.resize_)))
        if "transformers" in sys.modules:
            # For fake tensors, transformers assumes tracing and makes every mask that any data could need.
            stack.enter_context(patch("transformers.utils.import_utils.is_fake_tensor", lambda tensor: False))
        # Collect cycles between steps, or their release comes at a random time; freeze() skips all older objects.
        gc.freeze()
        stack.callback(gc.unfreeze)
        try:
            step = build()
            recorder.end_build()
            roles.watch_gradients()
            for _ in range(iterations):
                gc.collect()
                recorder.begin_step()
                roles.tell_parameters()
                step()
            # Without the releases of what the step and the libraries hold.
            events = recorder.events.copy() if card is None else _oldest_first(recorder.events)
        except _BY_DATA as error:
            raise ValueError(f"the step asks for what only its data can say, by {error.func}") from error
        except (AssertionError, RuntimeError) as error:
            if recorder.compiler.used and (refused := refusal(error)):
                raise ValueError(refused) from error
            if not any(text in str(error) for text in _NO_CUDA):
                raise
            raise CannotFollow(ON_CUDA) from error
        finally:
            if recorder.compiler.used:
                forget()
    return recorder, events


def _oldest_first(events: list[Event]) -> list[Event]:
    """The events, where blocks that are freed one after the other are freed in the order of their allocation.

    Autocast frees its copies of weights in the order of their addresses, which differ from run to run.
    """
    ordered: list[Event] = []
    allocated: dict[int, int] = {}
    for frees, run in groupby(events, key=lambda event: event.kind == "free"):
        run = list(run)
        if frees:
            oldest = sorted(run, key=lambda event: allocated[event.block])
            run = [
                replace(event, time_ms=at.time_ms, issued=at.issued, kernel=at.kernel)
                for event, at in zip(oldest, run, strict=True)
            ]
        allocated |= {event.block: place for place, event in enumerate(run, len(ordered)) if event.kind == "alloc"}
        ordered += run
    return ordered


def swap_tensors(one: torch.Tensor, other: torch.Tensor, swap=torch.utils.swap_tensors) -> None:
    """Give ``one`` the data of ``other``, as ``Module._apply`` does with tensors that are not fake.

    For fake tensors it would swap them, which other references forbid.
    """
    if isinstance(one, FakeTensor) and isinstance(other, FakeTensor):
        one.data = other.data
    else:
        swap(one, other)
