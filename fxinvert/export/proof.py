"""The proof: the file passes the checker, runs in onnxruntime, and computes what the model computes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from fxinvert.errors import DataError, ExportMismatchError
from fxinvert.export.called import Axes, Call
from fxinvert.export.compare import Array, Comparison, array, compare
from fxinvert.export.files import fixed_batch, named
from fxinvert.export.inputs import Case, case_of, cases_at, check_settings, frozen_copy, rng_kept
from fxinvert.export.parting import first_difference
from fxinvert.export.rounding import FACTOR, rounding_of
from fxinvert.export.session import crashes, open_session, run_session
from fxinvert.export.summary import ExportReport, OutputDifference, relative
from fxinvert.export.ties import TIES, FirstOfEqual
from fxinvert.modes import as_usual

ATOL, RTOL = 1e-5, 1e-4
SHOWN = 8
FRAGILE = (
    "onnxruntime crashes when it optimizes this file as it does by default, so that it is proven with fewer optimizations. Open "
    "it like that: SessionOptions.graph_optimization_level = GraphOptimizationLevel.ORT_ENABLE_EXTENDED."
)


@dataclass(frozen=True)
class Proof:
    """What a file has to equal, and how closely.

    Attributes:
        model: the frozen model.
        call: how it is called.
        cases: inputs and expected outputs.
        atol: absolute tolerance.
        rtol: relative tolerance.
        note: what the cases leave out.
    """

    model: nn.Module
    call: Call
    cases: Sequence[Case]
    atol: float
    rtol: float
    note: str = ""


@as_usual()
def verify_onnx(
    path: str | os.PathLike[str],
    model: nn.Module,
    example_inputs: Any,
    *,
    batch_sizes: Sequence[int] | None = None,
    dynamic_axes: Axes | None = None,
    axis_sizes: Mapping[str, Sequence[int]] | None = None,
    atol: float = ATOL,
    rtol: float = RTOL,
    seed: int = 0,
) -> ExportReport:
    """Prove that an ONNX file computes what a model computes in eval mode.

    The file goes through `onnx.checker` (full) and runs in onnxruntime on the CPU at every batch size, on inputs like
    the example. Every element of every output must lie within `atol + rtol * |expected|`, or as near to what float64
    gives as the model's own rounding lets it be, which the report notes; integers must be equal.

    Args:
        path: The ONNX file.
        model: The model it should equal; neither it nor any random state is changed.
        example_inputs: A tensor, the tuple of what `forward` takes by position, or the mapping of what it takes by
            name, nested as the model wants them, with the batch in dimension 0.
        batch_sizes: Batch sizes to run; by default the one that the file takes, where it takes no other, or those of 1, 2 and 7
            that the model itself runs at, as for `export_onnx`.
        dynamic_axes: Names of other dimensions that may vary, by input name and dimension, as for `export_onnx`.
        axis_sizes: Sizes of those axes to run, by name; by default half of the example's.
        atol: Absolute tolerance.
        rtol: Tolerance relative to each expected element.
        seed: Seed of the noise on the inputs.

    Returns:
        What was run and how large the differences are.

    Raises:
        ExportMismatchError: The file is not valid, does not run at a batch size, or its outputs differ; the message
            names each output with its worst element, and the first node where file and model part.
        DataError: There is no such file, or the inputs or settings do not fit the model.
    """
    sizes = check_settings(batch_sizes, atol, rtol)
    file = named(path)
    if not file.is_file():
        raise DataError(f"there is no ONNX file at {file}; export_onnx writes one")
    with rng_kept():
        frozen = frozen_copy(model)
        call = Call.of(frozen, example_inputs, dynamic_axes)
        cases, note = cases_of(file, frozen, call, sizes, axis_sizes, seed)
        return prove(file, Proof(frozen, call, cases, atol, rtol, note))


def cases_of(
    file: Path,
    model: nn.Module,
    call: Call,
    batch_sizes: Sequence[int] | None,
    axis_sizes: Mapping[str, Sequence[int]] | None,
    seed: int = 0,
) -> tuple[tuple[Case, ...], str]:
    """`cases_at` for a file that is there: where it takes batches of one size only, as `torch.onnx.export` writes by default, of
    that size, unless others are asked for.

    Raises:
        DataError: As there.
    """
    fixed = None if batch_sizes else fixed_batch(file)
    if fixed is None:
        return cases_at(model, call, batch_sizes, axis_sizes, seed)
    cases, note = cases_at(model, call, (fixed,), axis_sizes, seed)
    return cases, f"{note} The file takes batches of {fixed} samples, and no others.".strip()


def prove(path: Path, proof: Proof, *, shown: Path | None = None) -> ExportReport:
    """Run the file on every case and compare.

    Args:
        path: The file.
        proof: What it has to equal.
        shown: The path to name in messages and in the report, if the file is a temporary one.

    Returns:
        The report.

    Raises:
        ExportMismatchError: The file is not valid, does not run at a batch size, or its outputs differ.
    """
    shown = shown or path
    loaded = check_file(path, shown)
    opset = next((entry.version for entry in loaded.opset_import if entry.domain in ("", "ai.onnx")), 0)
    fragile = is_half(loaded) and crashes(path)
    session = open_session(path, shown, "ENABLE_EXTENDED" if fragile else "ENABLE_ALL")
    differences: list[OutputDifference] = []
    beyond: dict[str, list[str]] = {}  # where rounding takes an output beyond the tolerance
    ties: list[str] = []  # where outputs depend on which of equal values are taken
    for case in proof.cases:
        names, actual = run_session(session, case, shown)
        if len(actual) != len(case.expected):
            raise ExportMismatchError(
                f"{shown} has {len(actual)} outputs ({', '.join(names)}), the model returns {len(case.expected)} "
                "tensors. Return only tensors from forward, each once."
            )
        found = _compared(case, actual, proof)
        if any(comparison.problem for comparison in found):
            first = _tied(case, proof)
            if first is not None:
                case, found = first, _compared(first, actual, proof)
                ties.append(str(case))
            with nullcontext() if first is None else FirstOfEqual():
                rounded, why = _rounded(case, actual, proof, found)
            why += [TIES] * (first is not None)
            if any(comparison.problem for comparison in rounded):
                raise ExportMismatchError(_mismatch(path, shown, case, names, rounded, proof, why))
            for name, comparison in zip(names, found, strict=True):
                if comparison.problem:
                    beyond.setdefault(name, []).append(str(case))
        differences += [
            OutputDifference(
                case.batch_size,
                name,
                value.shape,
                comparison.max_abs,
                relative(comparison.max_abs, comparison.largest),
                comparison.worst,
            )
            for name, value, comparison in zip(names, actual, found, strict=True)
        ]
    sizes = tuple(dict.fromkeys(case.batch_size for case in proof.cases))
    notes = [note for note in (proof.note, FRAGILE if fragile else "") if note]
    notes += [f"{TIES} Outputs depend on it at {'; '.join(ties)}."] if ties else []
    notes += [
        f"Output {name!r} exceeds the tolerance by rounding at {'; '.join(where)}: every element lies within {FACTOR:g} times the "
        "model's own error of what float64 gives."
        for name, where in beyond.items()
    ]
    return ExportReport(shown, opset, sizes, tuple(differences), proof.atol, proof.rtol, " ".join(notes))


def check_file(path: Path, shown: Path) -> Any:
    """Pass the file through the full checker of onnx.

    Args:
        path: The file.
        shown: The path to name in messages.

    Returns:
        The file as it is read, without external data.

    Raises:
        ExportMismatchError: The file cannot be read or is not valid ONNX.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:
        half = "bfloat16" in str(error)  # which ONNX knows for some ops only
        advice = (
            "Export a float32 copy of the model (model.float()) with float32 inputs"
            if half
            else "Export it again"
        )
        raise ExportMismatchError(f"{shown} is not a valid ONNX file: {error}. {advice}.") from error


