"""Parameters, gradients and optimizer state divided among several processes."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass

import torch.distributed as dist
from transformers.distributed import DistributedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from memstudy.techniques.base import Technique


@dataclass(frozen=True)
class Fsdp(Technique):
    """Fully sharded data parallelism (Rajbhandari et al. 2020; Zhao et al. 2023), PyTorch's ``fully_shard``.

    Each process keeps its share of every parameter, gradient and optimizer state; a block's parameters are gathered for
    its forward and again for its backward pass. transformers shards by the model's own plan, or by blocks if the model
    has no plan. The Trainer saves no sharded checkpoints, so that a killed training starts from the beginning.
    """

    summary = "several processes divide parameters, gradients and optimizer state among themselves"
    prepared = 4
    several_processes = True

    def flags(self):
        return {"save_strategy": "no"}

    def prepare(self, model):
        modules = {re.sub(r"\.\d+(?=\.|$)", ".*", name): module for name, module in model.named_modules()}
        if not model.fsdp_plan or model.fsdp_plan.keys() - modules:  # the default plan has llama's module names
            blocks = [name for name, module in modules.items() if isinstance(module, GradientCheckpointingLayer)]
            if not blocks:
                raise ValueError(f"fsdp: {type(model).__name__} has no blocks that can be sharded one by one")
            model.fsdp_plan = dict.fromkeys(blocks, "free_full_weight")
        # The Trainer changes no model's output in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        config, _, mesh = model.prepare_distribute_model(DistributedConfig(fsdp_size=dist.get_world_size()))
        model.maybe_distribute_model(model, config, mesh)
