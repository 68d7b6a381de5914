"""Packages that a command can do without: what draws pictures, and what writes events for TensorBoard.

They are dependencies, so an installation has them. A machine where few packages can be installed may lack them.
"""

from __future__ import annotations

import importlib.util

PICTURES = ("matplotlib", "PIL")
"""What `maesil.pictures` draws with."""
EVENTS = ("tensorboard",)
"""What writes the log for TensorBoard."""
WANDB = ("wandb",)
"""What writes to W&B; an extra."""
MLFLOW = ("mlflow", "sqlalchemy", "alembic")
"""What writes to MLflow, and to a database of this machine where no server is named; an extra."""
OBJECTS = ("obstore",)
"""What reads and writes stores in object storage; an extra."""
IDC = ("idc_index_data",)
"""The table of all series of the Imaging Data Commons; an extra."""


def not_installed(modules: tuple[str, ...]) -> str:
    """Return which of ``modules`` is not installed (the first one); an empty string: all are."""
    return next((name for name in modules if not _installed(name)), "")


def _installed(module: str) -> bool:
    """Return whether a package is there; a mere folder of its name, as W&B leaves beside a script, is none."""
    found = importlib.util.find_spec(module)
    return found is not None and found.origin is not None
