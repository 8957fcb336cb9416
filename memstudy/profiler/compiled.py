"""Modules given to ``torch.compile``: the graphs that AOTAutograd makes of them, op by op or with fused kernels.

Dynamo and AOTAutograd run as they would, also on fake tensors, and the min-cut partitioner decides what is saved for
the backward pass and what is computed again. Of the temporary tensors inductor's own choice is not known: followed op
by op, each has memory, as in the backend ``aot_eager_decomp_partition``, but for what inductor never writes on a GPU;
with fused kernels, a value that is only read in the kernel that computes it stays in registers. The two are the ends of
a band.
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
# A pointwise value of few reads and ops is computed anew by each kernel that reads it (torch/_inductor/ir.py,
# ``StorageBox.should_realize_on_reuse``; config.py: 4 reads, 8 for one reader, and 30 ops, an aten op being several).
_READS, _OPS = 4, 12
_WITH_GRAPHS = ("reduce-overhead", "max-autotune")  # modes with CUDA graphs


class Compiler:
    """Replaces ``torch.compile`` while a ``recorder`` follows a step.

    Attributes
    ----------
    used : bool
        Whether a module has been compiled.
    """

    def __init__(self, recorder: Recorder, *, on_gpu: bool):
        self.used = False
        self._recorder, self._compile, self._on_gpu = recorder, torch.compile, on_gpu
        # One object for a backend: modules of equal code share what Dynamo has compiled.
        self._backends = {name: functools.partial(self._follow, name) for name in BACKENDS}

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
        return self._compile(
            function,
            backend=self._backends[options.get("backend", BACKENDS[0])],
            dynamic=options.get("dynamic"),
            fullgraph=True,
        )

    def _follow(self, backend: str, graph: fx.GraphModule, inputs: list) -> Callable:
        from memstudy.profiler.internals import aot_autograd, min_cut_rematerialization_partition, select_decomp_table

        if any(isinstance(given, torch.SymInt) for given in inputs):
            raise ValueError("torch.compile: a second length makes the shapes dynamic, which is not predicted")
        run = functools.partial(self._run, inlines=backend == "inductor" and self._on_gpu)
        return aot_autograd(
            fw_compiler=run,
            bw_compiler=run,
            decompositions=select_decomp_table(),
            partition_fn=functools.partial(min_cut_rematerialization_partition, compiler="inductor"),
        )(graph, inputs)

    def _run(self, graph: fx.GraphModule, inputs: list, *, inlines: bool) -> Callable:
        """A function that runs ``graph``, and that drops its arguments when they are no longer needed."""
        runner = _Runner(graph, self._recorder, inlines=inlines)

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

    def __init__(self, graph: fx.GraphModule, recorder: Recorder, *, inlines: bool):
        super().__init__(graph)
        self._recorder = recorder
        generated = _generated(graph.graph)
        self._kernels = _kernels(graph.graph, generated)
        self._in_registers = {node for node in generated if _stays(node, self._kernels)}
        self._inlined = _inlined(graph.graph, generated) if inlines else set()
        self._keep_sources(graph.graph)

    def _keep_sources(self, graph: fx.Graph) -> None:
        """Let what an inlined value is computed from live until that value's last reader."""
        last = {given: user for user, all_given in self.user_to_last_uses.items() for given in all_given}
        place = {node: number for number, node in enumerate(graph.nodes)}
        for node in reversed(graph.nodes):
            if node in last and (node in self._inlined or _views(node)):
                for given in node.all_input_nodes:
                    last[given] = max(last[given], last[node], key=place.__getitem__)
        self.user_to_last_uses = {}
        for given, user in last.items():
            self.user_to_last_uses.setdefault(user, []).append(given)

    def run_node(self, n):
        kernel, inlined = self._kernels.get(n, 0), n in self._inlined
        self._recorder.in_kernel(kernel, in_registers=n in self._in_registers, inlined=inlined)
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


def _inlined(graph: fx.Graph, generated: set[fx.Node]) -> set[fx.Node]:
    """The values that inductor writes in no kernel on a GPU: pointwise ones that only generated kernels read."""
    known: dict[fx.Node, tuple[set[fx.Node], int]] = {}  # what a value computed anew reads, and in how many ops
    for node in graph.nodes:
        if node not in generated or not _pointwise(node):
            continue
        sources = [known.get(given, ({given}, 0)) for given in map(_viewed, node.all_input_nodes)]
        reads, ops = set().union(*(read for read, _ in sources)), 1 + sum(ops for _, ops in sources)
        readers = [*_readers(node)]
        most = _READS if len(readers) > 1 else 2 * _READS
        if readers and len(reads) <= most and ops <= _OPS and all(_inlines(reader, generated) for reader in readers):
            known[node] = reads, ops
    return {*known}


def _inlines(reader: fx.Node, generated: set[fx.Node]) -> bool:
    """Whether the kernel of ``reader`` may compute what ``reader`` reads."""
    return reader in generated and (_one_hot(reader) or reader.target.overloadpacket not in {*_SCATTER, *_PASTE})


def _pointwise(node: fx.Node) -> bool:
    others = torch.ops.prims.convert_element_type, _ATEN.full
    return torch.Tag.pointwise in node.target.tags or node.target.overloadpacket in others or _one_hot(node)


def _one_hot(node: fx.Node) -> bool:
    """Whether ``node`` puts one number in each row of a constant, as a loss's gradient: inductor makes that pointwise.

    torch/_inductor/fx_passes/joint_graph.py, ``scatter_upon_const_tensor``.
    """
    if node.target is not _ATEN.scatter.value or node.args[0].target is not _ATEN.full.default:
        return False
    shape, index = [*node.args[0].meta["val"].shape], [*node.args[2].meta["val"].shape]
    shape[node.args[1]] = 1
    return index == shape


def _views(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target.is_view


def _viewed(node: fx.Node) -> fx.Node:
    """The node whose memory ``node`` has."""
    return _viewed(node.args[0]) if _views(node) else node


def _computes(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and not node.target.is_view


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes that read ``node``, itself or through views."""
    for user in node.users:
        if user.target is operator.getitem or _views(user):
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
