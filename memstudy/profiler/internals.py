"""The private names of PyTorch that the profiler needs, as torch 2.13.0 has them.

Another release may move or drop a name: pyproject.toml pins the release, and importing this file fails with the name
that is gone. What the profiler replaces during a prediction is given by dotted name, so that FSDP and DTensor are
imported for several processes only. Private attributes of PyTorch's objects stay where they are read:
``OpOverload._schema``, ``._overloadname``, ``._dispatch_cache`` and ``._op_dk``, ``FakeTensor._fake_device``,
``UntypedStorage._cdata``, ``TorchDispatchMode._should_skip_dynamo``, ``Tensor._make_subclass``.
"""

import importlib

from torch._C import (
    DispatchKey,
    DispatchKeySet,
    _current_autograd_node,
    _DisableTorchDispatch,
    _ExcludeDispatchKeyGuard,
    _set_warn_deprecated_on_mutable_data_ptr,
    _storage_Use_Count,
)
from torch._C._autograd import _get_current_graph_task_keep_graph
from torch._C._distributed_c10d import _create_work_from_future
from torch._C._dynamo.eval_frame import (
    _FrameAction,
    _FrameExecStrategy,
    set_code_exec_strategy,
)
from torch._library.custom_ops import OPDEFS
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket, get_cached_ops
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.autograd.graph import _engine_run_backward
from torch.cpu import _default_cpu_stream
from torch.library import _scoped_library
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map_only

FOREACH_TYPES = (
    "torch.optim.optimizer._foreach_supported_types",
    "torch.utils._foreach_utils._foreach_supported_types",
)
FOREACH_DEVICES = "torch.optim.optimizer._get_foreach_kernels_supported_devices"
ACCELERATOR = "torch._C._get_accelerator"
CHECK_OF_PROCESSES = "torch.distributed._verify_params_across_processes"
REBUILD_BUCKETS = "torch.distributed.Reducer._rebuild_buckets"
# What must run on real tensors while a prediction's modes are active.
BOOKKEEPING = (
    "torch.distributed.device_mesh.DeviceMesh.__init__",
    "torch.distributed.device_mesh.DeviceMesh.__getitem__",
    "torch.distributed.device_mesh.init_device_mesh",
    "torch.distributed.init_device_mesh",
    "torch.distributed.fsdp._fully_shard._fsdp_init.init_device_mesh",
    "torch.distributed.tensor._sharding_prop.ShardingPropagator._propagate_tensor_meta_non_cached",
)

# Of the compiler, which takes a second to import: only a step that compiles needs these names.
_OF_THE_COMPILER = {
    "aot_autograd": "torch._dynamo.backends.common",
    "BackendCompilerFailed": "torch._dynamo.exc",
    "Unsupported": "torch._dynamo.exc",
    "get_default_op_list": "torch._functorch.partitioners",
    "min_cut_rematerialization_partition": "torch._functorch.partitioners",
    "select_decomp_table": "torch._inductor.decomposition",
}


def __getattr__(name: str) -> object:
    if name not in _OF_THE_COMPILER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_OF_THE_COMPILER[name]), name)
