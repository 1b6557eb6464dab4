"""Evaluation: generation engines, scorers, the gold answer's likelihood, the statistics of comparisons."""
