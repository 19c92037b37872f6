"""Linear operators and the solvers of the anchored problem; knows nothing of ops or graphs."""

from fxinvert.linalg.anchored import Correction, SolveSettings, factorize, solve_anchored
from fxinvert.linalg.operators import Convolution, Dense, Diagonal, Function, LinearOperator
from fxinvert.linalg.solvers import DiagonalFactor, Factor, IterativeFactor, Solution, SpectralFactor

__all__ = [
    "Convolution",
    "Correction",
    "Dense",
    "Diagonal",
    "DiagonalFactor",
    "Factor",
    "Function",
    "IterativeFactor",
    "LinearOperator",
    "Solution",
    "SolveSettings",
    "SpectralFactor",
    "factorize",
    "solve_anchored",
]
