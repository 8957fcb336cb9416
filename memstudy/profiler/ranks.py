"""Several processes, of which only the first is there: ``torch.distributed`` as that one sees it.

Collectives return at once and leave the tensors as they are. What the first process holds of a model that is shared by
DDP or FSDP is then the same as beside real others, so that a step in many processes can be predicted, or measured, in
one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from torch._C._distributed_c10d import _create_work_from_future
from torch.distributed import device_mesh
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp._fully_shard import _fsdp_init
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import _disable_current_modes

_BACKEND = "memstudy_first_process"


class _FirstProcess(dist.ProcessGroup):
    """A group whose other processes are not there."""

    def _done(self, tensors: list[torch.Tensor]) -> dist.Work:
        future = torch.futures.Future()
        future.set_result(tensors)
        return _create_work_from_future(future)

    def allreduce(self, tensors, options=None):
        return self._done(tensors)

    broadcast = reduce = allreduce

    def allgather(self, outputs, inputs, options=None):
        for output in outputs[0]:  # the others have what this one has
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
    """In the block this process is the first of ``processes`` that ``torchrun`` has started, and the only one there.

    Raises
    ------
    ValueError
        When this process is one of several already.
    """
    if dist.is_initialized():
        raise ValueError(f"processes={processes}: this process is one of {dist.get_world_size()} already")
    started = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    # Accelerate would else choose a number of threads, for good, and name the device cpu:0.
    started |= {"OMP_NUM_THREADS": str(torch.get_num_threads()), "ACCELERATE_TORCH_DEVICE": "cpu"}
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, started))
        for remembered in (PartialState, AcceleratorState):  # how many processes there are
            stack.enter_context(patch.dict(remembered._shared_state, clear=True))
        stack.enter_context(patch.object(sys, "excepthook", sys.excepthook))  # is made to name the process
        dist.init_process_group(_BACKEND, store=dist.HashStore(), rank=0, world_size=processes)
        stack.callback(dist.destroy_process_group)
        yield


@contextmanager
def on_fake_tensors() -> Iterator[None]:
    """In the block ``torch.distributed`` does beside the prediction what is no part of the step: it asks itself which
    shape an op's result will have, and with real tensors what it reads numbers from.

    DDP puts its buckets together anew after the first step, in another order: of the same size, so that the first ones
    may stay.
    """

    def really(function: Callable) -> Callable:
        def call(*args, **kwargs):
            with _disable_current_modes():
                return function(*args, **kwargs)

        return call

    shapes = "_propagate_tensor_meta_non_cached"
    make_mesh = really(device_mesh.init_device_mesh)
    with (
        patch.object(torch._C, "_get_accelerator", lambda: torch.device("cpu")),
        patch.object(DeviceMesh, "__init__", really(DeviceMesh.__init__)),
        patch.object(DeviceMesh, "__getitem__", really(DeviceMesh.__getitem__)),
        patch.object(device_mesh, "init_device_mesh", make_mesh),
        patch.object(dist, "init_device_mesh", make_mesh),
        patch.object(_fsdp_init, "init_device_mesh", make_mesh),
        patch.object(ShardingPropagator, shapes, really(getattr(ShardingPropagator, shapes))),
        patch.object(dist, "_verify_params_across_processes", lambda *args: None),
        patch.object(dist.Reducer, "_rebuild_buckets", lambda reducer: False),
    ):
        yield
