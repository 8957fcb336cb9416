"""The memory ablation: which technique to add next."""
