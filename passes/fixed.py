"""Fixed: where code takes a size that varies for a number, so that a capture holds for the example's batch size only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fxinvert.passes.capture import called_at


@contextmanager
def places_noted() -> Iterator[list[str]]:
    """Runs the body; gives the user's lines that fix a size while `torch.export` captures them, in order."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # slow to import

    places: list[str] = []
    own = ShapeEnv._log_guard

    def noted(self: ShapeEnv, prefix: str, g: Any, forcing_spec: bool) -> None:
        # sizes are symbols there, and what is taken for granted of them are conditions that torch logs as it adds them
        if getattr(g, "rel_op", "") == "==" and {part.is_number for part in g.args} == {True, False}:
            places.extend([place] if (place := called_at()) else [])
        own(self, prefix, g, forcing_spec)

    ShapeEnv._log_guard = noted  # type: ignore[method-assign]
    try:
        yield places
    finally:
        ShapeEnv._log_guard = own  # type: ignore[method-assign]
