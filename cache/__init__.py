"""Stores that experiments share, what a run notes of its stores, superpatches kept in memory. No torch."""
