"""Trace: from a model to the normalized graph that every other pass works on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from fxinvert.errors import REPORT, TraceError
from fxinvert.passes.capture import capture, evaluating, unchanged
from fxinvert.passes.leaves import copied
from fxinvert.passes.normalize import normalize
from fxinvert.passes.outputs import supervised
from fxinvert.rules import RuleSet, default_rules

#: how far a sample's output may move with its batch, relative to the largest output: rounding, not arithmetic
_ROUNDING = 1e-2


def trace(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    *,
    output: int | str | None = None,
    rules: RuleSet | None = None,
) -> fx.GraphModule:
    """Captures a model as a normalized `torch.fx.GraphModule`, in evaluation mode.

    All spellings of an op (module, function, method, ATen, in-place) become one ATen call; parameters are read by the
    user's names and shared with the model, which is left as it was found. Every node has its shape in
    `meta["tensor_meta"]`. The graph takes any batch size: that is checked with twice the example's.

    Args:
        model: a module, or a `GraphModule` traced already.
        example_inputs: a tensor, or the tuple of the model's positional inputs, each `(B, …)`.
        output: which output is supervised, by index or key, for a model with several.
        rules: the rules in force; modules and functions that they name are kept whole.

    Raises:
        TraceError: the model cannot be captured, does not run, has several outputs and none is named, computes with
            the batch size of the example or across its samples, or is random.
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"the model is {type(model).__name__}; a torch.nn.Module is needed")
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    if is_normalized(model):
        assert isinstance(model, fx.GraphModule)
        return model
    _check_devices(model, inputs)
    rules = rules or default_rules()
    cuda = sorted({v.device.index for v in inputs if isinstance(v, Tensor) and v.device.type == "cuda"})
    with evaluating(model), unchanged(model), torch.no_grad(), torch.random.fork_rng(devices=cuda):
        graph = normalize(capture(model, len(inputs), rules), copied(inputs), rules, output)
        _check_reproduces(model, graph, inputs, output)
    return graph


def is_normalized(model: nn.Module) -> bool:
    """Whether a module is a graph that `trace` has made."""
    return isinstance(model, fx.GraphModule) and all(
        "path" in n.meta for n in model.graph.nodes if n.op != "output"
    )


def _check_devices(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    tensors = [*model.parameters(), *model.buffers()]
    if any(map(is_lazy, tensors)):
        raise TraceError("the model has lazy modules without weights yet; run it once on an example first")
    devices = list(dict.fromkeys(str(t.device) for t in tensors))
    if "meta" in devices:
        raise TraceError("the model's parameters have no values (device 'meta'); load its weights first")
    if len(devices) > 1:
        raise TraceError(f"the model is spread over devices {', '.join(devices)}; move it to one of them")
    for i, value in enumerate(inputs):
        if devices and isinstance(value, Tensor) and str(value.device) != devices[0]:
            raise TraceError(
                f"example input {i} is on device {value.device}, the model on {devices[0]}; move one of them"
            )


def _check_reproduces(
    model: nn.Module, graph: fx.GraphModule, inputs: tuple[Any, ...], output: int | str | None
) -> None:
    """The graph computes what the model computes, at the example's batch size and at twice that, row by row."""
    expected = _run(model, inputs, output)
    problem = _difference(expected, graph, inputs)
    if problem:
        again = _run(model, inputs, output)
        if again.shape == expected.shape and not torch.allclose(again, expected, equal_nan=True):
            raise TraceError(
                "the model is random: two runs in evaluation mode give different outputs (a functional dropout "
                "without training=self.training does that)"
            )
        raise TraceError(f"the traced graph does not reproduce the model: {problem}. {REPORT}")
    if len({len(value) for value in inputs if isinstance(value, Tensor) and value.dim()}) == 1:
        _check_any_batch(model, graph, inputs, expected, output)


def _check_any_batch(
    model: nn.Module, graph: fx.GraphModule, inputs: tuple[Any, ...], rows: Tensor, output: int | str | None
) -> None:
    """With copies of the first sample behind it, a batch gives the same outputs `rows` `(B, …)`, and more of them."""
    larger = tuple(
        torch.cat([value, value[:1].expand_as(value)]) if isinstance(value, Tensor) and value.dim() else value
        for value in inputs
    )
    try:
        expected = _run(model, larger, output)
        problem = _difference(expected, graph, larger)
        if expected.shape != (2 * len(rows), *rows.shape[1:]):
            problem = f"for twice the samples the output's shape is {tuple(expected.shape)}"
    except TraceError as error:
        problem = str(error)
    if problem:
        raise TraceError(
            f"the model computes with the batch size of the example ({problem}); "
            "let its forward() read the batch size from its input, and keep the batch as the first axis"
        )
    moved = (expected[: len(rows)] - rows).nan_to_num().abs()
    if moved.numel() and float(moved.max()) > _ROUNDING * float(rows.nan_to_num().abs().max()):
        raise TraceError(
            "the model computes across the samples of a batch: a sample's output changes with the others "
            f"(by up to {float(moved.max()):.1e}), so that it has no target of its own"
        )


def _run(model: nn.Module, inputs: tuple[Any, ...], output: int | str | None = None) -> Tensor:
    """The supervised output, for inputs that the model may change.

    Raises:
        TraceError: the model does not run on these inputs, or has no such output.
    """
    try:
        return supervised(model(*copied(inputs)), output)
    except TraceError:
        raise
    except Exception as error:  # whatever the user's forward raises
        shapes = ", ".join(str(tuple(v.shape)) for v in inputs if isinstance(v, Tensor))
        raise TraceError(f"the model does not run on inputs of shape {shapes}: {error}") from error


def _difference(expected: Tensor, graph: fx.GraphModule, inputs: tuple[Any, ...]) -> str | None:
    """What differs between the model's output and the graph's, in words; None if nothing does."""
    try:
        actual = _run(graph, inputs)
    except TraceError as error:  # a size that was read from the example and does not fit now
        return str(error)
    if actual.shape != expected.shape:
        return f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    if not torch.allclose(actual, expected, rtol=1e-3, atol=1e-5, equal_nan=True):
        return f"values differ by up to {float((actual - expected).abs().max()):.1e}"
    return None
