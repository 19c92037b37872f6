"""Updated weights into the user's own ONNX file, recognized by what they were.

The file must compute what the original model computes: that is proven first. Then every updated weight is looked for among
the file's tensors by the *original* value, whatever it is called: as it is, transposed, reshaped, cut into query, key and value,
in ONNX's order of gates, or folded with the batch norm that follows it. A weight that is found nowhere is refused by name. At the end the
new file is proven to compute what the updated model computes, and only then is it put in its place.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxinvert.errors import DataError, ExportMismatchError, TraceError
from fxinvert.export.annotate import PREFIX
from fxinvert.export.called import Axes, Call
from fxinvert.export.carriers import carriers_of, chosen, matches
from fxinvert.export.facts import facts_of
from fxinvert.export.files import destination_of, move, named, unwritable, workplace
from fxinvert.export.forms import Form, forms_of, unused
from fxinvert.export.inputs import check_settings, frozen_copy, make_cases, rng_kept
from fxinvert.export.onnx_file import proven
from fxinvert.export.proof import ATOL, RTOL, Proof, cases_of, prove
from fxinvert.export.summary import ExportReport
from fxinvert.modes import as_usual
from fxinvert.quiet import quiet
from fxinvert.result import PostTrainingResult

SHOWN = 6


@as_usual()
def update_onnx(
    model: nn.Module | PostTrainingResult,
    original: nn.Module,
    example_inputs: Any,
    into: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
    batch_sizes: Sequence[int] | None = None,
    dynamic_axes: Axes | None = None,
    axis_sizes: Mapping[str, Sequence[int]] | None = None,
    atol: float = ATOL,
    rtol: float = RTOL,
) -> ExportReport:
    """Put a model's updated weights into an ONNX file of the original model, and prove the result.

    Args:
        model: The updated model, or the result of `post_train`.
        original: The model that the file was exported from, with its own weights.
        example_inputs: As for `export_onnx`.
        into: The ONNX file of the original model, by any exporter; it stays as it is.
        path: The file to write; may be the same as `into`, which is then replaced at the very end.
        metadata: Facts to add to the file's metadata; keys get the prefix `fxinvert.`.
        batch_sizes: Batch sizes at which both files are proven; by default as for `verify_onnx`.
        dynamic_axes: Names of other dimensions that may vary, as for `export_onnx`.
        axis_sizes: Sizes of those axes to run, by name; by default half of the example's.
        atol: Absolute tolerance.
        rtol: Tolerance relative to each expected element.

    Returns:
        What was run and how large the differences are.

    Raises:
        ExportMismatchError: The file is not valid or not of the original model, or with the new weights it does not
            compute what the updated model computes.
        DataError: There is no such file, the models do not fit each other, a weight cannot be found in the file, or the
            path cannot be written.
    """
    sizes = check_settings(batch_sizes, atol, rtol)
    source, destination = named(into), destination_of(path)
    if not source.is_file():
        raise DataError(f"there is no ONNX file at {source} to put weights into")
    result = model if isinstance(model, PostTrainingResult) else None
    with workplace(destination) as folder, rng_kept():
        before = frozen_copy(original)
        after = frozen_copy(model.model if isinstance(model, PostTrainingResult) else model)
        _check_alike(before, after)
        call = Call.of(before, example_inputs, dynamic_axes)
        old, note = cases_of(source, before, call, sizes, axis_sizes)
        try:
            prove(source, Proof(before, call, old, atol, rtol))
        except ExportMismatchError as error:
            raise ExportMismatchError(
                f"{source} is not a file of the original model, so that no weight can be put in its place. {error}"
            ) from error
        file = _load(source)
        _replace(file, _forms(before, after, call, old[0].inputs.values()), source)
        facts = facts_of(after, result, metadata, proven=proven(old, atol, rtol))
        file.metadata_props.update(facts | {f"{PREFIX}into": source.name})
        written = Path(folder) / destination.name
        _save(file, written, destination, external=_has_external_data(source))
        del file
        new = make_cases(after, call, [case.sizes for case in old])
        report = prove(written, Proof(after, call, new, atol, rtol, note), shown=destination)
        move(Path(folder), destination)
    return report


def _check_alike(before: nn.Module, after: nn.Module) -> None:
    shapes = [{name: tuple(t.shape) for name, t in _weights(m).items()} for m in (before, after)]
    if shapes[0] != shapes[1]:
        different = [
            name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name)
        ]
        raise DataError(
            f"the original and the updated model do not have the same weights: {_listed(different)} differ in name or shape"
        )


def _weights(model: nn.Module) -> dict[str, Tensor]:
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _forms(before: nn.Module, after: nn.Module, call: Call, inputs: Any) -> list[Form]:
    """Everything the file may hold of the model's weights, those that nothing reads left out."""
    try:
        with quiet():
            graph = torch.export.export(call.flat(before), tuple(inputs), strict=False).module()
    except Exception as error:
        raise TraceError(f"torch.export cannot follow {type(before).__name__}: {error}") from error
    assert isinstance(graph, fx.GraphModule)
    first, second = _weights(before), _weights(after)
    ignored = unused(graph.graph, first)
    forms = forms_of(before, graph.graph, first, second)
    return [
        form for form in forms if form.before.is_floating_point() and not ignored.issuperset(form.made_of)
    ]


def _replace(file: Any, forms: Sequence[Form], source: Path) -> None:
    """Write the updated values of all forms; nothing is said to be done that is not.

    Raises:
        DataError: An updated weight is not in the file, or which one is meant cannot be told.
    """
    needed = {name for form in forms for name in form.made_of if _changed(form)}
    placed: set[str] = set()
    for carrier in list(carriers_of(file)):
        found = matches(carrier, forms)
        if not found:
            continue
        try:
            decided = chosen(carrier, found)
        except DataError as error:
            raise DataError(f"{source}: {error}. {ADVICE}") from error
        for number, (match, uses) in enumerate(decided):
            if uses is None or number == 0:
                carrier.write(match.array)
            else:
                carrier.split(uses, match.array, number)
        written = [match.array for match, _ in decided]
        meant = [m for m in found if any(np.array_equal(m.array, array) for array in written)]
        placed.update(name for match in meant for name in match.form.made_of)
    missing = [name for name in dict.fromkeys(n for f in forms for n in f.made_of) if name in needed - placed]
    if missing:
        raise DataError(
            f"{source} holds no tensor with the original values of {_listed(missing)}: an optimizer has folded, "
            f"merged, dropped or quantized them. {ADVICE}"
        )


ADVICE = "Nothing was written. Export the updated model afresh with export_onnx, or give a file exported without optimization."


def _changed(form: Form) -> bool:
    return len(form.made_of) == 1 and not torch.equal(form.before, form.after)


def _load(source: Path) -> Any:
    import onnx_ir

    try:
        return onnx_ir.load(source)
    except Exception as error:
        raise ExportMismatchError(f"{source} cannot be read: {error}") from error


def _has_external_data(source: Path) -> bool:
    import onnx
    from onnx.external_data_helper import uses_external_data

    loaded = onnx.load(str(source), load_external_data=False)
    return any(uses_external_data(tensor) for tensor in loaded.graph.initializer)


def _save(file: Any, written: Path, destination: Path, *, external: bool) -> None:
    import onnx_ir

    try:
        onnx_ir.save(file, written, external_data=f"{written.name}.data" if external else None)
    except OSError as error:
        raise unwritable(destination, error) from error


def _listed(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
