"""From a model to an ONNX file that was proven before it got its name.

The model is exported afresh every time: in an optimized file BatchNorm is folded into other weights, so that putting new
weights into an old file needs care (see `fxinvert.export.update`). Everything is written to a hidden directory beside
the destination, checked and run there, and moved to its place only when it equals the model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from fxinvert.errors import DataError, ExportMismatchError
from fxinvert.export.annotate import annotate_segments, every_name, set_metadata
from fxinvert.export.called import Axes, Call
from fxinvert.export.facts import facts_of
from fxinvert.export.files import destination_of, move, unwritable, workplace
from fxinvert.export.inputs import Case, cases_at, check_settings, frozen_copy, rng_kept
from fxinvert.export.proof import ATOL, RTOL, Proof, prove
from fxinvert.export.summary import ExportReport
from fxinvert.export.translate import FIRST_OPSET, translate
from fxinvert.modes import as_usual
from fxinvert.quiet import quiet
from fxinvert.result import PostTrainingResult

EXTERNAL_BYTES = 1_500_000_000
"""Weights beyond this go to a second file, `<name>.data`: a protobuf file ends at 2 GB."""

Precision = Literal["own", "float16"]

HALF_TOLERANCE = 1e-2
"""Absolute and relative tolerance in half precision, which has three digits."""


@as_usual()
def export_onnx(
    model: nn.Module | PostTrainingResult,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
    segments: Mapping[str, str] | None = None,
    batch_sizes: Sequence[int] | None = None,
    dynamic_axes: Axes | None = None,
    axis_sizes: Mapping[str, Sequence[int]] | None = None,
    precision: Precision = "own",
    external_data: bool | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    opset: int = 20,
) -> ExportReport:
    """Export a model to ONNX, with a dynamic batch dimension, and prove the file before it is put in its place.

    The file holds the model in eval mode. It passes `onnx.checker` (full), and runs in onnxruntime on the CPU at every
    batch size on inputs like the example; every element of every output must lie within `atol + rtol * |expected|`,
    or as near to what float64 gives as the model's own rounding lets it be.
    Only then does it appear at `path` (with large weights in `<path>.data` beside it); on failure nothing
    is left, and a file that was there before stays as it was. Inputs are called as in `forward`, outputs by the keys or
    fields of what it returns, and weights as in the model, unless an optimization has changed them.

    Args:
        model: The model, or the result of `post_train`, whose metrics and segments then go into the file. It stays as it
            is: mode, dtype, device, and the CPU random state too.
        example_inputs: A tensor, the tuple of what `forward` takes by position, or the mapping of what it takes by
            name, nested in tuples, lists and dicts as it wants them; batch in dimension 0.
        path: The file to write; its folder must exist.
        metadata: Facts to store in the file's metadata; keys get the prefix `fxinvert.`. Version, class, number of
            parameters, fingerprint of the weights, precision and tolerances are stored anyway.
        segments: Name of the segment of each parameter, by the parameter's name in `model`; stored as
            `fxinvert.segment` in the metadata of the nodes that use the parameter.
        batch_sizes: Batch sizes at which the file is proven; by default 1, 2 and 7. Where the model itself does not run at
            one of these, the others, the example's and twice as many, and the report's note says so.
        dynamic_axes: Names of other dimensions that may vary, by input name and dimension, `{"tokens": {1: "length"}}`;
            `{0: None}` for an input whose dimension 0 is not the batch.
        axis_sizes: Sizes of those axes at which the file is proven, by name; by default the example's and half of it.
        precision: `"own"`, or `"float16"` for weights and computation in half precision, while inputs and outputs stay
            as they are; proven against the model itself.
        external_data: Whether weights go to a second file; by default beyond 1.5 GB.
        atol: Absolute tolerance; by default 1e-5, in half precision 1e-2.
        rtol: Tolerance relative to each expected element; by default 1e-4, in half precision 1e-2.
        opset: ONNX opset of the file, 18 or later.

    Returns:
        What was run and how large the differences are.

    Raises:
        ExportMismatchError: The file does not compute what the model computes, or not at every batch size; the message
            names each output with its worst element, and the first node where file and model part.
        TraceError: torch could not capture the model or translate it to ONNX.
        DataError: The path cannot be written, or the inputs, metadata or settings do not fit.
    """
    if precision not in ("own", "float16"):
        raise DataError(f"precision is {precision!r}; it is 'own' or 'float16'")
    half = precision == "float16"
    atol = (HALF_TOLERANCE if half else ATOL) if atol is None else atol
    rtol = (HALF_TOLERANCE if half else RTOL) if rtol is None else rtol
    sizes = check_settings(batch_sizes, atol, rtol)
    if opset < FIRST_OPSET:
        raise DataError(
            f"opset {opset} is too old: torch exports to opset {FIRST_OPSET} or later (default 20)"
        )
    result = model if isinstance(model, PostTrainingResult) else None
    module = model.model if isinstance(model, PostTrainingResult) else model
    if result is not None and segments is None:
        segments = {name: part.name for part in result.plan.segments for name in part.parameters}
    destination = destination_of(path)
    with workplace(destination) as folder, rng_kept():
        frozen = frozen_copy(module)
        call = Call.of(frozen, example_inputs, dynamic_axes)
        named_segments = every_name(frozen, segments or {})
        cases, note = cases_at(frozen, call, sizes, axis_sizes)
        facts = facts_of(frozen, result, metadata, precision=precision, proven=proven(cases, atol, rtol))
        large = _weight_bytes(frozen) > EXTERNAL_BYTES
        written, proof = Path(folder) / destination.name, Proof(frozen, call, cases, atol, rtol, note)
        mismatch: ExportMismatchError | None = None
        for program in translate(frozen, call, cases, opset, half=half, destination=destination):
            set_metadata(program.model, facts)
            annotate_segments(program.model, named_segments)
            save(program, written, destination, external=large if external_data is None else external_data)
            del program
            try:
                report = prove(written, proof, shown=destination)
                break
            except ExportMismatchError as error:
                mismatch = mismatch or error
        else:
            assert mismatch is not None, "no program, and no reason"
            raise mismatch
        move(Path(folder), destination)
    return report


def proven(cases: Sequence[Case], atol: float, rtol: float) -> str:
    """What a file says about its proof."""
    sizes = dict.fromkeys(case.batch_size for case in cases)
    return f"batch sizes {', '.join(map(str, sizes))}; atol {atol:g}, rtol {rtol:g}"


def _weight_bytes(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def save(program: Any, written: Path, destination: Path, *, external: bool) -> None:
    """Write a translated program.

    Raises:
        DataError: It cannot be written.
    """
    try:
        with quiet():
            program.save(written, external_data=external)
    except OSError as error:
        raise unwritable(destination, error) from error
