"""Measure a finished run on request: compute n-gram baselines, or evaluate the model on other text."""
