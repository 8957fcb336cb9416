"""``torch.distributed`` as the first of several processes sees it, when no other process exists.

Collectives return at once, without communication. The first process then holds as much of a DDP or FSDP model as among
real peers, so that a step in many processes can be predicted, or measured, in one process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pkgutil import resolve_name
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState

from memstudy.profiler.internals import (
    ACCELERATOR,
    BOOKKEEPING,
    CHECK_OF_PROCESSES,
    REBUILD_BUCKETS,
    FakeTensor,
    _create_work_from_future,
    _disable_current_modes,
)

_BACKEND = "memstudy_first_process"


class _FirstProcess(dist.ProcessGroup):
    """A process group in which only the first process exists.

    PyTorch's own ``fake`` backend does not serve DDP, whose hook wants the result of an all-reduce and finds none.
    """

    def _done(self, tensors: list[torch.Tensor]) -> dist.Work:
        future = torch.futures.Future()
        future.set_result(tensors)
        return _create_work_from_future(future)

    def allreduce(self, tensors, options=None):
        return self._done(tensors)

    broadcast = reduce = allreduce

    def allgather(self, outputs, inputs, options=None):
        for output in outputs[0]:  # as if every process had this input
            output.copy_(inputs[0])
        return self._done(outputs[0])

    def all_gather_single(self, output, input, options=None):
        return self._done([output])

    reduce_scatter_single = all_gather_single

    def barrier(self, options=None):
        return self._done([])

    def getBackendName(self):
        return _BACKEND

    @property
    def group_name(self):
        return dist.distributed_c10d._world.pg_names[self]


dist.Backend.register_backend(_BACKEND, lambda store, rank, size, timeout: _FirstProcess(rank, size), devices=["cpu"])


@contextmanager
def first_of(processes: int) -> Iterator[None]:
    """Within the block, this process is the first of ``processes`` started by ``torchrun``; the others do not exist.

    Raises
    ------
    ValueError
        When this process is one of several already.
    """
    if dist.is_initialized():
        raise ValueError(f"processes={processes}: this process is one of {dist.get_world_size()} already")
    started = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    # Otherwise Accelerate would set the number of threads permanently and name the device cpu:0.
    started |= {"OMP_NUM_THREADS": str(torch.get_num_threads()), "ACCELERATE_TORCH_DEVICE": "cpu"}
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, started))
        for remembered in (PartialState, AcceleratorState):  # they cache the number of processes
            stack.enter_context(patch.dict(remembered._shared_state, clear=True))
        stack.enter_context(patch.object(sys, "excepthook", sys.excepthook))  # replaced by init_process_group
        dist.init_process_group(_BACKEND, store=dist.HashStore(), rank=0, world_size=processes)
        stack.callback(dist.destroy_process_group)
        yield


@contextmanager
def on_fake_tensors() -> Iterator[None]:
    """Within the block, exclude the bookkeeping of ``torch.distributed`` from the prediction.

    DTensor computes the shapes of results by itself, and device meshes read numbers from real tensors. DDP keeps its
    first buckets: the buckets rebuilt after the first step have another order but equal size. FSDP1 finds the units to
    shard again after backward by their data pointers, which fake tensors don't have
    (torch/distributed/fsdp/_runtime_utils.py, ``_catch_all_reshard``): their storages' addresses stand in.
    """

    def really(function: Callable) -> Callable:
        def call(*args, **kwargs):
            with _disable_current_modes():
                return function(*args, **kwargs)

        return call

    def pointer(tensor: torch.Tensor, really=torch.Tensor.data_ptr) -> int:
        if isinstance(tensor, FakeTensor):
            return tensor.untyped_storage()._cdata + tensor.storage_offset() * tensor.itemsize
        return really(tensor)

    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.Tensor, "data_ptr", pointer))
        stack.enter_context(patch(ACCELERATOR, lambda: torch.device("cpu")))
        stack.enter_context(patch(CHECK_OF_PROCESSES, lambda *args: None))
        stack.enter_context(patch(REBUILD_BUCKETS, lambda reducer: False))
        for name in BOOKKEEPING:
            stack.enter_context(patch(name, really(resolve_name(name))))
        yield
