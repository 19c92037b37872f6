"""Checks: a graph computes what its model computes, for any batch, sample by sample."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from fxinvert.errors import REPORT, TraceError, out_of_memory
from fxinvert.passes.capture import CaptureError, describe
from fxinvert.passes.causes import first_draw, first_mix, first_parting
from fxinvert.passes.inputs import Flat
from fxinvert.passes.interpreted import Runner
from fxinvert.passes.leaves import mapped
from fxinvert.passes.runs import ROUNDING, batch_size, difference, doubled, largest_of, real, run, same, tried
from fxinvert.passes.sizes import of_computed_size

Values = Mapping[fx.Node, Any]


def check_readable(model: object) -> None:
    """The model is a module, made of Python code.

    Raises:
        TraceError: it is none, or TorchScript.
    """
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TraceError(f"the model is {what}; a torch.nn.Module, made and loaded, is needed")
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError(
            "the model is a TorchScript module, into which nothing can look; give the module that it was made from"
        )


def check_devices(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """The model has values, and lies with its inputs on one device.

    Raises:
        TraceError: it does not.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if any(map(is_lazy, tensors)):
        raise TraceError("the model has lazy modules without weights yet; run it once on an example first")
    devices = list(dict.fromkeys(str(t.device) for t in tensors))
    if "meta" in devices:
        raise TraceError("the model's parameters have no values (device 'meta'); load its weights first")
    if len(devices) > 1:
        raise TraceError(f"the model is spread over devices {', '.join(devices)}; move it to one of them")
    for i, value in enumerate(inputs):
        if devices and str(value.device) != devices[0]:
            raise TraceError(
                f"example input {i} is on device {value.device}, the model on {devices[0]}; move one of them"
            )


def check_reproduces(
    model: Flat, graph: fx.GraphModule, values: Values, inputs: tuple[Tensor, ...], expected: Tensor
) -> None:
    """The graph computes what the model computes, at the example's batch size and at twice that, row by row.

    Running it on twice the samples also tells how many rows of every node's value belong to a sample, samples in order;
    that is written into its `meta["rows"]`, 0 where none do.

    Args:
        model: a function of the input tensors that returns the supervised output.
        graph: what was captured of it.
        values: of the graph's nodes, for the example.
        inputs: example tensors.
        expected: what the model returns for them.

    Raises:
        TraceError: the model is random, mixes its samples, or computes with the batch size itself.
        CaptureError: the graph does not compute what the model computes, or values say how many rows the output has.
    """
    problem = difference(expected, _output(graph, values))
    if problem:
        if random := randomness(model, inputs, expected):
            raise TraceError(random)
        if bool(real(expected).isnan().any()):
            raise TraceError(
                "the model gives NaN for the example inputs, so that nothing can be compared with it; give inputs that "
                "it can compute with (attention gives NaN where a mask hides all keys)"
            )
        parting = first_parting(model, graph, values, inputs)
        first = f", first in what {parting!r} gives" if parting else ""
        raise CaptureError(
            f"the traced graph does not reproduce the model: {problem}{first}. If forward() goes another way while it is captured "
            "(torch.compiler.is_exporting(), tensors without values), let it go the same way, or give it what it makes itself "
            "otherwise, such as masks and kinds of tokens, as inputs; if it switches torch.autocast, "
            f"which a ready graph does not tell, let it compute in one precision; if neither: {REPORT}"
        )
    if not expected.dim() or not len(expected) or len(expected) % max(batch_size(inputs), 1):
        raise _no_rows(graph, values, f"its output has shape {tuple(expected.shape)}")
    larger, rows = doubled(inputs), len(expected)
    try:
        wanted = run(model, larger)
    except TraceError as error:
        _check_memory(error)
        raise TraceError(f"{WITH_BATCH_SIZE} ({error}); {KEEP_FIRST}") from error
    grown = sum(map(int.__ne__, wanted.shape, expected.shape)) if wanted.dim() == expected.dim() else 0
    if grown > 1:
        raise TraceError(
            f"the output compares samples with one another: its shape is {tuple(expected.shape)}, for twice the samples "
            f"{tuple(wanted.shape)}, so that no row is a sample's own; let the model give what it compares, such as features of "
            "each sample, or choose that by output=…, and compare in the loss"
        )
    if wanted.shape != (2 * rows, *expected.shape[1:]):
        raise _no_rows(graph, values, f"for twice the samples the output's shape is {tuple(wanted.shape)}")
    try:
        problem = difference(wanted, tried(_Marking(graph, values, batch_size(inputs)).run, larger))
    except TraceError as error:  # a size that was read from the example and does not fit now
        _check_memory(error)
        problem = str(error)
    if problem:
        raise CaptureError(f"{WITH_BATCH_SIZE} ({problem}); {KEEP_FIRST}")
    (output,) = graph.graph.find_nodes(op="output")
    if output.args[0] in of_computed_size(graph, values):
        raise _no_rows(graph, values, "it has as many rows only because of the values")
    if mixed := mixture(model, inputs, expected, wanted[:rows]):
        raise TraceError(mixed)


def randomness(model: Flat, inputs: tuple[Tensor, ...], expected: Tensor) -> str | None:
    """That a model gives something else for the same inputs, in words; None if it does not.

    Args:
        model: a function of the input tensors that returns the supervised output.
        inputs: example tensors.
        expected: what the model returned for them.
    """
    again = run(model, inputs)
    if again.shape != expected.shape or torch.allclose(again, expected, equal_nan=True):
        return None
    if written := _written(model, inputs):
        more = f" and {len(written) - 1} more" if len(written) > 1 else ""
        return (
            f"the model changes from run to run in evaluation mode: forward() writes to its buffer {written[0]!r}{more}; switch that "
            "off (observers of quantization by model.apply(torch.ao.quantization.disable_observer))"
        )
    draw, spared = first_draw(model, inputs)
    return (
        f"the model is random: two runs in evaluation mode give different outputs; {draw} draws (a functional dropout "
        f"without training=self.training does that, or noise that forward() draws: make it an input{spared})"
    )


