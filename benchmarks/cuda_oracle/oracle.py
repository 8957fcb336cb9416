"""The bytes that CUDA's own dispatch requests in each case of ``cases.py``, without a GPU: see README.md.

The step runs on fake ``cuda`` tensors, so that the CUDA build of PyTorch itself decides on kernels, casts and
saved tensors. Each new storage is counted once, in requested bytes. Scratch inside a kernel (such as cuBLAS's
workspace) is not seen, and sizes are not rounded as in the caching allocator.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import torch
from cases import CASES, Case, build
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import _engine_run_backward
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from memstudy.profiler.accounting import account
from memstudy.profiler.events import Event
from memstudy.profiler.report import MemoryReport
from memstudy.profiler.roles import Roles

TABLE = Path(__file__).with_name("oracle.csv")
ITERATIONS = 2


class Recorder(TorchDispatchMode):
    """Records each op with the bytes of new storages on ``device`` that it returns, and the storages' release.

    Attributes
    ----------
    events : list of Event
        For :func:`~memstudy.profiler.report.account`.
    ops : list of str
        ``phase, op, bytes of new storages, shapes and dtypes of its results`` of each op, in order.
    """

    def __init__(self, device: str):
        super().__init__()
        self.device = device
        self.events: list[Event] = []
        self.ops: list[str] = []
        self.phase, self.in_optimizer = "build", False
        self._alive: dict[int, weakref.ref] = {}

    def enter(self, phase: str) -> None:
        if phase != self.phase:
            self.phase = phase
            self.tell("phase", label=phase)

    def tell(self, kind: str, *, block: int = 0, size: int = 0, label: str = "") -> None:
        self.events.append(Event(kind, 0.0, block, size, label))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.phase != "build" and not self.in_optimizer and func.namespace != "profiler":
            self.enter("backward" if torch._C._current_autograd_node() is not None else "forward")
        if func is torch.ops.aten._local_scalar_dense.default:
            # The step asks for a tensor's value, which a fake tensor does not have.
            return True if args[0].dtype is torch.bool else 1.0 if args[0].is_floating_point() else 1
        if func is torch.ops.aten.add.Tensor and _engine_adds_in_place(*args[:2]):
            return args[0]
        result = func(*args, **(kwargs or {}))
        results = [value for value in tree_iter(result) if isinstance(value, torch.Tensor)]
        made = sum(self._note(value) for value in results)
        told = " ".join(f"{str(v.dtype).removeprefix('torch.')}{list(v.shape)}@{v.device.type}" for v in results)
        self.ops.append(f"{self.phase} {func} {made} {told}")
        return result

    def _note(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._alive.get(key)
        if tensor.device.type != self.device or (known is not None and known() is not None):
            return 0
        self._alive[key] = weakref.ref(storage, lambda _: self.tell("free", block=key))
        self.tell("alloc", block=key, size=storage.nbytes())
        return storage.nbytes()


def _engine_adds_in_place(gradient: torch.Tensor, other: object) -> bool:
    """True if autograd's engine adds two gradients, and nothing else uses the storage of ``gradient``.

    This add is in place, except for fake tensors (``can_accumulate_inplace``, torch/csrc/autograd/input_buffer.cpp).
    """
    alike = isinstance(other, torch.Tensor) and (gradient.shape, gradient.dtype) == (other.shape, other.dtype)
    # The two users are the tensor and the Python storage object made by this call.
    return alike and _engine_calls() and torch._C._storage_Use_Count(gradient.untyped_storage()._cdata) == 2


def _engine_calls() -> bool:
    frame = sys._getframe(3)  # above _engine_calls, _engine_adds_in_place and __torch_dispatch__
    while frame is not None and frame.f_code.co_filename.endswith(("torch/_compile.py", "torch/_dynamo/eval_frame.py")):
        frame = frame.f_back
    # The engine's own thread for a GPU has no Python frame below.
    return frame is None or frame.f_code is _engine_run_backward.__code__


@contextmanager
def _optimizer_phase(recorder: Recorder) -> Iterator[None]:
    def begin(*_):
        recorder.in_optimizer = True
        recorder.enter("optimizer")

    def end(*_):
        recorder.in_optimizer = False

    handles = [register_optimizer_step_pre_hook(begin), register_optimizer_step_post_hook(end)]
    yield
    for handle in handles:
        handle.remove()


def trace(case: Case, device: str) -> tuple[MemoryReport, list[str]]:
    """Trace ``ITERATIONS`` steps of ``case``; return the report and :attr:`Recorder.ops`."""
    recorder = Recorder(device)

    def mark():
        category, keys = roles.told[-1]
        for key in keys:
            recorder.tell("is", block=key, label=category)

    roles = Roles(mark=mark, key=lambda tensor: tensor.untyped_storage()._cdata)
    with ExitStack() as stack:
        stack.enter_context(roles.watch())
        stack.enter_context(_optimizer_phase(recorder))
        # While traced, transformers makes every mask that the data might need; the patch hides the tracing.
        stack.enter_context(patch("transformers.utils.import_utils.is_fake_tensor", lambda tensor: False))
        # PyTorch uses its foreach functions for plain tensors only; here, fake tensors stand for plain ones.
        for known_types in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
            stack.enter_context(patch(f"{known_types}._foreach_supported_types", [torch.nn.Parameter, FakeTensor]))
        fake = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        fake.cache_enabled = False  # the cache rebuilds an output that is a slice with too small a storage
        stack.enter_context(recorder)
        step = build(case, device)
        roles.watch_gradients()
        for _ in range(ITERATIONS):
            gc.collect()
            recorder.enter("forward")
            recorder.tell("iteration")
            roles.tell_parameters()
            step()
    return account(recorder.events, device=device, kind="predicted"), recorder.ops


def row(case: Case, device: str, folder: Path | None) -> dict[str, object]:
    """A line of ``oracle.csv``: bytes at the peak and at the end of the last forward pass, by category."""
    report, ops = trace(case, device)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{case.name}.txt").write_text("\n".join(ops) + "\n")
    names = (op.split()[1].split(".")[1] for op in ops)
    return {
        "case": case.name,
        "compute_capability": "".join(map(str, torch.cuda.get_device_capability())) if device == "cuda" else "none",
        "attention_kernels": " ".join(sorted({name for name in names if re.search("attention(?!.*backward)", name)})),
        "peak_bytes": report.peak_bytes,
        "forward_end_bytes": sum(report.forward_end_by_category.values()),
        **{f"peak_{name}_bytes": count for name, count in report.peak_by_category.items()},
        **{f"forward_end_{name}_bytes": count for name, count in report.forward_end_by_category.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--table", type=Path, default=TABLE, help="CSV; its rows of this capability are replaced")
    parser.add_argument("--ops", type=Path, help="folder for a list of each case's ops")
    parser.add_argument("--only", default="", help="run the cases whose names contain this, and print them")
    chosen = parser.parse_args()
    rows = []
    for case in CASES:
        if chosen.only in case.name:
            rows.append(row(case, chosen.device, chosen.ops))
            print(rows[-1]["case"], rows[-1]["attention_kernels"], rows[-1]["peak_bytes"], sep="\t", flush=True)
    if chosen.only:
        return
    table = pd.DataFrame(rows)
    if chosen.table.exists():
        before = pd.read_csv(chosen.table, dtype={"compute_capability": str})
        table = pd.concat([before[before.compute_capability != table.compute_capability[0]], table])
    table.sort_values(["compute_capability"], kind="stable").to_csv(chosen.table, index=False)


if __name__ == "__main__":
    main()
