"""The GPU of this machine: its entry in the catalogue, or a description of what CUDA says."""

from __future__ import annotations

import torch

from memstudy.profiler.catalogue import Gpu, gpus
from memstudy.profiler.events import MIB

TOLERANCE = 0.03  # of the memory: drivers reserve more or less of a card's


def local_gpu() -> Gpu | None:
    """The first CUDA device; None without one.

    A card that the catalogue lacks has no speed, and its context is what the device uses beside PyTorch's segments,
    other processes' memory included.
    """
    if not torch.cuda.is_available():
        return None
    told = torch.cuda.get_device_properties(0)
    capability, memory_mib = (told.major, told.minor), told.total_memory / MIB
    known = find_by_cuda_name(told.name, capability, memory_mib)
    if known is not None:
        return known
    torch.empty(1, device="cuda")  # makes the context
    free, total = torch.cuda.mem_get_info()
    return Gpu(
        name="-".join(told.name.split()),
        compute_capability=capability,
        memory_mib=memory_mib,
        context_mib=(total - free - torch.cuda.memory_reserved()) / MIB,
        memory_source="total_memory of this device",
        context_source="cudaMemGetInfo of this device less what PyTorch reserves",
    )


def find_by_cuda_name(name: str, capability: tuple[int, int], memory_mib: float) -> Gpu | None:
    """The card of the catalogue that CUDA calls ``name``; None if there is none of its memory."""
    words = _letters(name)
    found = [
        card
        for card in gpus().values()
        if card.compute_capability == capability
        and abs(card.memory_mib / memory_mib - 1) < TOLERANCE
        and all(word in words for word in _words(card))
    ]
    return max(found, key=lambda card: sum(map(len, _words(card))), default=None)  # A10G is an A10 by its letters


def _words(card: Gpu) -> list[str]:
    """The words of a card's name, without its memory."""
    return [_letters(word) for word in card.name.split("-") if not word.endswith("GB")]


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text)).upper()
