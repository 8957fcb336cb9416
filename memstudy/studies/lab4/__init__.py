"""Lab 4's experiments on one small language model."""
