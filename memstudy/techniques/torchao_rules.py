"""The memory of torchao's AdamW, for predictions where torchao is not installed; nothing is computed.

From torchao/optim/adam.py (``_AdamBase``), subclass_8bit.py and subclass_4bit.py: one compiled kernel updates one
parameter, and holds its intermediate values in registers.
"""

from __future__ import annotations

import importlib.util

import torch

INSTALLED = importlib.util.find_spec("torchao") is not None
_LEAST = 4096  # smaller tensors keep moments of their own type
_BLOCK = 256  # elements with one scale: the Trainer's choice (transformers/trainer_optimizer.py)


class AdamW(torch.optim.Optimizer):
    """Two moments for each parameter, in ``bits`` (8 or 4) or in the parameter's type; the step count on the host."""

    def __init__(self, params, lr: float, bits: int | None = None):
        super().__init__(params, {"lr": lr, "bits": bits})
        for group in self.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]))  # or each new rate would compile the kernels again

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    self.state[parameter] = {"step": torch.tensor(0.0)}
                    for moment in ("exp_avg", "exp_avg_sq"):
                        self.state[parameter] |= _moment(moment, parameter, group["bits"])


def _moment(name: str, parameter: torch.Tensor, bits: int | None) -> dict[str, torch.Tensor]:
    n = parameter.numel()
    if bits is None or n < _LEAST or n % _BLOCK:
        return {name: torch.zeros_like(parameter)}
    return {
        name: torch.zeros(n * bits // 8, dtype=torch.uint8),
        f"{name}_scale": torch.zeros(n // _BLOCK),
        f"{name}_code": torch.tensor([0.0] * 2**bits),
    }
