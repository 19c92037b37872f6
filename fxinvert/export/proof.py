"""The proof: the file passes the checker, runs in onnxruntime, and computes what the model computes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from fxinvert.errors import DataError, ExportMismatchError
from fxinvert.export.inputs import Case, check_settings, example_tensors, frozen_copy, make_cases, rng_kept
from fxinvert.export.summary import ExportReport, OutputDifference, relative

Array = npt.NDArray[Any]


def verify_onnx(
    path: str | os.PathLike[str],
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    *,
    batch_sizes: Sequence[int] = (1, 2, 7),
    atol: float = 1e-5,
    rtol: float = 1e-4,
    seed: int = 0,
) -> ExportReport:
    """Prove that an ONNX file computes what a model computes in eval mode.

    The file goes through `onnx.checker` (full) and runs in onnxruntime on the CPU at every batch size, on inputs like
    the example. Every element of every output must lie within `atol + rtol * |expected|`; integers must be equal.

    Args:
        path: The ONNX file.
        model: The model it should equal; neither it nor any random state is changed.
        example_inputs: A tensor, or a tuple of tensors, with the batch in dimension 0.
        batch_sizes: Batch sizes to run.
        atol: Absolute tolerance.
        rtol: Tolerance relative to each expected element.
        seed: Seed of the noise on the inputs.

    Returns:
        What was run and how large the differences are.

    Raises:
        ExportMismatchError: The file is not valid, does not run at a batch size, or its outputs differ.
        DataError: There is no such file, or the inputs or settings do not fit the model.
    """
    sizes = check_settings(batch_sizes, atol, rtol)
    example = example_tensors(example_inputs)
    file = Path(path)
    if not file.is_file():
        raise DataError(f"there is no ONNX file at {file}; export_onnx writes one")
    with rng_kept():
        cases = make_cases(frozen_copy(model), example, sizes, seed)
        return prove(file, cases, atol=atol, rtol=rtol)


def prove(
    path: Path, cases: Sequence[Case], *, atol: float, rtol: float, shown: Path | None = None
) -> ExportReport:
    """Run the file on every case and compare.

    Args:
        path: The file.
        cases: Inputs and expected outputs.
        atol: Absolute tolerance.
        rtol: Relative tolerance.
        shown: The path to name in messages and in the report, if the file is a temporary one.

    Returns:
        The report.

    Raises:
        ExportMismatchError: The file is not valid, does not run at a batch size, or its outputs differ.
    """
    shown = shown or path
    opset = check_file(path, shown)
    session = _session(path, shown)
    differences: list[OutputDifference] = []
    for case in cases:
        names = [output.name for output in session.get_outputs()]
        actual = _run(session, case, shown)
        if len(actual) != len(case.expected):
            raise ExportMismatchError(
                f"{shown} has {len(actual)} outputs ({', '.join(names)}), the model returns {len(case.expected)} "
                "tensors. Return only tensors from forward, each once."
            )
        for position, (name, value, tensor) in enumerate(
            zip(names, actual, case.expected, strict=True), start=1
        ):
            where = f"{shown}: output {name!r} ({position} of {len(names)}) at batch size {case.batch_size}"
            max_abs, largest = compare(value, _array(tensor), where, atol=atol, rtol=rtol)
            entry = OutputDifference(case.batch_size, name, value.shape, max_abs, relative(max_abs, largest))
            differences.append(entry)
    sizes = tuple(case.batch_size for case in cases)
    return ExportReport(shown, opset, sizes, tuple(differences), atol, rtol)


def check_file(path: Path, shown: Path) -> int:
    """Pass the file through the full checker of onnx.

    Args:
        path: The file.
        shown: The path to name in messages.

    Returns:
        The file's opset.

    Raises:
        ExportMismatchError: The file cannot be read or is not valid ONNX.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
        loaded = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise ExportMismatchError(f"{shown} is not a valid ONNX file: {error}. Export it again.") from error
    return next((entry.version for entry in loaded.opset_import if entry.domain in ("", "ai.onnx")), 0)


