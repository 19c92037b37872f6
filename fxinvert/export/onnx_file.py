"""From a model to an ONNX file that was proven before it got its name.

The model is exported afresh every time: in an optimized file BatchNorm is folded into other weights, so that putting new
weights into an old file is wrong. Everything is written to a hidden directory beside the destination, checked and run
there, and moved to its place only when it equals the model.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxinvert.errors import DataError, ExportMismatchError, TraceError
from fxinvert.export.annotate import PREFIX, annotate_segments, every_name, set_metadata
from fxinvert.export.inputs import check_settings, example_tensors, frozen_copy, like, make_cases, rng_kept
from fxinvert.export.proof import prove
from fxinvert.export.quiet import quiet
from fxinvert.export.summary import ExportReport

EXTERNAL_BYTES = 1_500_000_000
"""Weights beyond this go to a second file, `<name>.data`: a protobuf file ends at 2 GB."""

FIRST_OPSET = 18
"""The exporter's own operator set; it cannot convert below."""


def export_onnx(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
    segments: Mapping[str, str] | None = None,
    batch_sizes: Sequence[int] = (1, 2, 7),
    atol: float = 1e-5,
    rtol: float = 1e-4,
    opset: int = 20,
) -> ExportReport:
    """Export a model to ONNX, with a dynamic batch dimension, and prove the file before it is put in its place.

    The file holds the model in eval mode. It passes `onnx.checker` (full), and runs in onnxruntime on the CPU at every
    batch size on inputs like the example; every element of every output must lie within `atol + rtol * |expected|`.
    Only then does it appear at `path` (with weights beyond 1.5 GB in `<path>.data` beside it); on failure nothing
    is left, and a file that was there before stays as it was.

    Args:
        model: The model. It stays as it is: mode, dtype, device, and the CPU random state too.
        example_inputs: A tensor, or a tuple of tensors for a forward with several arguments, batch in dimension 0.
        path: The file to write; its folder must exist.
        metadata: Facts to store in the file's metadata; keys get the prefix `fxinvert.`.
        segments: Name of the segment of each parameter, by the parameter's name in `model`; stored as
            `fxinvert.segment` in the metadata of the nodes that use the parameter.
        batch_sizes: Batch sizes at which the file is proven.
        atol: Absolute tolerance.
        rtol: Tolerance relative to each expected element.
        opset: ONNX opset of the file, 18 or later.

    Returns:
        What was run and how large the differences are.

    Raises:
        ExportMismatchError: The file does not compute what the model computes, or not at every batch size.
        TraceError: torch could not capture the model or translate it to ONNX.
        DataError: The path cannot be written, or the inputs, metadata or settings do not fit.
    """
    sizes = check_settings(batch_sizes, atol, rtol)
    example = example_tensors(example_inputs)
    if opset < FIRST_OPSET:
        raise DataError(
            f"opset {opset} is too old: torch exports to opset {FIRST_OPSET} or later (default 20)"
        )
    facts = _facts(metadata)
    destination = _destination(path)
    with _workplace(destination) as folder, rng_kept():
        frozen = frozen_copy(model)
        named_segments = every_name(frozen, segments or {})
        cases = make_cases(frozen, example, sizes, seed=0)
        program = _translate(frozen, _tracing_inputs(example, sizes), opset, destination)
        set_metadata(program.model, facts)
        annotate_segments(program.model, named_segments)
        written = Path(folder) / destination.name
        _save(program, written, destination, external=_weight_bytes(frozen) > EXTERNAL_BYTES)
        del program, frozen
        report = prove(written, cases, atol=atol, rtol=rtol, shown=destination)
        _move(Path(folder), destination)
    return report


def _facts(metadata: Mapping[str, str] | None) -> dict[str, str]:
    try:
        version = importlib.metadata.version("fxinvert")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    facts = {f"{PREFIX}version": version}
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str) or not key:
            raise DataError(
                f"metadata maps names to strings; got {key!r}: {value!r}. Convert the value with str()."
            )
        full = key if key.startswith(PREFIX) else PREFIX + key
        if full in facts:
            raise DataError(
                f"the metadata key {key!r} is taken ({full}, given twice or set by fxinvert); rename it"
            )
        facts[full] = value
    return facts


