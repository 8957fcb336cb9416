"""The Reformer on running text."""
