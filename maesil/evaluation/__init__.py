"""Scores, naive baselines, whole volumes, the paper's experiment."""
