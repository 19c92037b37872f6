"""Linear operators and the solvers of the anchored problem; knows nothing of ops or graphs."""

from fxinvert.linalg.anchored import Correction, SolveSettings, factorize, solve_anchored, solve_diagonal
from fxinvert.linalg.operators import Convolution, Dense, Function, LinearOperator
from fxinvert.linalg.solvers import Factor, IterativeFactor, Solution, SpectralFactor

__all__ = [
    "Convolution",
    "Correction",
    "Dense",
    "Factor",
    "Function",
    "IterativeFactor",
    "LinearOperator",
    "Solution",
    "SolveSettings",
    "SpectralFactor",
    "factorize",
    "solve_anchored",
    "solve_diagonal",
]
