"""Linearized: the targets of many values at once, from the rows of the output's Jacobian.

Between a value v and the output, the model is taken by its derivative J at the forward pass, sample by sample:

    t_v = v + Jᵀ(JJᵀ + λI)⁻¹ (t − o),   λ = trace(JJᵀ)/κ²

the nearest v whose output, to first order, is the target t (the one equation, for the region from v to the output). Where
an output has few numbers, J has few rows: one backward pass for each gives the rows of *every* value's J, and all
targets cost as much as a few forward passes, however the graph branches; samples are taken so many at a time that their
rows fit into memory, and of a single sample values. Other outputs take a few steps of conjugate gradients for every value:
what comes closest to t after n of them lies in the span of Jᵀr, (JᵀJ)Jᵀr, … (JᵀJ)ⁿ⁻¹Jᵀr with r = t − o. A single step is
taken for all values at once, in as many backward passes however many values there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from fxinvert.inversion.replay import Evaluator, forward_values, output_given, placeholders_of
from fxinvert.linalg.jacobian import Jacobian, differentiable
from fxinvert.linalg.solvers import cgls
from fxinvert.linalg.vectors import dot, norm, per_sample
from fxinvert.passes.flow import Flow, by_sample


class Effort(NamedTuple):
    """How closely linearized targets are found.

    Attributes:
        rows: outputs of up to so many numbers are differentiated row by row, exactly.
        steps: of conjugate gradients for others, for every value by itself; None: one, for all values at once.
    """

    rows: int
    steps: int | None


#: for targets that are looked at
CAREFUL = Effort(64, 4)
#: for those that ops are fitted to: one fit to all samples gains little from closer targets of each, which take most of its time
QUICK = Effort(16, None)
#: random directions of the output that tell how long a step is
PROBES = 8


def linearized_targets(
    graph: fx.GraphModule,
    values: Mapping[fx.Node, Any],
    nodes: Sequence[fx.Node],
    target: Tensor,
    condition_limit: float,
    memory_limit: int,
    effort: Effort,
) -> dict[fx.Node, Tensor]:
    """The targets of some values by the output's derivative.

    Args:
        graph: the normalized forward graph.
        values: of its forward pass.
        nodes: whose targets are asked for, `(B, …)` each.
        target: of the output, `(B, …)`.
        condition_limit: κ.
        memory_limit: bytes that rows that are worked on together may take.
        effort: how closely.
    """
    flow = Flow(graph)
    missing = by_sample(flow.exit, target - values[flow.exit])
    wanted = [node for node in nodes if node is not flow.exit]
    if not wanted:
        return {flow.exit: target}
    if missing.shape[1] <= effort.rows:
        corrections = _from_rows(graph, flow, values, wanted, missing, condition_limit, memory_limit)
    elif effort.steps is None:
        corrections = _by_probes(graph, flow, values, wanted, missing)
    else:
        corrections = _by_products(graph, flow, values, wanted, missing, effort.steps)
    # in their own place: all of them can be much
    found = {
        n: own.reshape(values[n].shape).add_(values[n]) for n, own in zip(wanted, corrections, strict=True)
    }
    return found | {flow.exit: target}


def _from_rows(
    graph: fx.GraphModule,
    flow: Flow,
    values: Mapping[fx.Node, Any],
    nodes: Sequence[fx.Node],
    missing: Tensor,
    condition_limit: float,
    memory_limit: int,
) -> list[Tensor]:
    """One backward pass per number of the output, for as many nodes together as fit into memory; corrections `(B, n)`."""
    samples, rows = missing.shape

    def corrections(values: Mapping[fx.Node, Any], missing: Tensor) -> list[Tensor]:
        found = list[Tensor]()
        with torch.enable_grad(), differentiable():
            points, output = _tracked(graph, flow, values, nodes, Evaluator.run_node)
            for some in _fitting(points, memory_limit // rows):
                passes = [
                    torch.autograd.grad(column.sum(), some, retain_graph=True, materialize_grads=True)
                    for column in output.unbind(1)
                ]
                jacobians = (torch.stack(gradients, 1) for gradients in zip(*passes, strict=True))
                found += [_correction(jacobian, missing, condition_limit) for jacobian in jacobians]
        return found

    size = rows * sum(values[node].nbytes for node in nodes)
    parts = min(max(math.ceil(size / memory_limit), 1), samples)
    if parts == 1:
        return corrections(values, missing)
    found = [torch.empty_like(by_sample(node, values[node])) for node in nodes]
    for part in torch.arange(samples, device=missing.device).chunk(parts):
        with torch.no_grad():
            own = forward_values(graph, placeholders_of(graph, values, part))
        for whole, correction in zip(found, corrections(own, missing[part]), strict=True):
            whole[part] = correction
    return found


def _fitting(values: Sequence[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """The values in their order, as many at a time as take no more than so many bytes, one at least."""
    some, size = list[Tensor](), 0
    for value in values:
        if some and size + value.nbytes > limit:
            yield some
            some, size = [], 0
        some.append(value)
        size += value.nbytes
    yield some


def _by_products(
    graph: fx.GraphModule,
    flow: Flow,
    values: Mapping[fx.Node, Any],
    nodes: Sequence[fx.Node],
    missing: Tensor,
    steps: int,
) -> list[Tensor]:
    """A few conjugate-gradient steps for every node by itself, all of them on one recording of the graph."""
    with torch.enable_grad(), differentiable():
        points, output = _tracked(
            graph, flow, values, nodes, lambda runner, n: runner.differentiable(n, flow.nodes)
        )
        # where all of them start, in one pass
        steepest = torch.autograd.grad(output, points, missing, retain_graph=True, allow_unused=True)
    rests = [partial(_output_given, graph, flow, values, node) for node in nodes]
    nothing = torch.zeros(len(missing), dtype=missing.dtype, device=missing.device)
    return [
        cgls(
            jacobian, missing, nothing, largest=nothing, tolerance=0.0, small_enough=nothing, limit=steps,
            pulled=pulled,
        ).correction
        for jacobian, pulled in zip(Jacobian.several(rests, points, output), steepest, strict=True)
    ]  # fmt: skip


def _by_probes(
    graph: fx.GraphModule,
    flow: Flow,
    values: Mapping[fx.Node, Any],
    nodes: Sequence[fx.Node],
    missing: Tensor,
) -> list[Tensor]:
    """The step of steepest descent d = αJᵀr, α = ‖Jᵀr‖² / ‖JJᵀr‖², for all nodes at once; its length is estimated.

    Jᵀr takes one backward pass. Of w = JJᵀr the part along r is ‖Jᵀr‖² / ‖r‖, and the square of what is across it is the
    expectation of ⟨z, w⟩² = ⟨Jᵀz, Jᵀr⟩² for an r-free z of random signs (Hutchinson 1989): a backward pass for each z.
    The signs are the same for every sample, so that samples do not depend on one another.
    """
    generator, exact = torch.Generator().manual_seed(0), torch.promote_types(missing.dtype, torch.float32)
    wanted = missing.to(exact)
    size = norm(wanted)
    unit = wanted / per_sample(size.clamp_min(torch.finfo(exact).tiny), wanted)
    with torch.enable_grad(), differentiable():
        points, output = _tracked(graph, flow, values, nodes, Evaluator.run_node)

        def pulled(dual: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(
                output, points, dual.to(output.dtype), retain_graph=True, materialize_grads=True
            )

        steepest = pulled(missing)
        slopes = [dot(g.to(exact), g.to(exact)).double() for g in steepest]
        across = [torch.zeros_like(slope) for slope in slopes]
        for _ in range(PROBES):
            signs = torch.randint(2, missing.shape[1:], generator=generator).to(unit) * 2 - 1
            for found, g, other in zip(
                across, steepest, pulled(signs - unit * (unit @ signs)[:, None]), strict=True
            ):
                found += dot(g.to(exact), other.to(exact)).double().square() / PROBES

    def step(g: Tensor, slope: Tensor, across: Tensor) -> Tensor:
        curvature = (slope / size).square() + across
        # along a direction that J does not see, in the digits there are, there is no step
        seen = curvature >= torch.finfo(exact).tiny
        return g * per_sample(torch.where(seen, slope / curvature, 0).to(g.dtype), g)

    return [step(*given) for given in zip(steepest, slopes, across, strict=True)]


def _correction(jacobian: Tensor, missing: Tensor, condition_limit: float) -> Tensor:
    """Jᵀ(JJᵀ + λI)⁻¹ r for every sample: `(B, m, n)`, `(B, m)` → `(B, n)`; the small system in float64."""
    gram = torch.einsum("bmn,bkn->bmk", jacobian, jacobian).double()
    size = gram.diagonal(dim1=1, dim2=2).sum(1)
    # where nothing leads to the output the weights must stay finite in the precision of J
    damping = size / condition_limit**2 + torch.finfo(jacobian.dtype).tiny ** 0.5
    system = gram + torch.diag_embed(damping[:, None].expand(-1, gram.shape[1]))
    # damped as it is it has a solution; `solve` would wait for the device to look
    weights = torch.linalg.solve_ex(system, missing.double())[0].to(jacobian.dtype)
    return torch.einsum("bmn,bm->bn", jacobian, weights)


def _tracked(
    graph: fx.GraphModule,
    flow: Flow,
    values: Mapping[fx.Node, Any],
    nodes: Sequence[fx.Node],
    run: Callable[[Evaluator, fx.Node], Any],
) -> tuple[list[Tensor], Tensor]:
    """The forward pass again, differentiable: the values of nodes, and the output, which follows from them; `(B, n)` each."""
    runner = Evaluator(graph, values)
    points = {}
    for node in flow.nodes:
        start = node in flow.sources
        value = values[node].detach().clone().requires_grad_() if start else run(runner, node)
        if node in nodes:
            points[node] = by_sample(node, value)
            value = points[node].reshape(value.shape)
        runner.env[node] = value
    return [points[node] for node in nodes], by_sample(flow.exit, runner.env[flow.exit])


def _output_given(
    graph: fx.GraphModule, flow: Flow, values: Mapping[fx.Node, Any], node: fx.Node, value: Tensor
) -> Tensor:
    return by_sample(flow.exit, output_given(graph, values, node, value.reshape(values[node].shape)))
