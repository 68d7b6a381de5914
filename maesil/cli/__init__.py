"""The command line: thin commands, a file for each group of them."""

from maesil.cli.program import app, main

__all__ = ["app", "main"]
