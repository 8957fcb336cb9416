"""Modules given to ``torch.compile``: the graphs that AOTAutograd makes of them, op by op or with fused kernels.

Dynamo and AOTAutograd run as they would, also on fake tensors, and the min-cut partitioner decides what is saved for
the backward pass and what is computed again. Of the temporary tensors inductor's own choice is not known: followed op
by op, each has memory, as in the backend ``aot_eager_decomp_partition``; with fused kernels, a value that is only read
in the kernel that computes it stays in registers. The two are the ends of a band.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import fx

from memstudy.profiler.internals import (
    HigherOrderOperator,
    OpOverload,
    _FrameAction,
    _FrameExecStrategy,
    get_cached_ops,
    set_code_exec_strategy,
)  # fmt: skip
from memstudy.profiler.results import tensors

if TYPE_CHECKING:
    from memstudy.profiler.recorder import Recorder

_ATEN = torch.ops.aten
_SCATTER = {
    _ATEN.index_put, _ATEN.scatter, _ATEN.scatter_add, _ATEN._unsafe_masked_index_put_accumulate,
    _ATEN._unsafe_index_put, torch.ops.prims.copy_to,
}  # fmt: skip
_PASTE = {_ATEN.cat, _ATEN.slice_scatter, _ATEN.select_scatter, _ATEN.constant_pad_nd}
BACKENDS = ("inductor", "aot_eager_decomp_partition")  # which partition alike
_WITH_GRAPHS = ("reduce-overhead", "max-autotune")  # modes with CUDA graphs


class Compiler:
    """Replaces ``torch.compile`` while a ``recorder`` follows a step.

    Attributes
    ----------
    used : bool
        Whether a module has been compiled.
    """

    def __init__(self, recorder: Recorder):
        self.used = False
        self._recorder, self._compile = recorder, torch.compile
        self._backend = self._follow  # one object: modules of equal code share what Dynamo has compiled

    def compile(self, function: Callable | None = None, **options) -> Callable:
        """As ``torch.compile``; a function of tensors that need no gradient is one kernel.

        Raises
        ------
        ValueError
            For options whose memory is not predicted.
        """
        if function is None:
            return functools.partial(self.compile, **options)
        if isinstance(getattr(function, "__self__", function), torch.nn.Module):
            return self._followed(function, options)

        @functools.wraps(function)
        def run(*args, **kwargs):
            given = tensors((*args, *kwargs.values()))
            if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
                return followed()(*args, **kwargs)
            return self._recorder.as_one_kernel(function, args, kwargs)

        followed = functools.cache(lambda: self._followed(function, options))
        return run

    def _followed(self, function: Callable, options: dict) -> Callable:
        """``function``, compiled by a backend that follows its graphs."""
        _check(options)
        if not self.used:
            forget()
            # Where Dynamo lets a frame run uncompiled, it would compile the recorder within.
            skip = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
            set_code_exec_strategy(type(self._recorder).__torch_dispatch__.__code__, skip)
        self.used = True
        return self._compile(function, backend=self._backend, dynamic=options.get("dynamic"), fullgraph=True)

    def _follow(self, graph: fx.GraphModule, inputs: list) -> Callable:
        from memstudy.profiler.internals import aot_autograd, min_cut_rematerialization_partition, select_decomp_table

        if any(isinstance(given, torch.SymInt) for given in inputs):
            raise ValueError("torch.compile: a second length makes the shapes dynamic, which is not predicted")
        return aot_autograd(
            fw_compiler=self._run,
            bw_compiler=self._run,
            decompositions=select_decomp_table(),
            partition_fn=functools.partial(min_cut_rematerialization_partition, compiler="inductor"),
        )(graph, inputs)

    def _run(self, graph: fx.GraphModule, inputs: list) -> Callable:
        """A function that runs ``graph``, and that drops its arguments when they are no longer needed."""
        runner = _Runner(graph, self._recorder)

        def run(args):
            try:
                return runner.boxed_run(args)
            finally:
                runner.env = {}
                self._recorder.in_kernel(0)

        run._boxed_call = True
        return run


class _Runner(fx.Interpreter):
    """Runs a graph of ops, of which some are parts of generated kernels."""

    def __init__(self, graph: fx.GraphModule, recorder: Recorder):
        super().__init__(graph)
        self._recorder = recorder
        generated = _generated(graph.graph)
        self._kernels = _kernels(graph.graph, generated)
        self._in_registers = {node for node in generated if _stays(node, self._kernels)}

    def run_node(self, n):
        self._recorder.in_kernel(self._kernels.get(n, 0), in_registers=n in self._in_registers)
        return super().run_node(n)

    def call_function(self, target, args, kwargs):
        """As `fx.Interpreter`; an op that is computed again with the random numbers of its first time, by its parts."""
        name = target.name() if isinstance(target, HigherOrderOperator) else ""
        if name == "run_and_save_rng_state":
            return torch.get_rng_state(), args[0](*args[1:], **kwargs)
        if name == "run_with_rng_state":
            present = torch.get_rng_state()  # to be set again
            result = args[1](*args[2:], **kwargs)
            del present
            return result
        return super().call_function(target, args, kwargs)


def _generated(graph: fx.Graph) -> set[fx.Node]:
    """The ops that inductor writes kernels for: those that the partitioner calls fusible, and those that scatter."""
    from memstudy.profiler.internals import get_default_op_list

    ops = {*get_default_op_list().fusible_ops, *_SCATTER, *_PASTE}
    return {node for node in graph.nodes if _computes(node) and node.target.overloadpacket in ops}


def _kernels(graph: fx.Graph, generated: set[fx.Node]) -> dict[fx.Node, int]:
    """The number of the kernel, counted from 1, of each op in ``generated`` and of the views between them.

    Ops fuse that no other op parts. One that scatters begins a kernel.
    """
    kernels: dict[fx.Node, int] = {}
    number = 1
    for node in graph.nodes:
        number += _computes(node) and (node not in generated or node.target.overloadpacket in _SCATTER)
        if node in generated or not _computes(node):
            kernels[node] = number
    return kernels


def _stays(node: fx.Node, kernels: dict[fx.Node, int]) -> bool:
    """Whether a fused kernel keeps the value of ``node`` in registers: only ops of that kernel read the value.

    An op that scatters writes into the tensor that it is given.
    """

    def within(reader: fx.Node) -> bool:
        if reader.op == "output":
            return False
        into = _computes(reader) and reader.target.overloadpacket in _SCATTER and reader.args[0] is node
        return into or kernels.get(reader) == kernels[node]

    return all(within(reader) for reader in _readers(node))


def _computes(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and not node.target.is_view


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes that read ``node``, itself or through views."""
    for user in node.users:
        if user.target is operator.getitem or (isinstance(user.target, OpOverload) and user.target.is_view):
            yield from _readers(user)
        else:
            yield user


