"""Hugging Face models: their attention projections, memstudy's attention in them, and the models known by name."""
