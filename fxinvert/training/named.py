"""Methods by name."""

from __future__ import annotations

from collections.abc import Callable

from fxinvert.errors import DataError
from fxinvert.settings import check_choice, check_like
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
        check_like("method", choice, ("name", "schedule", "train"), "fxinvert.training.Method")
        return choice
    check_choice("method", choice, METHODS)
    if choice == "closed_form":
        return ClosedForm(damping, satisfied_weight)
    return METHODS[choice]()
