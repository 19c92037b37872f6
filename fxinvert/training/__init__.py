"""Training: methods, the statistics and data they work with, and how what they propose is judged."""

from fxinvert.training.auto import Auto
from fxinvert.training.batch import Batch
from fxinvert.training.closed_form import ClosedForm
from fxinvert.training.costs import Cost, Estimated, Probe, Stage
from fxinvert.training.data import Batches
from fxinvert.training.gauss_newton import GaussNewton
from fxinvert.training.gradient import Gradient, Optimizer
from fxinvert.training.joint import Joint
from fxinvert.training.metrics import Metrics, evaluate
from fxinvert.training.repeat import Repeating
from fxinvert.training.statistics import NormalEquations, Solved
from fxinvert.training.work import Back, Method, Proposal, Update, Work

__all__ = [
    "Auto",
    "Back",
    "Batch",
    "Batches",
    "ClosedForm",
    "Cost",
    "Estimated",
    "GaussNewton",
    "Gradient",
    "Joint",
    "Method",
    "Metrics",
    "NormalEquations",
    "Optimizer",
    "Probe",
    "Proposal",
    "Repeating",
    "Solved",
    "Stage",
    "Update",
    "Work",
    "evaluate",
]