def _destination(path: str | os.PathLike[str]) -> Path:
    """The path to write, refused before any work if it plainly cannot be written."""
    destination = Path(path)
    parent = destination.parent
    try:
        if not destination.name or destination.is_dir():
            raise DataError(f"{destination} is a folder; give the path of the ONNX file to write")
        if not parent.exists():
            raise DataError(
                f"cannot write {destination}: the folder {parent} does not exist; create it first"
            )
        if not parent.is_dir():
            raise DataError(
                f"cannot write {destination}: {parent} is a file, not a folder; choose another path"
            )
    except OSError as error:
        raise _unwritable(destination, error) from error
    return destination


def _workplace(destination: Path) -> tempfile.TemporaryDirectory[str]:
    """A hidden folder beside the destination (same file system, so that the last step is one rename)."""
    try:
        return tempfile.TemporaryDirectory(
            dir=destination.parent, prefix=".fxinvert-export-", ignore_cleanup_errors=True
        )
    except OSError as error:
        raise _unwritable(destination, error) from error


def _unwritable(destination: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot write {destination}: {error}. Choose a path in a folder that you may write to and that has space left."
    )


def _tracing_inputs(example: tuple[Tensor, ...], sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """The example; with one row only it is lengthened, as torch likes to take a size of 1 for a constant."""
    several = [size for size in sizes if size > 1]
    return example if example[0].shape[0] > 1 or not several else like(example, min(several), seed=0)


def _dynamic_shapes(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Dimension 0 of every tensor is `batch`, nested as forward's signature nests its arguments (`*args`)."""
    batch = {0: torch.export.Dim("batch")}
    bound = inspect.signature(model.forward).bind(*inputs).arguments
    return tuple((batch,) * len(value) if isinstance(value, tuple) else batch for value in bound.values())


def _translate(model: nn.Module, inputs: tuple[Tensor, ...], opset: int, destination: Path) -> Any:
    with quiet() as said:
        try:
            program = torch.onnx.export(
                model,
                inputs,
                dynamo=True,
                verbose=False,
                external_data=False,
                dynamic_shapes=_dynamic_shapes(model, inputs),
                opset_version=opset,
            )
        except Exception as error:
            failure = TraceError(
                f"torch could not export {type(model).__name__} to ONNX: {_cause(error)}. Remove what cannot be "
                "captured (branches on tensor values, .item(), operators without an ONNX translation) from forward."
            )
            if said.getvalue().strip():
                failure.add_note("torch said:\n" + said.getvalue().strip()[-4000:])
            raise failure from error
    if program is None:
        raise TraceError(
            f"torch returned nothing when exporting {type(model).__name__}; check the torch version"
        )
    found = program.model.opset_imports.get("")
    if found != opset:
        raise DataError(
            f"opset {opset} is not available: the exporter made opset {found}; ask for that or for 20"
        )
    for value in program.model.graph.inputs:
        if value.shape is not None and isinstance(value.shape[0], int):
            raise ExportMismatchError(
                f"{destination} was not written: the exported graph has fixed the batch size of input {value.name!r} "
                f"at {value.shape[0]}. Something in forward depends on that number: compute shapes from x.shape[0] "
                "(x.flatten(1), not x.view(4, -1)), and do not add buffers that have a batch dimension."
            )
    return program


def _cause(error: BaseException) -> str:
    """The first line of the innermost error that torch chained; its own summary is long."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0]}"


def _weight_bytes(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def _save(program: Any, written: Path, destination: Path, *, external: bool) -> None:
    try:
        with quiet():
            program.save(written, external_data=external)
    except OSError as error:
        raise _unwritable(destination, error) from error


def _move(folder: Path, destination: Path) -> None:
    """Move what was written to its place; the file that refers to the others goes last."""
    try:
        for item in sorted(folder.iterdir(), key=lambda item: (item.name == destination.name, item.name)):
            os.replace(item, destination.with_name(item.name))
    except OSError as error:
        raise _unwritable(destination, error) from error
