"""Predictions against a GPU that is here: standard steps, their runs, and the record that can be contributed."""
