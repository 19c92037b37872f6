"""Partition: split a graph into segments that can be trained apart.

A segment lies between two cuts. A cut is a single value that every path from input to output passes: a dominator of
the output (see `flow`), so that a segment has one input and one target. Segments own their parameters: ops that share
one are never separated.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from numbers import Integral

from torch import fx

from fxinvert.errors import CutError, NoRuleError
from fxinvert.passes.activity import followed, follows
from fxinvert.passes.capture import attribute, describe
from fxinvert.passes.computed import weights_of
from fxinvert.passes.flow import Flow
from fxinvert.passes.owned import followed_in, trained_in
from fxinvert.passes.plan import Plan, Segment, Shape
from fxinvert.passes.trace import is_normalized
from fxinvert.rules import RuleSet
from fxinvert.rules.registry import in_force
from fxinvert.settings import names_of


def partition(
    graph: fx.GraphModule,
    segments: int | None = None,
    *,
    cuts: Sequence[str] | None = None,
    rules: RuleSet | None = None,
) -> Plan:
    """Splits a normalized graph into segments.

    Args:
        graph: from `fxinvert.trace`.
        segments: how many, balanced by cost; by default as many as possible, one per trained op on a chain.
        cuts: where instead: names of modules or nodes; the cut is made after each of them.
        rules: the rules in force, which tell what can be trained.

    Raises:
        CutError: a name matches nothing, a value is no cut, there are not so many segments, both ways are asked for, or
            the graph is not from `fxinvert.trace`.
    """
    if not is_normalized(graph):
        raise CutError(f"{type(graph).__name__} is not traced; partition() needs a graph from fxinvert.trace")
    if not isinstance(segments, Integral | None):
        raise CutError(f"segments={segments!r} is {type(segments).__name__}; a whole number is needed")
    if segments is not None and cuts is not None:
        raise CutError("give the number of segments or the cuts, not both")
    rules = in_force(rules)
    flow = _flow(graph)
    trained = trained_in(flow, rules)
    owned = trained | followed_in(flow, rules, trained)
    if cuts is not None:
        chosen = _named_cuts(flow, names_of("cuts", cuts), rules)
        _check_ties(_pieces(flow, chosen), owned)
    else:
        chosen = _merged(_units(flow, owned), segments)
    return Plan(tuple(_segment(piece, entry, trained, owned) for entry, piece in _pieces(flow, chosen)))


def _flow(graph: fx.GraphModule) -> Flow:
    try:
        return Flow(graph)
    except NoRuleError as error:
        raise CutError(f"{error}; there is nothing to partition") from error


def _units(flow: Flow, owned: dict[fx.Node, tuple[str, ...]]) -> list[tuple[fx.Node, int]]:
    """The smallest segments: (exit, cost) of each; every one trains something and shares no parameter with another."""
    units: list[tuple[fx.Node, int]] = []
    owners: dict[str, int] = {}
    for _, piece in _pieces(flow, [node for node in flow.line[:-1] if node not in flow.sources]):
        names = [name for node in piece for name in owned.get(node, ())]
        cost = sum(map(_cost, piece))
        joined = min([owners[name] for name in names if name in owners], default=len(units))
        if not names and units:  # ops without parameters go with the op before them
            joined = len(units) - 1
        elif names and len(units) == 1 and not owners:  # …and those before the first trained op with that op
            joined = 0
        cost += sum(c for _, c in units[joined:])
        units[joined:] = [(piece[-1], cost)]
        owners = {name: min(owner, joined) for name, owner in owners.items()} | dict.fromkeys(names, joined)
    return units


def _merged(units: list[tuple[fx.Node, int]], segments: int | None) -> list[fx.Node]:
    """Where to cut so that the dearest of `segments` runs of units is as cheap as possible (dynamic programming)."""
    n = len(units)
    count = n if segments is None else segments
    if not 1 <= count <= n:
        raise CutError(
            f"this graph has {n} segment{'s' * (n != 1)} at most; {count} were asked for"
            + (", and 1 is the least" if count < 1 else "")
        )
    total = [0]
    for _, cost in units:
        total.append(total[-1] + cost)
    best = [[(math.inf, 0)] * (n + 1) for _ in range(count + 1)]
    best[0][0] = (0, 0)
    for k in range(1, count + 1):
        for end in range(k, n + 1):
            best[k][end] = min(
                (max(best[k - 1][start][0], total[end] - total[start]), start) for start in range(k - 1, end)
            )
    ends, end = [], n
    for k in range(count, 0, -1):
        ends.append(end)
        end = best[k][end][1]
    return [units[end - 1][0] for end in reversed(ends)][:-1]


def _named_cuts(flow: Flow, cuts: Sequence[str], rules: RuleSet) -> list[fx.Node]:
    active, line = flow.nodes, flow.line
    position = {node: i for i, node in enumerate(line)}
    chosen: list[fx.Node] = []
    for name in cuts:
        inside = [n for n in active if _is_named(n, name)]
        ops = [n for n in flow.exit.graph.nodes if n.op not in ("get_attr", "output")]
        without = [n for n in ops if _is_named(n, name)]
        if not inside and without:
            raise CutError(f"{name!r} is not a cut: {_no_target(without[-1], rules)}")
        if not inside:
            known = dict.fromkeys(part for n in active for part in _prefixes(n.meta["path"]))
            close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            raise CutError(
                f"no module or node {name!r} to cut at; did you mean {', '.join(close or list(known)[:5])}?"
            )
        node = inside[-1]
        if node not in position:
            raise CutError(
                f"{node.meta['path']!r} is not a cut: {_why_not(flow, node)}; {_nearest(flow, node)}"
            )
        if node is line[-1]:
            raise CutError(f"{name!r} is the model's output; a cut there leaves an empty segment")
        if node not in chosen:
            chosen.append(node)
    return sorted(chosen, key=position.__getitem__)


def _is_named(node: fx.Node, name: str) -> bool:
    """Whether a node, or the module that it belongs to, has this name."""
    return name in (node.name, node.meta["path"]) or node.meta["path"].startswith(f"{name}.")


def _no_target(node: fx.Node, rules: RuleSet) -> str:
    """Why a value on no path of real numbers to the output has no target: the op that ends its path."""
    reached = {node}
    for following in node.graph.nodes:
        if following.op == "output" or reached.isdisjoint(following.all_input_nodes):
            continue
        if not follows(following.meta.get("op", ""), rules):
            return f"no target comes back through {describe(following)}, which cannot be differentiated; cut after it"
        reached.add(following)
    return "the output does not depend on it through real numbers, so that it has no target"


def _why_not(flow: Flow, cut: fx.Node) -> str:
    """What keeps a value from being a cut: an edge by which a path from the input to the output leads past it."""
    order = {node: i for i, node in enumerate(flow.nodes)}
    reached = set(flow.sources) - {cut}
    for node in flow.nodes:
        if node is not cut and not reached.isdisjoint(followed(node)):
            reached.add(node)
    edges = ((n, node) for node in flow.nodes for n in followed(node) if {n, node} <= reached)
    for before, after in edges:
        if order[before] < order[cut] < order[after]:
            return f"the edge {before.meta['path']!r} → {after.meta['path']!r} leads past it"
    return "its value is not one real tensor with the samples first, and has no target"


def _nearest(flow: Flow, node: fx.Node) -> str:
    """The last cut before a value and the first after it, in words."""
    order = {n: i for i, n in enumerate(flow.nodes)}
    cuts = [n for n in flow.line[:-1] if n.op != "placeholder"]
    before = [f"{n.meta['path']!r} before it" for n in cuts if order[n] < order[node]][-1:]
    after = [f"{n.meta['path']!r} after it" for n in cuts if order[n] > order[node]][:1]
    return f"the nearest cut is {' or '.join(before + after)}" if before + after else "this model has none"


def _check_ties(pieces: list[tuple[str, list[fx.Node]]], trained: dict[fx.Node, tuple[str, ...]]) -> None:
    owners: dict[str, fx.Node] = {}
    for _, piece in pieces:
        for name in dict.fromkeys(name for node in piece for name in trained.get(node, ())):
            if name in owners:
                raise CutError(
                    f"parameter {name!r} is used on both sides of a cut, up to {owners[name].meta['path']!r} and up to "
                    f"{piece[-1].meta['path']!r}; segments own their parameters: remove the cuts between the two"
                )
            owners[name] = piece[-1]


def _pieces(flow: Flow, cuts: Sequence[fx.Node]) -> list[tuple[str, list[fx.Node]]]:
    """(entry, ops) between consecutive cuts. Ops in graph order; a dominator separates what is before from after."""
    exits = [*cuts, flow.exit]
    pieces: list[tuple[str, list[fx.Node]]] = []
    entry, piece = ", ".join(node.meta["path"] for node in flow.sources), []
    for node in flow.nodes:
        if node in flow.sources:
            continue
        piece.append(node)
        if node is exits[len(pieces)]:
            pieces.append((entry, piece))
            entry, piece = node.meta["path"], []
    return pieces


def _segment(
    piece: list[fx.Node],
    entry: str,
    trained: dict[fx.Node, tuple[str, ...]],
    owned: dict[fx.Node, tuple[str, ...]],
) -> Segment:
    sources = dict.fromkeys(n for node in piece for n in followed(node) if not followed(n))
    ops = [node for node in (*sources, *piece) if node in owned]
    parameters = dict.fromkeys(name for node in ops for name in owned[node])
    owner = piece[0].graph.owning_module
    assert owner is not None, "a graph outside of its module"
    return Segment(
        name=(ops or piece[-1:])[0].meta["path"],
        entry=entry,
        exit=piece[-1].meta["path"],
        nodes=tuple(node.meta["path"] for node in piece),
        trained=tuple(node.meta["path"] for node in ops if node in trained),
        parameters=tuple(parameters),
        parameter_count=sum(attribute(owner, name).numel() for name in parameters),
        in_shape=_shape(next(n for n in piece[0].all_input_nodes if n.meta["active"]))[1:],
        out_shape=_shape(piece[-1])[1:],
        cost=sum(map(_cost, piece)),
        ops=tuple(str(node.meta.get("op", node.op)) for node in piece),
    )


def _cost(node: fx.Node) -> int:
    """Multiply-adds per sample: every output entry costs the weights of one output channel, or one operation."""
    outputs = math.prod(_shape(node)[1:])
    weights = [n for n in weights_of(node).values() if len(_shape(n)) > 1]
    return outputs * max([math.prod(_shape(w)[1:]) for w in weights], default=1)


def _shape(node: fx.Node) -> Shape:
    meta = node.meta["tensor_meta"]
    # an op that gives several tensors stands by its first
    first = meta if hasattr(meta, "shape") else meta[0]
    return tuple(first.shape)


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
