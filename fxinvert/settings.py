"""Checks of settings. Each names the setting, what was given and what is needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from numbers import Integral, Real
from typing import Any

from fxinvert.errors import CutError, DataError


def check_counts(least: int = 1, **settings: Any) -> None:
    """Checks that settings are whole numbers, and not too small; None is a setting that was not given.

    Args:
        least: what each must be at least.
        settings: by name.

    Raises:
        DataError: one is not.
    """
    for name, value in settings.items():
        if value is None:
            continue
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise DataError(f"{name}={value!r} is {type(value).__name__}; a whole number is needed")
        if value < least:
            raise DataError(f"{name}={value}; a whole number of at least {least} is needed")


def check_numbers(needed: str, fits: Callable[[float], bool], **settings: Any) -> None:
    """Checks that settings are finite numbers of some kind; None is a setting that was not given.

    Args:
        needed: the kind, as in "a number above 0".
        fits: whether a number is of it.
        settings: by name.

    Raises:
        DataError: one is not.
    """
    for name, value in settings.items():
        if value is None:
            continue
        if not isinstance(value, Real) or not math.isfinite(value) or not fits(float(value)):
            raise DataError(f"{name}={value!r}; {needed} is needed")


def check_choice(what: str, choice: Any, known: Collection[str], besides: str = "") -> None:
    """Checks that a setting is one of the names that there are.

    Args:
        what: the setting.
        choice: what was given for it.
        known: the names.
        besides: what else it could be, at the end of the message.

    Raises:
        DataError: it is not.
    """
    if not isinstance(choice, str) or choice not in known:
        raise DataError(f"unknown {what} {choice!r}; known are {', '.join(known)}{besides}")


def check_like(what: str, given: Any, attributes: Collection[str], protocol: str) -> None:
    """Checks that an object given for a setting has what a protocol asks for.

    Args:
        what: the setting.
        given: the object.
        attributes: what it needs.
        protocol: where that is described.

    Raises:
        DataError: something is missing, or a class was given instead of an object.
    """
    if isinstance(given, type):
        raise DataError(
            f"{what} is the class {given.__name__}; an object of it is needed: {given.__name__}(…)"
        )
    missing = [name for name in attributes if not hasattr(given, name)]
    if missing:
        raise DataError(f"{what} {given!r} has no {', '.join(missing)}; needed is what {protocol} describes")


def names_of(setting: str, given: Any) -> list[str]:
    """The names that a setting of one name or several holds.

    Raises:
        CutError: it holds something else.
    """
    if isinstance(given, str):
        return [given]
    names: list[Any] = list(given) if isinstance(given, Iterable) else [None]
    if not all(isinstance(name, str) for name in names):
        raise CutError(f"{setting}={given!r}; a name, or a list of names, is needed")
    return names
