"""Bugs of the method, each with the test that must see it. How to add one: ``CONTRIBUTING.md``."""

from __future__ import annotations

from planted.bugs_of_models import BASELINES, MODEL
from planted.bugs_of_scores import DOWNSTREAM, EVALUATION
from planted.bugs_of_training import DATA, TRAINING

BUGS = [*MODEL, *BASELINES, *DATA, *TRAINING, *EVALUATION, *DOWNSTREAM]
