"""Trace: from a model to the normalized graph that every other pass works on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from fxinvert.errors import REPORT, TraceError
from fxinvert.passes.capture import capture, evaluating
from fxinvert.passes.normalize import normalize, supervised
from fxinvert.rules import RuleSet, default_rules


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
        TraceError: the model cannot be captured, does not run, has several outputs and none is named, or computes with
            the batch size of the example.
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    if is_normalized(model):
        assert isinstance(model, fx.GraphModule)
        return model
    _check_devices(model, inputs)
    rules = rules or default_rules()
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        graph = normalize(capture(model, rules), inputs, rules, output)
        _check_reproduces(model, graph, inputs, output)
    return graph


def is_normalized(model: nn.Module) -> bool:
    """Whether a module is a graph that `trace` has made."""
    return isinstance(model, fx.GraphModule) and all(
        "path" in n.meta for n in model.graph.nodes if n.op != "output"
    )


def _check_devices(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    tensors = [*model.parameters(), *model.buffers()]
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
    """The graph computes what the model computes, at the example's batch size and at twice that."""
    problem = _difference(model, graph, inputs, output)
    if problem:
        raise TraceError(f"the traced graph does not reproduce the model: {problem}. {REPORT}")
    if len({len(value) for value in inputs if isinstance(value, Tensor) and value.dim()}) == 1:
        doubled = tuple(torch.cat([value, value]) if isinstance(value, Tensor) else value for value in inputs)
        problem = _difference(model, graph, doubled, output)
        if problem:
            raise TraceError(
                f"the model computes with the batch size of the example ({problem}); "
                "let its forward() read the batch size from its input"
            )


def _difference(
    model: nn.Module, graph: fx.GraphModule, inputs: tuple[Any, ...], output: int | str | None
) -> str | None:
    """What differs between model and graph, in words; None if nothing does."""
    expected = supervised(model(*inputs), output)
    try:
        actual = graph(*inputs)
    except RuntimeError as error:  # a size that was read from the example and does not fit now
        return str(error)
    if actual.shape != expected.shape:
        return f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    if not torch.allclose(actual, expected, rtol=1e-3, atol=1e-5, equal_nan=True):
        return f"values differ by up to {float((actual - expected).abs().max()):.1e}"
    return None
