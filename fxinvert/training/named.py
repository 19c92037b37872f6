"""Methods by name."""

from __future__ import annotations

from collections.abc import Callable

from fxinvert.errors import DataError
from fxinvert.training.auto import Auto
from fxinvert.training.closed_form import ClosedForm
from fxinvert.training.gauss_newton import GaussNewton
from fxinvert.training.gradient import Gradient
from fxinvert.training.joint import Joint
from fxinvert.training.work import Method

METHODS: dict[str, Callable[..., Method]] = {
    "auto": Auto,
    "closed_form": ClosedForm,
    "gauss_newton": GaussNewton,
    "gradient": Gradient,
    "joint": Joint,
}


#: of closed form, by default
DAMPING, SATISFIED_WEIGHT = 1e-2, 0.1


def method_named(
    choice: str | Method, damping: float = DAMPING, satisfied_weight: float = SATISFIED_WEIGHT
) -> Method:
    """The method of that name, or the one given; the settings are closed form's.

    Raises:
        DataError: there is none of that name, what is given is no method, or has settings of its own instead of these.
    """
    if choice != "closed_form" and (damping, satisfied_weight) != (DAMPING, SATISFIED_WEIGHT):
        raise DataError(
            "damping and satisfied_weight are settings of method='closed_form'; an object of fxinvert.training is given its own"
        )
    if not isinstance(choice, str):
        missing = [what for what in ("name", "schedule", "train") if not hasattr(choice, what)]
        if missing:
            raise DataError(
                f"method {choice!r} has no {', '.join(missing)}; needed is what fxinvert.training.Method describes"
            )
        return choice
    if choice not in METHODS:
        raise DataError(f"unknown method {choice!r}; known are {', '.join(METHODS)}")
    if choice == "closed_form":
        return ClosedForm(damping, satisfied_weight)
    return METHODS[choice]()
