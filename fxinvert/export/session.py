"""onnxruntime on the CPU: open a file, run a case."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fxinvert.errors import DataError, ExportMismatchError
from fxinvert.export.compare import Array
from fxinvert.export.inputs import Case

#: how far onnxruntime changes a graph before it runs it; `ALL` is its default
Optimizations = Literal["DISABLE_ALL", "ENABLE_EXTENDED", "ENABLE_ALL"]


def open_session(file: Path | bytes, shown: Path, optimizations: Optimizations = "ENABLE_ALL") -> Any:
    """An onnxruntime session on the CPU.

    Args:
        file: The file, or its content.
        shown: The path to name in messages.
        optimizations: How far onnxruntime may change the graph.

    Raises:
        ExportMismatchError: onnxruntime cannot load it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_{optimizations}")
    source = file if isinstance(file, bytes) else str(file)
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportMismatchError(
            f"onnxruntime cannot load {shown}: {error}. Use a float32 model, operators and an operator set that "
            "onnxruntime knows, or a lower opset."
        ) from error


def crashes(path: Path) -> bool:
    """Whether onnxruntime dies of a file that it opens as it does by default.

    Some of its optimizations of half precision do (1.32: layer norm, transpose, product); so it is tried in another process.
    """
    script = "import sys, onnxruntime; onnxruntime.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])"
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, check=False)
    return done.returncode < 0  # ended by a signal; an exception is told when this process opens it


def run_session(session: Any, case: Case, shown: Path) -> tuple[list[str], list[Array]]:
    """The names and values of all outputs.

    Inputs are given by name where the file has the model's names, which an exporter may leave out if unused, otherwise in
    order.

    Raises:
        ExportMismatchError: The file takes other inputs, or does not run.
    """
    inputs = session.get_inputs()
    names = [item.name for item in inputs]
    if all(name in case.inputs for name in names):
        feed = {name: case.inputs[name] for name in names}
    elif len(names) == len(case.inputs):
        feed = dict(zip(names, case.inputs.values(), strict=True))
    else:
        raise ExportMismatchError(
            f"{shown} takes {len(inputs)} inputs ({', '.join(names)}), the example has "
            f"{len(case.inputs)} ({', '.join(case.inputs)}). Give example_inputs for exactly the arguments that forward uses."
        )
    try:
        arrays = {name: tensor.contiguous().numpy() for name, tensor in feed.items()}
    except (TypeError, RuntimeError) as error:
        raise DataError(f"onnxruntime cannot be given these inputs: {error}. Use float32 inputs.") from error
    try:
        outputs = session.run(None, arrays)
    except Exception as error:
        fixed = [f"{item.name} {item.shape}" for item in inputs]
        raise ExportMismatchError(
            f"{shown} does not run at {case} (its inputs: {', '.join(fixed)}): {error}. Make "
            "forward compute its shapes from x.shape[0], not from constants, or drop this size from batch_sizes."
        ) from error
    return [output.name for output in session.get_outputs()], [np.asarray(value) for value in outputs]


def run_values(session: Any, case: Case, shown: Path) -> dict[str, Array]:
    """The values of all outputs that are arrays of real numbers, by name."""
    found = zip(*run_session(session, case, shown), strict=True)
    return {name: value for name, value in found if value.dtype.kind == "f" and value.size > 1}