def compare(actual: Array, expected: Array, where: str, *, atol: float, rtol: float) -> tuple[float, float]:
    """Compare one output element by element.

    Infinities and NaN must stand at the same places; an output without any finite number proves nothing and is refused.

    Args:
        actual: What the file computes.
        expected: What the model computes.
        where: File, output and batch size, for the message.
        atol: Absolute tolerance (floats only; other types must be equal).
        rtol: Relative tolerance (floats only).

    Returns:
        The largest absolute difference and the largest expected magnitude, over finite elements.

    Raises:
        ExportMismatchError: Types, shapes or values differ, or nothing is finite.
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise ExportMismatchError(
            f"{where} is {actual.dtype} {list(actual.shape)}, the model returns {expected.dtype} "
            f"{list(expected.shape)}. Make forward compute its shapes from the inputs' shapes, not from constants."
        )
    if not expected.size:
        return 0.0, 0.0
    if not np.isfinite(expected).any():
        raise ExportMismatchError(
            f"{where}: the model itself returns no finite number here, so that nothing can be proven. "
            "Check its weights and the example inputs."
        )
    scalar, actual, expected = not expected.shape, np.atleast_1d(actual), np.atleast_1d(expected)
    given, wanted = actual.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(wanted)
    same = (actual == expected) | (np.isnan(given) & np.isnan(wanted))
    with np.errstate(invalid="ignore"):
        distance = np.where(same, 0.0, np.abs(given - wanted))
    distance = np.where(np.isnan(distance), np.inf, distance)
    if np.issubdtype(expected.dtype, np.floating):
        stated = f"(atol {atol:g} + rtol {rtol:g} * |expected|)"
        tolerance = atol + rtol * np.where(finite, np.abs(wanted), 0.0)
        wrong = distance > tolerance
    else:
        stated = f"({expected.dtype} must be equal)"
        tolerance = np.zeros(wanted.shape)
        wrong = ~same
    if wrong.any():
        excess = np.where(wrong, distance - tolerance, -np.inf)
        worst = np.unravel_index(int(np.argmax(excess)), excess.shape)
        raise ExportMismatchError(
            f"{where} is not what the model computes; worst at index {[] if scalar else [int(i) for i in worst]}: "
            f"the file gives {actual[worst]}, the model {expected[worst]}, difference {distance[worst]:.3g}, "
            f"tolerance {tolerance[worst]:.3g} {stated}; {int(wrong.sum())} of {wrong.size} elements differ. Remove "
            "randomness and branches on values from forward; if the difference is only rounding, raise atol or rtol."
        )
    return float(distance[finite].max()), float(np.abs(wanted[finite]).max())


def _session(path: Path, shown: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportMismatchError(
            f"onnxruntime cannot load {shown}: {error}. Use a float32 model, an operator set that onnxruntime knows, "
            "or a lower opset."
        ) from error


def _run(session: Any, case: Case, shown: Path) -> list[Array]:
    inputs = session.get_inputs()
    if len(inputs) != len(case.inputs):
        raise ExportMismatchError(
            f"{shown} takes {len(inputs)} inputs ({', '.join(item.name for item in inputs)}), the example has "
            f"{len(case.inputs)}. Give example_inputs for exactly the arguments that forward uses."
        )
    feed = {item.name: _array(tensor) for item, tensor in zip(inputs, case.inputs, strict=True)}
    try:
        outputs = session.run(None, feed)
    except Exception as error:
        fixed = [f"{item.name} {item.shape}" for item in inputs]
        raise ExportMismatchError(
            f"{shown} does not run at batch size {case.batch_size} (its inputs: {', '.join(fixed)}): {error}. Make "
            "forward compute its shapes from x.shape[0], not from constants, or drop this size from batch_sizes."
        ) from error
    return [np.asarray(value) for value in outputs]


def _array(tensor: Tensor) -> Array:
    try:
        array: Array = tensor.contiguous().numpy()
    except (TypeError, RuntimeError) as error:
        raise DataError(
            f"{tensor.dtype} tensors cannot be compared with onnxruntime on the CPU ({error}). Export a float32 copy "
            "of the model (model.float()) with float32 example inputs."
        ) from error
    return array
