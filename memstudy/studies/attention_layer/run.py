"""One attention layer alone, as a run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from memstudy.attention import AttentionConfig, Unavailable
from memstudy.attention.settings import check_window, mixer_of
from memstudy.profiler import MIB, Gpu, MemoryReport, predict
from memstudy.profiler.roles import Step
from memstudy.studies.attention_layer import layers
from memstudy.studies.attention_layer.peers import PEERS
from memstudy.trainers.base import PROCESS_MIB, SLACK, Run, gpu_needs, megabytes, once_for_equal_steps
from memstudy.trainers.timing import WARM_UP


class LayerRun(Run):
    """Every choice of one attention layer measured alone: forward and backward in fp32, no optimizer.

    ``who`` says whose layer of the variant is measured: ``memstudy`` or a name in ``peers.PEERS``. With ``cross`` the
    layer attends to a second sequence of the same shape instead of its own. ``measure_steps`` steps are timed, on the
    process's threads.
    """

    kind: Literal["layer"] = "layer"
    who: str = "memstudy"
    attention: dict[str, bool | str | int | float]
    seq_len: Annotated[int, Field(ge=2)]
    batch_size: PositiveInt = 1
    hidden_size: PositiveInt = 512
    n_heads: PositiveInt = 8
    is_causal: bool
    cross: bool = False
    measure_steps: PositiveInt = 5
    seed: NonNegativeInt = 0
    techniques: ClassVar[tuple[str, ...]] = ()
    processes: ClassVar[int] = 1

    @model_validator(mode="after")
    def _consistent(self):
        if self.hidden_size % self.n_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not a multiple of n_heads={self.n_heads}")
        mixer = self.mixer()
        mixer.check_causal(self.is_causal)
        check_window(mixer, self.seq_len)
        if self.cross and self.is_causal:
            raise ValueError("cross=true needs is_causal=false: the two sequences have no common order")
        if self.cross and "memory" not in inspect.signature(mixer.module.forward).parameters:
            raise ValueError(f"cross=true: the layer of {mixer.name!r} attends to its own sequence only")
        if self.who == "memstudy":
            return self
        if self.who not in PEERS:
            raise ValueError(f"unknown who {self.who!r}; known: memstudy, {', '.join(PEERS)}")
        if PEERS[self.who].variant != mixer.name:
            raise ValueError(f"who={self.who!r} has {PEERS[self.who].variant!r}, not {mixer.name!r}")
        return self

    def mixer(self) -> AttentionConfig:
        """Config of the attention variant."""
        return mixer_of(self.attention)

    def make_layer(self) -> torch.nn.Module:
        """The layer with random weights, from torch's global generator.

        Raises
        ------
        Unavailable
            When the peer is not installed here.
        """
        if self.who == "memstudy":
            mixer = self.mixer()
            return mixer.module(self.hidden_size, self.n_heads, mixer, is_causal=self.is_causal)
        return PEERS[self.who].make(self)

    def build(self, *, gpu: str | Gpu | None = None) -> Callable[[], Step]:
        """The argument of ``profiler.predict``: makes the layer and returns its step, the same for every ``gpu``."""
        return partial(layers.one_step, self)

    def foretell(self, gpu: str | Gpu | None = None) -> MemoryReport:
        """Predict a step on ``gpu``, or on this CPU if ``gpu`` is empty; its peak counts all tensors."""
        return predict(self.build(), gpu=gpu or None)

    def execute(self, checkpoints):
        return layers.execute(self)

    def needs(self, gpu=""):
        try:
            follow = partial(layers.followed, self, partial(predict, gpu=gpu or None))
            report, before = once_for_equal_steps(self, gpu, follow)
        except Unavailable:  # the run itself reports why
            return {"mem_mb": megabytes(PROCESS_MIB)}
        if gpu:  # the bare projections take less time than a layer that has them too
            return {"mem_mb": megabytes(2 * PROCESS_MIB), **gpu_needs(report, 2 + 2 * (WARM_UP + self.measure_steps))}
        return {"mem_mb": megabytes(PROCESS_MIB + SLACK * (max(report.iteration_peaks) - before) / MIB)}
