"""``memstudy.explore()``: model, GPU, batch, length and techniques as widgets, and what the step would take."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from html import escape
from multiprocessing import get_context

import ipywidgets as widgets

from memstudy.huggingface.catalogue import hub_models
from memstudy.notebook.forecast import forecast
from memstudy.profiler import gpus
from memstudy.techniques import TECHNIQUES

_TICK_S = 0.25
_START = "<i>Press the button, then change anything.</i>"


def offered() -> list[str]:
    """The techniques of training in one process."""
    return [name for name, each in TECHNIQUES.items() if each.in_training and not each.several_processes]


class Explorer(widgets.VBox):
    """The widgets. A prediction runs in another process, so the kernel stays free; the latest settings win.

    Parameters
    ----------
    model, gpu, batch_size, seq_len, techniques
        What is chosen at the beginning; a technique may have a setting, as ``lora=16``.
    """

    def __init__(
        self,
        model: str = "bert-base-uncased",
        gpu: str = "T4",
        batch_size: int = 16,
        seq_len: int = 128,
        techniques: Sequence[str] = (),
    ):
        width = {"layout": widgets.Layout(width="330px"), "style": {"description_width": "80px"}}
        small = {"layout": widgets.Layout(width="180px"), "style": {"description_width": "80px"}}
        # A number is taken when its field is left, or at Enter: not at every digit.
        size = {"min": 1, "max": 2**20, "continuous_update": False, **small}
        known = list(dict.fromkeys([*offered(), *techniques]))
        self.model = widgets.Combobox(
            value=model, options=list(hub_models()), description="model", continuous_update=False, **width
        )
        self.gpu = widgets.Dropdown(value=gpu, options=list(dict.fromkeys([*gpus(), gpu])), description="GPU", **width)
        self.batch_size = widgets.BoundedIntText(value=batch_size, description="batch", **size)
        self.seq_len = widgets.BoundedIntText(value=seq_len, description="tokens", **size | {"min": 2})
        self.techniques = widgets.SelectMultiple(
            value=tuple(techniques), options=known, description="techniques", rows=8, **width
        )
        self.button = widgets.Button(description="Predict", button_style="primary")
        self.progress = widgets.FloatProgress(max=1.0, layout=widgets.Layout(width="180px", visibility="hidden"))
        self.status, self.answer = widgets.HTML(), widgets.HTML(_START)
        sizes = widgets.HBox([self.batch_size, self.seq_len])
        left = widgets.VBox([self.model, self.gpu, sizes])
        under = widgets.HBox([self.button, self.progress, self.status])
        super().__init__([widgets.HBox([left, self.techniques]), under, self.answer])
        self._pool: ProcessPoolExecutor | None = None
        self._task: asyncio.Task | None = None
        self._seconds: float | None = None  # what the last answer took
        self.button.on_click(lambda _: self._ask())
        for control in (self.model, self.gpu, self.batch_size, self.seq_len, self.techniques):
            control.observe(lambda _: self._ask(), "value")

    def chosen(self) -> dict:
        """The settings, as `forecast` takes them."""
        names = ("model", "gpu", "batch_size", "seq_len", "techniques")
        return {name: getattr(self, name).value for name in names}

    def _ask(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self.predict())

    async def predict(self) -> None:
        """Predict the chosen settings, and once more if they have changed meanwhile."""
        answered = None
        while (asked := self.chosen()) != answered:
            html = await self._forecast(asked)
            answered = asked
            if self.chosen() == asked:
                self.answer.value = html
        self.progress.layout.visibility, self.status.value = "hidden", ""

    async def _forecast(self, asked: dict) -> str:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        began = time.monotonic()
        future = self._pool.submit(forecast, **asked)
        self.progress.layout.visibility = "visible"
        while not future.done():
            self._show_progress(time.monotonic() - began, asked)
            await asyncio.sleep(_TICK_S)
        try:
            html = future.result()
        except BrokenProcessPool:
            self._pool = self._seconds = None
            return "<b>no prediction:</b> its process has ended, perhaps for lack of memory; try a smaller model"
        self._seconds = time.monotonic() - began
        return html

    def _show_progress(self, elapsed: float, asked: dict) -> None:
        """How long the prediction has been running, beside what the last one took."""
        expected = self._seconds or 15.0  # the first loads PyTorch and transformers
        self.progress.value = elapsed / (elapsed + expected / 3) if elapsed > expected else 0.75 * elapsed / expected
        left = f"about {expected - elapsed:.0f} s left" if elapsed < expected else "longer than the last one"
        what = "starting, and tracing" if self._seconds is None else "tracing"
        self.status.value = f"{what} {escape(asked['model'])}: {elapsed:.0f} s, {left}"
