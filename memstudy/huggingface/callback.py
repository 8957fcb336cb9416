"""The memory of a Hugging Face training: predicted before it begins, measured in its log."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import psutil
import torch
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from memstudy.huggingface import twin
from memstudy.huggingface.out_of_memory import advice, is_out_of_memory, request
from memstudy.profiler import Gpu, MemoryReport, find_gpu
from memstudy.profiler.local import local_gpu
from memstudy.profiler.measurement import Recording
from memstudy.profiler.recorder import CannotFollow
from memstudy.profiler.waterfall import verdict, waterfall

GIB = 2**30
MEASURED = 2  # updates: the first ends with new optimizer state
# By the names under which others log them; of torch.cuda.memory_stats.
ON_GPU = {
    "memory/max_active (GiB)": "active_bytes.all.peak",
    "memory/max_allocated (GiB)": "allocated_bytes.all.peak",
    "memory/device_reserved (GiB)": "reserved_bytes.all.peak",
}


class MemoryCallback(TrainerCallback):
    """Predicts, measures and logs the memory of a Trainer's step.

    Before training, a step of ``trainer`` itself on its longest rows is predicted, and where its memory goes and
    whether it fits is printed. The first two updates are measured by category and logged; on a GPU, each later log of
    the Trainer has the peaks of PyTorch's allocator too. After an out-of-memory error the request, its phase and its
    module are printed, with the techniques that ``memstudy advise`` would add. The training is the same, to the last
    bit, as without the callback.

    .. code-block:: python

        trainer = Trainer(model, args, train_dataset=rows)
        trainer.add_callback(MemoryCallback(trainer))
        trainer.train()

    Parameters
    ----------
    trainer : Trainer
        The Trainer whose training is watched.
    gpu : str or Gpu, optional
        The GPU to predict for, as in :func:`memstudy.profiler.predict`; by default this machine's, or else its CPU.

    Attributes
    ----------
    predicted : MemoryReport or None
        Set before the first update, unless the Trainer's step cannot be predicted.
    measured : MemoryReport or None
        Set after the second update.
    """

    def __init__(self, trainer: Trainer, gpu: str | Gpu | None = None):
        self.predicted: MemoryReport | None = None
        self.measured: MemoryReport | None = None
        self._trainer = trainer
        self._card = find_gpu(gpu) if isinstance(gpu, str) else gpu or local_gpu()
        self._recording: Recording | None = None
        self._step = None
        self._updates = 0
        self._seq_len = 0
        trainer.train = self._explaining(trainer.train)

    def on_train_begin(self, args, state, control, train_dataloader=None, **_):
        if not state.is_world_process_zero:
            return
        self._break_off()  # auto_find_batch_size begins again after an out-of-memory error
        if reason := twin.unsupported(self._trainer):
            _say(f"memory neither predicted nor measured by category: {reason}")
            return
        self._predict(train_dataloader)
        try:
            self._recording, self._updates = Recording().__enter__(), 0
        except RuntimeError as error:  # another profiler is running
            _say(f"memory not measured by category: {_line(error)}")
        else:
            self._recording.know(twin.models(self._trainer), self._trainer.optimizer, self._trainer._tr_loss)

    def on_step_begin(self, args, state, control, **_):
        if self._recording:
            self._step = self._recording.step()
            self._step.__enter__()

    def on_step_end(self, args, state, control, **_):
        if self._recording:
            self._end_step()
            self._updates += 1
            if self._updates == MEASURED:
                self._log(self._by_category(), control)
        elif control.should_log and state.is_world_process_zero and torch.cuda.is_available():
            self._log({}, control)

    def on_train_end(self, args, state, control, **_):
        if self._recording and self._updates:
            self._log(self._by_category(), control)

    def _predict(self, loader: DataLoader) -> None:
        """Predict the step, and print the prediction."""
        console = Console(stderr=True, highlight=False)
        try:
            with console.status("tracing the Trainer's step on fake tensors"):
                parts = twin.longest_parts(self._trainer, loader)
                self.predicted = report = twin.foretell(self._trainer, parts, self._card)
        except CannotFollow as error:
            _say(f"memory not predicted: {_line(error)}")
            return
        except Exception as error:  # of any kind, from the model's own code: the training goes on
            _say(f"memory not predicted: {type(error).__name__}: {_line(error)}")
            return
        self._seq_len = parts[0]["input_ids"].shape[-1] if "input_ids" in parts[0] else 0
        size = " × ".join(map(str, next(iter(parts[0].values())).shape))
        console.print(waterfall(report, f"updates on batches of {size}, predicted for {report.device}"))
        if self._card is not None:
            console.print(verdict(report), soft_wrap=True)
            return
        held = sum(p.untyped_storage().nbytes() for p in twin.models(self._trainer).parameters())
        more, left = (report.peak_bytes - held) / GIB, psutil.virtual_memory().available / GIB
        console.print(f"{'fits' if more < left else 'does not fit'}: {more:.1f} GiB more, {left:.1f} available")

    def _by_category(self) -> dict[str, float]:
        """End the recording and return what to log of its report."""
        recording, self._recording = self._recording, None
        recording.__exit__(None, None, None)
        self.measured = report = recording.report()
        peaks = {f"memory/peak_{name} (GiB)": size / GIB for name, size in report.peak_by_category.items()}
        return {"memory/max_allocated (GiB)": report.peak_bytes / GIB} | peaks

    def _log(self, values: dict[str, float], control) -> None:
        """Log ``values`` and the peaks of the GPU's allocator, not by a subclass's ``log``, which may log more."""
        if torch.cuda.is_available():
            stats = torch.cuda.memory_stats()
            values = values | {name: stats[peak] / GIB for name, peak in ON_GPU.items()}
        should_log = control.should_log  # the log of the Trainer's own that is due stays due
        Trainer.log(self._trainer, values)
        control.should_log = should_log

    def _explaining(self, train: Callable) -> Callable:
        """Wrap the Trainer's ``train`` to explain an out-of-memory error."""

        @wraps(train)
        def explained(*args, **kwargs):
            try:
                return train(*args, **kwargs)
            except (MemoryError, RuntimeError) as error:
                if is_out_of_memory(error):
                    _say(str(request(error, self._trainer)))
                    if self._seq_len:
                        _say(advice(self._trainer, self._seq_len, self._card))
                raise
            finally:
                self._break_off()

        return explained

    def _break_off(self) -> None:
        """End a recording whose training has ended before its second update."""
        if self._recording:
            if self._step:  # a range that ends later writes to memory that the profiler has freed
                self._end_step()
            self._recording.__exit__(None, None, None)
            self._recording = None

    def _end_step(self) -> None:
        self._step.__exit__(None, None, None)
        self._step = None


def _say(text: str) -> None:
    Console(stderr=True, highlight=False).print(text, soft_wrap=True, markup=False)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
