"""Measurements: one script a question, results in `results/`."""
