"""One attention layer, ours or another package's."""
