"""The cell magics of ``%load_ext memstudy``: ``%%memory`` measures a cell, ``%%predict`` predicts a cell."""

from __future__ import annotations

import symtable
from types import CodeType

from IPython.core.error import UsageError
from IPython.core.magic import Magics, cell_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments, parse_argstring

from memstudy.profiler import MemoryReport, find_gpu, measure, predict
from memstudy.profiler.recorder import CannotFollow


@magics_class
class MemoryMagics(Magics):
    """``%%memory`` and ``%%predict``; each shows a report, and keeps the report in a variable if given its name."""

    @magic_arguments()
    @argument("name", nargs="?", help="the variable that gets the report, a MemoryReport")
    @cell_magic
    def memory(self, line: str, cell: str) -> MemoryReport:
        """Measure the memory of the cell on this machine: its peak by category, and when it was used.

        The cell is run, and its variables stay. If the cell defines a function ``step``, two calls of the function are
        measured too: the second has the optimizer's state from its beginning on.
        """
        asked = parse_argstring(self.memory, line)
        code, has_step = self._compiled(cell)

        def build():
            if not has_step:
                return lambda: self._run(code, self.shell.user_ns)
            return self._run(code, self.shell.user_ns)["step"]

        return self._kept(measure(build, iterations=2 if has_step else 1), asked.name)

    @magic_arguments()
    @argument("--gpu", help="a name from `memstudy list gpus`, or a .yaml file; without it, this CPU")
    @argument("name", nargs="?", help="the variable that gets the report, a MemoryReport")
    @cell_magic
    def predict(self, line: str, cell: str) -> MemoryReport:
        """Predict the memory and the time of a training step, on a GPU that is not here; nothing is computed.

        The cell makes model, optimizer and inputs, on the CPU, and ends with a function ``step`` that takes one
        training step. The cell sees the notebook's variables; its own are gone afterwards.
        """
        asked = parse_argstring(self.predict, line)
        code, has_step = self._compiled(cell)
        if not has_step:
            raise UsageError("%%predict: the cell has no step: end it with `def step():` that takes one training step")
        try:
            gpu = find_gpu(asked.gpu) if asked.gpu else None
        except ValueError as error:
            raise UsageError(f"%%predict --gpu: {error}") from None
        try:
            report = predict(lambda: self._run(code, dict(self.shell.user_ns))["step"], gpu=gpu)
        except CannotFollow as error:
            raise UsageError(f"%%predict: {error}") from None
        return self._kept(report, asked.name)

    def _compiled(self, cell: str) -> tuple[CodeType, bool]:
        """The code of ``cell``, and whether the cell gives the name ``step`` a value."""
        source = self.shell.transform_cell(cell)
        # The name under which IPython keeps the lines, for tracebacks.
        file = self.shell.compile.cache(source, self.shell.execution_count, raw_code=cell)
        names = symtable.symtable(source, file, "exec")
        has_step = "step" in names.get_identifiers() and names.lookup("step").is_assigned()
        return compile(source, file, "exec"), has_step

    def _run(self, code: CodeType, namespace: dict) -> dict:
        exec(code, namespace)  # noqa: S102 (the user's own cell, as IPython's %%time runs it)
        return namespace

    def _kept(self, report: MemoryReport, name: str | None) -> MemoryReport:
        if name:
            self.shell.user_ns[name] = report
        return report
