"""Settings that are numbers of something."""

from __future__ import annotations

from typing import Any

from fxinvert.errors import DataError


def check_counts(least: int = 1, **settings: Any) -> None:
    """Checks that settings are whole numbers, and not too small.

    Args:
        least: what each must be at least.
        settings: by name.

    Raises:
        DataError: one is not.
    """
    for name, value in settings.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise DataError(f"{name}={value!r} is {type(value).__name__}; a whole number is needed")
        if value < least:
            what = name.removesuffix("s") if least == 1 else name
            raise DataError(f"{name}={value}: needed is at least {least} {what}")
