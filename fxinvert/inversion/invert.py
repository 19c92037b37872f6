"""From a model to its inverse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from torch import fx, nn

from fxinvert.errors import DataError
from fxinvert.inversion.inverse_graph import InverseGraph, Reconstructed
from fxinvert.linalg import SolveSettings
from fxinvert.linalg.anchored import Method
from fxinvert.modes import as_usual
from fxinvert.output_target import OutputTargetFunction
from fxinvert.output_target import output_target as named
from fxinvert.passes import trace
from fxinvert.passes.trace import is_normalized
from fxinvert.rules import RuleSet
from fxinvert.rules.registry import in_force
from fxinvert.settings import check_choice, check_counts, check_numbers

#: right-hand sides that solvers are chosen for: some batches, and not the data of a training, for which the default is
EXPECTED = 1_000


@as_usual()
def invert(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    output_target: str | OutputTargetFunction = "nearest",
    rules: RuleSet | None = None,
    condition_limit: float | None = None,
    refine: int = 0,
    reconstruction: Reconstructed = "nodewise",
    memory_limit: int | None = None,
    solvers: Mapping[str, Method] | None = None,
    compiled: bool = False,
) -> InverseGraph:
    """Synthesizes the inverse of a model.

    Args:
        model: a graph from `fxinvert.trace`, or any module together with `example_inputs`.
        example_inputs: a tensor, or the tuple of the model's inputs.
        output_target: what the output should have been, by name (`"nearest"`, `"margin"`, `"cross_entropy"`,
            `"max_assign"`, `"one_hot"`, `"regression"`, `"soft"`) or a callable of outputs and labels.
        rules: the rules in force, by default `default_rules()`.
        condition_limit: κ; corrections amplified more than that are damped. By default 1e3, in float64 1e6.
        refine: the largest number of Gauss–Newton steps that follow on every target, until the model, run forward
            from it, comes within 1e-3 of what is right: the output target, or, for `"nearest"` and `"margin"`, any output in
            which the label leads by as much as that asks for and the model can give (see `fxinvert.inversion.refinement`).
            Certificates then tell how near it comes, and why not nearer.
        reconstruction: how targets are found: `"nodewise"`, op by op through the inverse graph, or `"linearized"`, all
            at once from the derivative of the output (see `fxinvert.inversion.linearized`): much faster where graphs
            branch, and right to first order.
        memory_limit: bytes that a factorization, or the work on a batch, may take; by default a quarter of what is free.
            Solvers are chosen among those that fit: for the same bits every time, set it.
        solvers: of single ops, by the path of their nodes, where they are not to be chosen: `"spectral"`, `"qr"`, `"cholesky"`,
            `"banded"`, `"capacitance"`, `"circulant"`, `"iterative"` or `"diagonal"` (see `InverseGraph.explain` for what they cost).
        compiled: whether elementwise rules, and norms with scales of one size, are compiled by torch's compiler, which takes
            seconds for every kind of them when it is first used (norms twenty), and a C++ compiler (on CUDA, Triton);
            without one that use raises `SolveError`.

    Raises:
        TraceError: the model cannot be captured.
        NoRuleError: an op on the way has no rule.
        DataError: there is no such output target, condition number, solver or node, or no example inputs for a model that is not traced
            yet.
    """
    rules = in_force(rules)
    source = model if example_inputs is not None else None
    if example_inputs is not None:
        model = trace(model, example_inputs, rules=rules)
    if not isinstance(model, fx.GraphModule) or not is_normalized(model):
        raise DataError("invert() needs example_inputs, or a graph from fxinvert.trace")
    check_counts(least=0, refine=refine)
    check_counts(memory_limit=memory_limit)
    check_numbers(
        "a condition number, which is at least 1,", lambda k: k >= 1, condition_limit=condition_limit
    )
    check_choice("reconstruction", reconstruction, get_args(Reconstructed))
    check_solvers(model, solvers or {})
    settings = SolveSettings(
        condition_limit=condition_limit,
        memory_limit=memory_limit,
        methods=dict(solvers or {}),
        compiled=compiled,
        expected=EXPECTED,
    )
    found = InverseGraph(model, named(output_target), rules, settings, refine, reconstruction, source)
    _ = found.synthesis.inverse  # what has no rule is told now
    return found


def check_solvers(graph: fx.GraphModule, solvers: Mapping[str, Method]) -> None:
    """Raises DataError unless there are such nodes and solvers."""
    if not isinstance(solvers, Mapping):
        raise DataError(f"solvers={solvers!r}; a mapping of nodes to solvers is needed")
    paths = [n.meta["path"] for n in graph.graph.nodes if n.op != "output"]
    for path, method in solvers.items():
        if path not in paths or method not in get_args(Method):
            raise DataError(
                f"solvers={{{path!r}: {method!r}}}: the solvers are {', '.join(get_args(Method))}, and the nodes "
                f"{', '.join(paths)}"
            )