def _check(options: dict) -> None:
    """Raise ValueError for options of ``torch.compile`` whose memory is not predicted."""
    mode, backend, inductors = options.get("mode"), options.get("backend", "inductor"), options.get("options") or {}
    if mode in _WITH_GRAPHS or inductors.get("triton.cudagraphs"):
        raise ValueError(f"torch.compile: mode={mode!r} runs CUDA graphs, whose pools are not predicted: leave it out")
    if options.get("dynamic"):
        raise ValueError("torch.compile: dynamic=True is not predicted: leave it out, and predict one shape")
    if backend not in BACKENDS:
        raise ValueError(f"torch.compile: backend={backend!r} is not predicted; {' and '.join(BACKENDS)} are")


def forget() -> None:
    """Drop what the process has compiled, with its fake tensors, its lengths and its choice of kernels."""
    torch.compiler.reset()
    for op in get_cached_ops():
        op._dispatch_cache.clear()


def refusal(error: Exception) -> str:
    """Why ``error`` says that something is not compiled as a whole, in one line; empty for another error."""
    from memstudy.profiler.internals import BackendCompilerFailed, Unsupported

    if isinstance(error, BackendCompilerFailed):
        said = str(error.inner_exception).split("\n\nWhile executing")[0]
        return said if isinstance(error.inner_exception, ValueError) else f"torch.compile does not take this: {said}"
    if isinstance(error, Unsupported):
        said = " ".join(str(error).split("Hint:")[0].split())
        return f"torch.compile: a graph break, whose memory is not predicted: {said}"
    return ""