def is_half(loaded: Any) -> bool:
    """Whether weights of a file are in half precision."""
    import onnx

    return any(value.data_type == onnx.TensorProto.FLOAT16 for value in loaded.graph.initializer)


def _tied(case: Case, proof: Proof) -> Case | None:
    """The case as the model is that takes the first of equal values; None where ties do not tell it from what is expected."""

    def differs() -> tuple[Case, bool]:
        found = case_of(proof.model, proof.call, case.sizes, case.inputs)
        compared = _compared(case, [array(tensor) for tensor in found.expected.values()], proof)
        return found, any(comparison.problem for comparison in compared)

    if differs()[1]:  # what is expected is not what the model gives
        return None
    with FirstOfEqual():
        first, tied = differs()
    return first if tied else None


def _compared(case: Case, actual: Sequence[Array], proof: Proof) -> list[Comparison]:
    return [
        compare(value, array(tensor), atol=proof.atol, rtol=proof.rtol)
        for value, tensor in zip(actual, case.expected.values(), strict=True)
    ]


def _rounded(
    case: Case, actual: Sequence[Array], proof: Proof, found: Sequence[Comparison]
) -> tuple[Sequence[Comparison], list[str]]:
    """The comparisons, with what the model's own rounding explains being equal; or why it cannot be measured."""
    try:
        roundings = rounding_of(proof.model, proof.call, tuple(case.inputs.values()))
    except DataError as error:
        return found, [f"Its rounding cannot be measured against float64: {error}"]
    expected = map(array, case.expected.values())
    return [
        replace(
            comparison,
            problem=compare(value, wanted, atol=proof.atol, rtol=proof.rtol, rounding=rounding).problem,
        )
        for value, wanted, comparison, rounding in zip(actual, expected, found, roundings, strict=True)
    ], []


def _mismatch(
    path: Path,
    shown: Path,
    case: Case,
    names: Sequence[str],
    found: Sequence[Comparison],
    proof: Proof,
    why: Sequence[str],
) -> str:
    """Each output that differs, with its worst element, and where file and model part."""
    lines = [
        f"{shown}: output {name!r} ({position} of {len(names)}) at {case} {comparison.problem}"
        for position, (name, comparison) in enumerate(zip(names, found, strict=True), start=1)
        if comparison.problem
    ]
    equal = len(names) - len(lines)
    more = [f"{len(lines) - SHOWN} more outputs differ."] if len(lines) > SHOWN else []
    more += [f"The other {equal} of {len(names)} outputs are equal."] if equal else []
    where = first_difference(path, proof.call.flat(proof.model), case, atol=proof.atol, rtol=proof.rtol)
    advice = (
        "Remove randomness and branches on values from forward; if the difference is only rounding, as that of half precision "
        "may be, raise atol or rtol."
    )
    return "\n".join([*lines[:SHOWN], *more, *why, where, advice])
