"""Computed weights: what an op is given that follows from parameters alone, as a mask times a weight, or a part of a vector.

An op is affine in its weights, and so in what they follow from, where they are affine in that. Several parameters may have
part in it, each by itself, as in a product of two: to first order that is affine in all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxinvert.passes.capture import attribute
from fxinvert.passes.interpreted import Runner
from fxinvert.passes.inverse_op import call_arguments, opened

#: makes a weight of its direction and length
WEIGHT_NORM = "_weight_norm"
#: ops that round to a grid, and whose derivative is that of what they round: "straight through" (Bengio et al., arXiv 1308.3432)
ROUNDING = frozenset(
    ["fake_quantize_per_channel_affine", "fake_quantize_per_tensor_affine", "fused_moving_avg_obs_fake_quant"]
)


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """What a call passes, by argument name, as an op of rules names it: items of a list of values each by a name of its own."""
    arguments = call_arguments(node.target, node.args, node.kwargs)
    return opened(arguments, lambda value: isinstance(value, fx.Node))


def weights_of(node: fx.Node) -> dict[str, fx.Node]:
    """The tensors that an op is given which follow from parameters and buffers alone, by argument name."""
    named = named_arguments(node).items() if node.op in ("call_function", "call_method") else ()
    values = {
        name: value for name, value in named if isinstance(value, fx.Node) and "tensor_meta" in value.meta
    }
    return {name: value for name, value in values.items() if made_of(value)}


def made_of(value: fx.Node) -> list[fx.Node]:
    """The reads of parameters and buffers that a value follows from; none where it follows from the model's input, too."""
    steps = steps_to([value])
    if any(n not in steps for step in (*steps, value) for n in (step, *step.all_input_nodes)):
        return []
    return [step for step in steps if step.op == "get_attr"]


def steps_to(values: Iterable[fx.Node]) -> dict[fx.Node, None]:
    """What some values are computed by, in order, and by what no input has part in."""
    found: dict[fx.Node, None] = {}
    waiting = [value for value in values if _apart(value)][::-1]
    while waiting:
        step = waiting[-1]
        before = [n for n in step.all_input_nodes if n not in found and _apart(n)]
        waiting.extend(reversed(before))
        if not before:
            found[waiting.pop()] = None
    return found


def _apart(node: fx.Node) -> bool:
    """Whether a value is not made from input data."""
    return not (node.meta.get("active", True) or node.meta.get("fed", True))


def is_weight_norm(node: fx.Node) -> bool:
    """Whether a value is a weight that is made of its direction v and length g, two parameters."""
    inputs = node.all_input_nodes
    return node.meta.get("op") == WEIGHT_NORM and [n.op for n in inputs] == ["get_attr"] * 2


def expression(value: fx.Node) -> str:
    """The name of a parameter, or a digest of how a value follows from some: the same for all that follow in the same way."""
    told: dict[fx.Node, str] = {}
    for step in steps_to([value]):
        given = fx.node.map_arg((step.args, step.kwargs), told.__getitem__)
        text = f"{step.target}{given}"
        told[step] = str(step.target) if step.op == "get_attr" else hashlib.sha256(text.encode()).hexdigest()
    return told[value]


def evaluated(
    graph: fx.GraphModule,
    values: Mapping[str, fx.Node],
    given: Mapping[str, Tensor],
    *,
    rounded: bool = True,
) -> dict[str, Tensor]:
    """What parameters and buffers make of some values, by the names of these.

    Args:
        graph: whose parameters they are.
        values: see `weights_of`.
        given: parameters by name, as they are to be instead.
        rounded: whether what is rounded to a grid is; else it stays as it is.
    """
    runner = Runner(graph, garbage_collect_values=False)
    for step in steps_to(values.values()):
        if step.op == "get_attr" and str(step.target) in given:
            runner.env[step] = given[str(step.target)]
        elif not rounded and step.meta.get("op") in ROUNDING:
            runner.env[step] = runner.env[step.all_input_nodes[0]]
        elif step.meta.get("op") == WEIGHT_NORM:  # of torch's own no batch of derivatives is taken at once
            runner.env[step] = _normed(
                **call_arguments(step.target, *runner.fetch_args_kwargs_from_env(step))
            )
        else:
            runner.env[step] = runner.run_node(step)
    return {name: runner.env[value] for name, value in values.items()}


def _normed(v: Tensor, g: Tensor, dim: int) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def behind(node: fx.Node) -> tuple[str, ...]:
    """The names of the parameters that an op is given, or what is computed from them, and that are not frozen."""
    graph = node.graph.owning_module
    assert graph is not None, "a graph outside of its module"
    reads = (str(step.target) for step in steps_to(node.all_input_nodes) if step.op == "get_attr")
    return tuple(name for name in dict.fromkeys(reads) if is_open(graph, name))


def is_open(graph: nn.Module, name: str) -> bool:
    """Whether a parameter may change: it is one, and not frozen.

    A model that is frozen throughout was only loaded for inference: none of its parameters counts as frozen.
    """
    own = attribute(graph, name)
    thawed = isinstance(own, nn.Parameter) and own.requires_grad
    return thawed or (isinstance(own, nn.Parameter) and not any(p.requires_grad for p in graph.parameters()))


def is_affine(value: fx.Node, names: Iterable[str]) -> bool:
    """Whether a computed value is affine in each of some parameters by itself, and can be differentiated in it.

    A random change d tells: f(p + 2d) − f(p) is 2 (f(p + d) − f(p)), up to rounding, that to a grid included.

    Args:
        value: computed from parameters alone.
        names: of parameters that it may follow from.
    """
    graph = value.graph.owning_module
    assert graph is not None, "a graph outside of its module"
    draw = torch.Generator().manual_seed(0)
    read = {str(n.target) for n in made_of(value)}

    def at(name: str, place: Tensor) -> Tensor:
        return evaluated(graph, {"": value}, {name: place}, rounded=False)[""]

    for name in (name for name in names if name in read):
        own = attribute(graph, name).detach()
        change = torch.randn(own.shape, generator=draw).to(own) * (1 + own.abs())
        with torch.enable_grad():
            before = at(name, own.clone().requires_grad_())
        if not before.requires_grad:
            return False
        with torch.no_grad():
            once, twice = (at(name, own + k * change) - before for k in (1, 2))
        rounding = torch.finfo(before.dtype).eps ** 0.5 * (once.abs().max() + before.abs().max())
        if not bool(((twice - 2 * once).abs() <= rounding).all()):
            return False
    return True
