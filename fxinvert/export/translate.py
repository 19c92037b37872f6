"""torch's exporter, called so that names are the user's and a fixed axis is an error."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fxinvert.errors import DataError, ExportMismatchError, FxInvertError, TraceError
from fxinvert.export import complex_values
from fxinvert.export.annotate import SCOPES
from fxinvert.export.attended import Attention
from fxinvert.export.called import BATCH, Call, Half
from fxinvert.export.constants import with_values
from fxinvert.export.inputs import Case, like
from fxinvert.export.projected import ProjectedSteps
from fxinvert.export.quantized import FakeQuantized
from fxinvert.export.translations import translations
from fxinvert.passes.fakes import exportable
from fxinvert.passes.inputs import Flat
from fxinvert.passes.selected import as_it_runs
from fxinvert.quiet import quiet

FIRST_OPSET = 18
"""The exporter's own operator set; it cannot convert below."""

REWRITTEN = 2000
"""The most nodes among which patterns are looked for."""


def translate(
    model: nn.Module, call: Call, cases: Sequence[Case], opset: int, *, half: bool, destination: Path
) -> Iterator[Any]:
    """The `torch.onnx.ONNXProgram` of a model; then what else it is as it runs, which a proof may tell from the first.

    Args:
        model: The frozen model; in half precision a copy is taken.
        call: How it is called.
        cases: Whose outputs tell names and types; where all have one row, the batch need not vary.
        opset: Of the program.
        half: Whether to compute in half precision.
        destination: The path to name in messages.

    Raises:
        TraceError: torch cannot capture the model, or has no translation for something in it.
        ExportMismatchError: A named axis has been fixed.
        DataError: There is no such opset.
    """
    _show_calls(model)
    flat, inputs = call.flat(model), _tracing_inputs(call, cases)

    def named(captured: Flat, ones: bool = True, values: bool = False) -> Any:
        program = _program(captured, inputs, call, cases, opset, half, ones, values)
        _check_axes(program.model, call, destination)
        _use_own_names(program.model, "flat.model." if half else "model.")
        return program

    failed: FxInvertError | None = None
    try:
        yield named(flat)
    except (ExportMismatchError, TraceError) as error:
        failed = error
    last: FxInvertError | None = None
    with suppress(FxInvertError):  # what failed before is raised where this does not help
        for as_run in as_it_runs(flat, inputs):
            for ones in (True, False):
                try:
                    yield named(as_run, ones)
                except FxInvertError as error:
                    last = error
                else:
                    failed = None
                    break
    if failed is not None:
        with suppress(FxInvertError):
            yield named(flat, values=True)
            failed = None
    if failed is not None:
        if last is not None and _cause(last) != _cause(failed):
            failed.args = (f"{failed} Captured as it runs: {_cause(last)}.",)
        raise failed from failed.__cause__


def _show_calls(model: nn.Module) -> None:
    """Makes a captured model call what modes replace where they see it: they are not asked about ATen calls."""
    seen = {
        torch.ops.aten.lstm.input: torch.lstm,
        torch.ops.aten.scaled_dot_product_attention.default: F.scaled_dot_product_attention,
    }
    for graph in (m for m in model.modules() if isinstance(m, fx.GraphModule)):
        for node in graph.graph.nodes:
            node.target = seen.get(node.target, node.target)
        graph.recompile()


def _program(
    flat: Flat,
    inputs: tuple[Tensor, ...],
    call: Call,
    cases: Sequence[Case],
    opset: int,
    half: bool,
    ones: bool,
    values: bool,
) -> Any:
    """The program of what a model is captured as.

    Without `ones` code may ask whether axes have size 1, as for broadcasting; with `values` constants are computed beforehand.
    """
    name, kind = type(flat.model).__name__, "in half precision " if half else ""
    # attention is taken apart for ONNX: its other kernels lay their results out in ways that no view of the parts has
    with (
        quiet() as said,
        sdpa_kernel(SDPBackend.MATH),
        Attention(),
        ProjectedSteps(),
        FakeQuantized(),
        exportable(flat.model),
        complex_values.registered(),
    ):
        try:
            captured: Any = _in_half(flat, cases) if half else flat
            shapes = _dynamic_shapes(call)
            if values:
                captured = with_values(
                    torch.export.export(captured, inputs, dynamic_shapes=(shapes,), strict=False)
                )
            if values or not ones:  # the proof tells whether what is so for larger sizes is so for 1
                # without `ones`, whatever torch may find of other batch sizes, as that there are less than 64 / 3
                sized = shapes if ones else _dynamic_shapes(call, torch.export.Dim.DYNAMIC)
                captured = torch.export.export(
                    captured,
                    inputs,
                    dynamic_shapes=sized if values else (sized,),
                    strict=False,
                    prefer_deferred_runtime_asserts_over_guards=not ones,
                )
            program = torch.onnx.export(
                captured,
                inputs,
                dynamo=True,
                verbose=False,
                external_data=False,
                dynamic_shapes=(shapes,),
                opset_version=opset,
                optimize=False,
                input_names=list(call.inputs.names),
                custom_translation_table=translations(),
            )
            if program is not None:
                _optimize(program)
                # not before: of a value that is given twice, optimizing makes two
                for output, given in zip(program.model.graph.outputs, cases[0].expected, strict=True):
                    output.name = given
        except Exception as error:
            own = _innermost(error)
            if isinstance(own, FxInvertError):
                raise own from None  # what torch made of it ends in it: a circle
            failure = TraceError(
                f"torch could not export {name} {kind}to ONNX: {_cause(error)}. Remove what cannot be "
                "captured (branches on tensor values, .item(), operators without an ONNX translation) from forward."
            )
            if said.getvalue().strip():
                failure.add_note("torch said:\n" + said.getvalue().strip()[-4000:])
            raise failure from error
    if program is None:
        raise TraceError(f"torch returned nothing when exporting {name}; check the torch version")
    found = program.model.opset_imports.get("")
    if found != opset:
        raise DataError(
            f"opset {opset} is not available: the exporter made opset {found}; ask for that or for 20"
        )
    return program


