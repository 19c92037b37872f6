"""Linear operators and the solvers of the anchored problem; knows nothing of ops or graphs."""

from fxinvert.linalg.anchored import Correction, SolveSettings, solve_anchored, solve_diagonal
from fxinvert.linalg.choice import choose, factorize
from fxinvert.linalg.convolution import Convolution, TransposedConvolution
from fxinvert.linalg.iterative import IterativeFactor
from fxinvert.linalg.memory import FactorCache
from fxinvert.linalg.operators import Dense, Function, LinearOperator
from fxinvert.linalg.padded import PaddedConvolution, rows_of
from fxinvert.linalg.solvers import DiagonalFactor, Factor, Solution, SpectralFactor
from fxinvert.linalg.structured import BlockDiagonal, Composition, Diagonal, Selection, Sum, Transpose

__all__ = [
    "Transpose",
    "Sum",
    "Selection",
    "DiagonalFactor",
    "Diagonal",
    "Composition",
    "BlockDiagonal",
    "Convolution",
    "Correction",
    "Dense",
    "Factor",
    "FactorCache",
    "Function",
    "PaddedConvolution",
    "IterativeFactor",
    "LinearOperator",
    "Solution",
    "SolveSettings",
    "SpectralFactor",
    "TransposedConvolution",
    "choose",
    "factorize",
    "solve_anchored",
    "rows_of",
    "solve_diagonal",
]
