"""Fit the method to a model from a few frames, without labels and without gradient steps."""