def _optimize(program: torch.onnx.ONNXProgram) -> None:
    """Folds what is constant, and drops what is not used; in graphs that are not too large patterns are rewritten, too.

    Each of the optimizer's patterns is tried on every node: minutes for thousands of them, for few nodes less. Those of
    x + 0 and x * 1 are left out: they take 1e-8 for 0 and 1.00001 for 1, and drop the ε of a norm.
    """
    from onnx_ir.passes import Sequential, common
    from onnxscript import rewriter
    from onnxscript.optimizer import fold_constants_ir
    from onnxscript.rewriter.rules.common import _no_op

    common.InlinePass()(program.model)
    fold_constants_ir(program.model)
    if sum(1 for _ in program.model.graph) <= REWRITTEN:
        inexact = set(_no_op.rules)
        rewriter.rewrite(program.model, [r for r in rewriter._DEFAULT_REWRITE_RULES if r not in inexact])
        _keep_constants(program.model.graph)
        fold_constants_ir(program.model)
    Sequential(
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(program.model)


def _keep_constants(graph: Any) -> None:
    """Keeps all constants that rewriting has made: those of several nodes that one value is read by, as clips, are called alike, and
    of one name only the last is kept."""
    for value in (value for node in graph for value in node.inputs if value is not None):
        lost = value.producer() is None and value.const_value is not None
        if lost and graph.initializers.get(value.name) is not value:
            while value.name in graph.initializers:
                value.name += "_"
            graph.register_initializer(value)


def _in_half(flat: Flat, cases: Sequence[Case]) -> Half:
    dtypes = [tensor.dtype for tensor in cases[0].expected.values()]
    return Half(copy.deepcopy(flat), dtypes)


def _tracing_inputs(call: Call, cases: Sequence[Case]) -> tuple[Tensor, ...]:
    """The example; an axis of size 1 is lengthened, as torch likes to take that for a constant."""
    sizes = {
        axis: max([2, *(case.sizes[axis] for case in cases)]) if size == 1 else size
        for axis, size in call.sizes.items()
        if size > 1 or any(case.sizes[axis] > 1 for case in cases)
    }
    return like(call, sizes, seed=0) if sizes != call.sizes else call.example


def _dynamic_shapes(call: Call, batch: Any = None) -> tuple[dict[int, Any], ...]:
    """The named axes as torch wants them; one that is only named may have any size that forward accepts (multiples of 4)."""
    batch = batch or torch.export.Dim(BATCH)
    return tuple({d: batch if axis == BATCH else axis for d, axis in axes.items()} for axes in call.axes)


def _check_axes(model: Any, call: Call, destination: Path) -> None:
    """Refuses a graph that has fixed a named axis."""
    named: Mapping[str, Mapping[int, str]] = dict(zip(call.inputs.names, call.axes, strict=True))
    for value in model.graph.inputs:
        for dimension, axis in named.get(value.name, {}).items():
            if value.shape is None or not isinstance(value.shape[dimension], int):
                continue
            what = "batch size" if axis == BATCH else f"size of axis {axis!r}"
            raise ExportMismatchError(
                f"{destination} was not written: the exported graph has fixed the {what} of input {value.name!r} "
                f"at {value.shape[dimension]}. Something in forward depends on that number: compute shapes from x.shape "
                "(x.flatten(1), not x.view(4, -1)), and do not add buffers that have this dimension."
            )


def _use_own_names(model: Any, prefix: str) -> None:
    """Call weights and modules as the user does."""
    for value in list(model.graph.initializers.values()):
        own = value.name.removeprefix(prefix)
        if own != value.name and own not in model.graph.initializers:
            value.name = own
    module = prefix.removesuffix(".")
    for node in model.graph.all_nodes():
        scopes = node.metadata_props.get(SCOPES)
        if scopes:
            node.metadata_props[SCOPES] = scopes.replace(f"'{prefix}", "'").replace(f"'{module}', ", "")


def _innermost(error: BaseException) -> BaseException:
    """The error at the beginning of those that torch chained."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _cause(error: BaseException) -> str:
    """The first line of the innermost error; torch's own summary is long."""
    error = _innermost(error)
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0]}"
