"""Scores, floors, whole volumes, the paper's experiment."""
