"""Parameters, gradients and optimizer state that several processes divide among themselves."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch.distributed as dist
from transformers.distributed import DistributedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from memstudy.techniques.base import Technique


@dataclass(frozen=True)
class Fsdp(Technique):
    """Fully sharded data parallelism (Rajbhandari et al. 2020; Zhao et al. 2023), PyTorch's ``fully_shard``.

    Each process keeps its share of every parameter, gradient and optimizer state; a block's parameters are gathered for
    its forward and again for its backward pass. transformers does it by the model's own plan, and by its blocks where
    it has none. Its Trainer saves no checkpoints of it, so that a training that is killed begins anew.
    """

    summary = "several processes divide parameters, gradients and optimizer state among themselves"
    prepared_last = True
    several_processes = True

    def flags(self):
        return {"save_strategy": "no"}

    def prepare(self, model):
        modules = {re.sub(r"\.\d+(?=\.|$)", ".*", name): module for name, module in model.named_modules()}
        if not model.fsdp_plan or model.fsdp_plan.keys() - modules:  # there is one of llama's names for all models
            blocks = [name for name, module in modules.items() if isinstance(module, GradientCheckpointingLayer)]
            if not blocks:
                raise ValueError(f"fsdp: {type(model).__name__} has no blocks that can be sharded one by one")
            model.fsdp_plan = dict.fromkeys(blocks, "free_full_weight")
        config, _, mesh = model.prepare_distribute_model(DistributedConfig(fsdp_size=dist.get_world_size()))
        model.maybe_distribute_model(model, config, mesh)
