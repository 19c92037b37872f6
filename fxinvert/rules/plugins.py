"""Rules from other packages, found by entry point, loaded when the default rules are first asked for.

A package names the module that registers its rules with `@fxinvert.inverse_rule`:

    [project.entry-points."fxinvert.rules"]
    my_package = "my_package.inverse_rules"
"""

from __future__ import annotations

import traceback
import warnings
from importlib.metadata import EntryPoint, entry_points

GROUP = "fxinvert.rules"


class PluginWarning(UserWarning):
    """A package's rules could not be loaded; all others work."""


def load_plugins() -> None:
    """Imports what installed packages name as their rules; a package that fails is warned of."""
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        _load(point)


def _load(point: EntryPoint) -> None:
    try:
        point.load()
    except Exception as error:  # noqa: BLE001 (anyone's code, and the other rules must keep working)
        place = traceback.extract_tb(error.__traceback__)[-1]
        package = point.dist.name if point.dist else "an unknown package"
        warnings.warn(
            f"the rules {point.name!r} of {package} ({point.value}) could not be loaded and are missing: "
            f"{type(error).__name__}: {error}, at {place.filename}:{place.lineno}",
            PluginWarning,
            stacklevel=2,
        )