def _written(model: Flat, inputs: tuple[Tensor, ...]) -> list[str]:
    """The buffers that a run changes."""
    before = {name: buffer.clone() for name, buffer in model.model.named_buffers()}
    run(model, inputs)
    now = dict(model.model.named_buffers())
    return [name for name, value in before.items() if not torch.equal(value, now[name])]


def mixture(
    model: Flat, inputs: tuple[Tensor, ...], expected: Tensor, others: Tensor | None = None
) -> str | None:
    """That what a model gives for a sample changes with the others, in words; None if it does not.

    Args:
        model: a function of the input tensors that returns the supervised output.
        inputs: example tensors.
        expected: what the model returns for them.
        others: what it returns for them together with other samples.
    """
    size = batch_size(inputs)
    each = len(expected) // size
    # a maximum over samples is one sample's own, which it does not change with: two of them are tried
    moved = {0: 0.0 if others is None else _moved(expected, others)}
    turned = {0: 0.0}  # the same if the rows of a sample stand a batch apart
    for number in sorted({0, size - 1}) if size > 1 else ():
        with suppress(TraceError):  # a model need not run on one sample
            alone = run(model, _alone(inputs, number))
            moved[number] = max(moved.get(number, 0.0), _moved(expected[number * each :][:each], alone))
            turned[number] = _moved(expected[number::size], alone)
    number, rounding = max(moved, key=moved.__getitem__), ROUNDING * largest_of(real(expected), infinite=0.0)
    if moved[number] <= rounding:
        return None
    first = first_mix(model, inputs, _alone(inputs, number), number, size)
    if size > 1 and max(turned.values()) <= rounding:
        return (
            f"the model's output goes across the samples of a batch: the {each} rows of a sample stand apart, row i is of "
            f"sample i mod {size}. They are put so first by {first}: let it put what belongs to a sample along an axis of its "
            "own (torch.stack(…, 1)), which may be flattened into the first"
        )
    return (
        "the model computes across the samples of a batch: a sample's output changes with the others "
        f"(by up to {moved[number]:.1e}), so that it has no target of its own; it is changed first by "
        f"{first}: let it go over other axes than the batch"
    )


def _moved(expected: Tensor, actual: Tensor) -> float:
    """How far an output has moved; one of another shape tells nothing."""
    if actual.shape != expected.shape or not expected.numel():
        return 0.0
    return float((real(actual).nan_to_num() - real(expected).nan_to_num()).abs().max())


def _alone(inputs: tuple[Tensor, ...], number: int) -> tuple[Tensor, ...]:
    """One sample of the inputs; what is shared by the samples stays."""
    size = batch_size(inputs)
    return tuple(v[number : number + 1] if v.dim() and len(v) == size else v for v in inputs)


def _no_rows(graph: fx.GraphModule, values: Values, said: str) -> TraceError:
    """What to raise where the output has no rows for every sample: data may say how many, else it is the batch size."""
    (output,) = graph.graph.find_nodes(op="output")
    computed = of_computed_size(graph, values)
    first = next((node for node in graph.graph.nodes if node in computed), None)
    if first is None or not computed.intersection(output.all_input_nodes):
        return TraceError(f"{WITH_BATCH_SIZE} ({said}); {KEEP_FIRST}")
    return CaptureError(
        f"the output's shape is data-dependent ({said}): {describe(first)} selects by values, so that no rows are a "
        "sample's own; let forward() keep all rows (torch.where, or a mask in the loss), or take an output before that"
    )


WITH_BATCH_SIZE = "the model computes with the batch size of the example"
KEEP_FIRST = (
    "let its forward() read the batch size from its input (x.shape[0], not len(x)), compute all samples at once, and keep the batch "
    "as the first axis"
)


def _check_memory(error: TraceError) -> None:
    """Raises TraceError if memory is all that a run on more samples lacked, which tells nothing of the model."""
    if out_of_memory(error):
        raise TraceError(
            f"memory ran out where the model was run on twice the samples of the example ({error}), which tells whether it takes "
            "any number of them; give fewer example inputs, one is enough"
        ) from error


class _Marking(Runner):
    """Runs a graph on twice the samples of an example, those first, and marks every node's rows; keeps no values.

    Where the rows of samples are along the second axis, not the first, that is marked, too: they are `behind`.
    """

    def __init__(self, graph: fx.GraphModule, few: Values, size: int) -> None:
        super().__init__(graph)
        self.few, self.size = few, size
        self.computed = of_computed_size(graph, few)

    def run_node(self, n: fx.Node) -> Any:
        """The node's value, its rows marked."""
        value = super().run_node(n)
        if n.op != "output":
            few, told = self.few[n], n not in self.computed
            rows = self._rows(few, value) if told else 0
            told &= not rows and isinstance(few, Tensor) and few.dim() > 2
            behind = self._rows(few.transpose(0, 1), value.transpose(0, 1)) if told else 0
            n.meta["rows"], n.meta["behind"] = rows, behind > 0
        return value

    def _rows(self, value: Any, more: Any) -> int:
        if not isinstance(value, Tensor) or not value.dim() or not self.size or len(value) % self.size:
            return 0
        doubles = more.shape == (2 * len(value), *value.shape[1:])
        return len(value) // self.size if doubles and same(more[: len(value)], value) else 0


def _output(graph: fx.GraphModule, values: Values) -> Any:
    (output,) = graph.graph.find_nodes(op="output")
    return mapped(output.args[0], values.__getitem__)
