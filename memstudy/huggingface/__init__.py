"""Hugging Face's models: where their projections are, our attention in them, and which are known by name."""
