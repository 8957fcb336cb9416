"""Subclasses of ``nn.Parameter`` on fake tensors, such as bitsandbytes' packed weights, and copies of fake tensors.

``torch.Tensor._make_subclass`` refuses a ``FakeTensor``, since the class asked for is no subclass of it. Here the new
parameter gets a class that is both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from unittest.mock import patch

import torch

from memstudy.profiler.internals import FakeTensor


@functools.cache
def _on_fake_tensors(asked: type[torch.nn.Parameter]) -> type[FakeTensor]:
    """A subclass of ``FakeTensor`` and ``asked`` that has the name and the constructor of ``asked``."""

    def detach(self):  # ``nn.Parameter`` demands the class of its argument
        detached = FakeTensor.detach(self)
        detached.__class__ = type(self)
        return detached

    members = {name: getattr(asked, name) for name in ("__new__", "__module__", "__deepcopy__")}
    members["detach"] = detach
    return type(asked)(asked.__name__, (FakeTensor, asked), members)


def making_fake_subclasses(make: Callable = torch.Tensor._make_subclass):
    """A patch that lets subclasses of ``nn.Parameter`` be made of fake tensors within its block."""

    def make_subclass(asked, data, require_grad=False, **others):
        if not (isinstance(data, FakeTensor) and issubclass(asked, torch.nn.Parameter)):
            return make(asked, data, require_grad, **others)
        made = data.detach()
        made.__class__ = asked if issubclass(asked, FakeTensor) else _on_fake_tensors(asked)
        return made.requires_grad_(require_grad)

    return patch.object(torch.Tensor, "_make_subclass", staticmethod(make_subclass))


def copying_fake_tensors():
    """A patch that lets ``copy.deepcopy`` copy fake tensors within its block.

    ``torch.Tensor.__deepcopy__`` copies a tensor's attributes too. One of a fake tensor's is its mode, with a reference
    to every storage that the mode knows: the process would end in a segmentation fault when the copies are freed.
    """

    def deepcopy(self, memo):
        memo[id(self.fake_mode)] = self.fake_mode
        if not isinstance(self, torch.nn.Parameter):
            return torch.Tensor.__deepcopy__(self, memo)
        if id(self) not in memo:  # as torch.nn.Parameter.__deepcopy__, which fake tensors lack
            data = self.data.clone(memory_format=torch.preserve_format)
            memo[id(self)] = torch.nn.Parameter(data, self.requires_grad)
        return memo[id(self)]

    return patch.object(FakeTensor, "__deepcopy__", deepcopy, create=True)
