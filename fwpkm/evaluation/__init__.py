"""Measuring what a model recalls and predicts."""
