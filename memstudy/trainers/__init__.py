"""Runs of models: described, built, predicted, measured and trained."""
