"""Programs: what `torch.export` makes of a model for any batch size.

A model may go another way beyond some batch size, `if x.shape[0] >= 64: x = x.contiguous()`; torch proves its program for the
sizes on the example's side of such a bound. The program is taken for all of them if the model computes the same right
behind the bound, too, which is tried there: evidence, not proof. What an earlier run has left on a model, `if self.state.shape !=
x.shape`, excludes the one size that it had, for which the same is tried.
"""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram, export
from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes

from fxinvert.errors import TraceError
from fxinvert.passes.capture import CaptureError
from fxinvert.passes.checks import KEEP_FIRST, WITH_BATCH_SIZE
from fxinvert.passes.fakes import exportable
from fxinvert.passes.fixed import places_noted
from fxinvert.passes.inputs import Flat
from fxinvert.passes.runs import difference, run
from fxinvert.quiet import quiet

#: how the exporter begins to say that it cannot prove something of all batch sizes
_VIOLATED = "Constraints violated"
#: what it ends with in place of that where the bound of a batch size is none of its whole numbers, as for `3 * x.shape[0] < 64`
_FRACTION = re.compile(r"Expected op to be '==', got <=? for (?:batch <=? (\d+)/(\d+)|(\d+)/(\d+) <=? batch)")
#: samples that are computed at once to look behind a bound, at most
_MOST = 256
#: what a program says of a size that it is not for
_EXCLUSION = re.compile(r"expression Ne\(\w+, (\d+)\)")


def program_of(
    flat: Flat, values: tuple[Tensor, ...], shared: list[bool]
) -> tuple[ExportedProgram, list[int]]:
    """The program, and the batch sizes that it is not proven for: right behind bounds, and excluded ones.

    Args:
        flat: the model.
        values: example tensors.
        shared: which of them have a row for every sample.

    Raises:
        TraceError: the model computes with the batch size itself.
    """
    every = Dim("batch")

    def exported(batch: Dim = every, **settings: Any) -> ExportedProgram:
        shapes = (tuple({0: batch} if own else {} for own in shared),)
        return export(flat, values, dynamic_shapes=shapes, strict=False, **settings)

    with quiet(), exportable(flat.model), places_noted() as places:
        try:
            return exported(), []
        except Exception as error:
            if not str(error).startswith(_VIOLATED) and not _FRACTION.fullmatch(str(error)):
                raise
            # what torch cannot prove of all batch sizes may hold for them: its program asks again as it runs
            with suppress(Exception):
                program = exported(prefer_deferred_runtime_asserts_over_guards=True)
                sizes = without_exclusions(program.graph_module)
                for rows in ([0], [*range(len(values[shared.index(True)])), 0]):
                    program.module()(*(v[rows] if own else v for v, own in zip(values, shared, strict=True)))
                return program, sizes
            with suppress(Exception):
                batch = _bounded(error, every)
                if batch is not None:
                    return exported(batch), _behind(batch)
            place = f" at {places[0]}" if places else ""
            raise TraceError(
                f"torch.export cannot capture {type(flat.model).__name__}: {WITH_BATCH_SIZE}{place}; {KEEP_FIRST}"
            ) from error


def _bounded(error: Exception, batch: Dim) -> Dim | None:
    """The batch sizes of which torch can prove its program; None where that is one size, or their bound is out of reach.

    Args:
        error: the exporter's, who could not prove it of all.
        batch: all.
    """
    said = str(error).partition("\n\n")[0]
    found: Any
    if (stated := _FRACTION.fullmatch(said)) is not None:
        most, by, least, of = (int(number or 0) for number in stated.groups())
        found = Dim("batch", max=most // by) if by else Dim("batch", min=-(-least // of))
    else:
        (found,) = refine_dynamic_shapes_from_suggested_fixes(said, (batch,))
    if not isinstance(found, Dim):
        return None
    behind = _behind(found)
    return found if behind and max(behind) <= _MOST else None


def _behind(batch: Dim) -> list[int]:
    """The batch sizes right behind the bounds, if there are any."""
    return [rows for rows in (batch.min - 1, batch.max + 1) if 1 < rows <= sys.maxsize]


def check_sizes(
    sizes: list[int], flat: Flat, raw: fx.GraphModule, values: tuple[Tensor, ...], shared: list[bool]
) -> None:
    """Checks that a graph computes what its model computes for batches of some sizes.

    Args:
        sizes: of the batches.
        flat: the model.
        raw: its graph.
        values: example tensors.
        shared: which of them have a row for every sample.

    Raises:
        CaptureError: it does not.
    """
    for rows in sizes:
        larger = tuple(
            v[torch.arange(rows, device=v.device) % len(v)] if own else v
            for v, own in zip(values, shared, strict=True)
        )
        problem = difference(run(flat, larger), run(raw, larger))
        if problem:
            raise CaptureError(f"{WITH_BATCH_SIZE} (for {rows} samples {problem}); {KEEP_FIRST}")


def without_exclusions(raw: fx.GraphModule) -> list[int]:
    """Batch sizes that a graph excludes one by one; it no longer does."""
    sizes = []
    for node in list(raw.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_scalar.default)):
        found = _EXCLUSION.search(str(node.args[1]))
        if found is not None and int(found[1]) <= _MOST:
            sizes.append(int(found[1]))
            raw.graph.erase_node(node)
    if sizes:
        raw.recompile()
    return sizes
