"""The errors that fxinvert raises: one family, each naming what is wrong, where, and what to do."""

from __future__ import annotations

REPORT = "This is a fault in fxinvert; please report it with the message above."


class FxInvertError(Exception):
    """Root of every error raised on purpose by fxinvert."""


class TraceError(FxInvertError):
    """The model could not be captured, normalized or run as a graph."""


class NoRuleError(FxInvertError):
    """No inverse rule applies to a node that lies between what is asked for and the output."""


class RuleError(FxInvertError):
    """A rule is wrong: registered twice, raised, or returned something that is not an inverse."""


class CutError(FxInvertError):
    """A cut or a segment that was asked for does not exist in the graph."""


class SolveError(FxInvertError):
    """A linear system could not be solved at all (non-finite or contradictory input)."""


class DataError(FxInvertError):
    """Data, labels, files or settings given by the user do not fit."""


class UnknownNameError(DataError, KeyError):
    """A value was asked for by a name that there is none of: a `KeyError`, too."""

    #: a `KeyError` would show its message in quotes
    __str__ = Exception.__str__


class ExportMismatchError(FxInvertError):
    """An exported file does not compute what the model computes."""


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, is that memory ran out; torch has a class for that on a GPU only."""
    import torch  # which help texts do not wait for

    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            return True
        error = error.__cause__
    return False
