"""Training: statistics, their solution, the data they stream over, and how far to step."""

from fxinvert.training.closed_form import Update, update_ops
from fxinvert.training.data import Batch, Batches
from fxinvert.training.metrics import Metrics, evaluate
from fxinvert.training.statistics import NormalEquations, Solved
from fxinvert.training.step import Step, search_step

__all__ = [
    "Batch",
    "Batches",
    "Metrics",
    "NormalEquations",
    "Solved",
    "Step",
    "Update",
    "evaluate",
    "search_step",
    "update_ops",
]
