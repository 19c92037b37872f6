"""The graph, forward and inverse, and how every node's target was found."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxinvert.errors import FxInvertError
from fxinvert.inversion import InverseGraph, Reconstruction, invert
from fxinvert.inversion.choice import reconstruction_for
from fxinvert.output_target import OutputTargetFunction
from fxinvert.passes.flow import Flow, Stretch
from fxinvert.passes.inverse_op import InverseOp
from fxinvert.passes.synthesize import TARGET_OF
from fxinvert.rules.certificate import relative
from fxinvert.rules.families import summary
from fxinvert.training.batch import Batch

#: samples that nodes are certified on, and fewer where targets are linearized
SAMPLES, LINEARIZED_SAMPLES = 32, 8
#: Gauss–Newton steps where targets are linearized
REFINE = 5
#: numbers in the output, per sample, up to which targets are linearized for a report
OUTPUTS = 256
#: of a node that has no certificate
NONE = "no target"


def graph_facts(
    graph: fx.GraphModule, batch: Batch, output_target: str | OutputTargetFunction
) -> dict[str, Any]:
    """Nodes with their certificates, and edges forward and inverse, JSON-ready.

    Args:
        graph: the traced model.
        batch: samples to certify on.
        output_target: what outputs should have been.

    A graph that cannot be inverted is told about under `problem`; its nodes have no certificates then.
    """
    shown = [n for n in graph.graph.nodes if n.op != "output" and n.meta.get("active")]
    index = {node: i for i, node in enumerate(shown)}
    problem, inverse, rec = "", None, None
    stretches: dict[fx.Node, Stretch] = {}
    linearized = False
    try:
        flow = Flow(graph)
        stretches = {stretch.entry: stretch for stretch in flow.stretches}
        how = reconstruction_for(graph)
        linearized = how == "linearized"
        inverse = invert(
            graph, output_target=output_target, reconstruction=how, refine=REFINE if linearized else 0
        )
        if linearized and flow.size > OUTPUTS:
            problem = f"targets were not found: they are linearized, and the output has {flow.size} numbers per sample"
        else:
            rec = inverse(*batch.map(lambda value: value[: LINEARIZED_SAMPLES if linearized else SAMPLES]))
    except FxInvertError as error:
        problem = str(error)
    rules = _rules(inverse) if inverse else {}
    return {
        "how": "linearized, refined" if linearized else "node by node",
        "samples": len(rec.output_target) if rec else 0,
        "problem": problem,
        "nodes": [_node(node, stretches.get(node), rules, rec) for node in shown],
        "forward": [[index[n], index[node]] for node in shown for n in node.all_input_nodes if n in index],
        "inverse": [[index[s.exit], index[s.entry]] for s in stretches.values()],
    }


def _rules(inverse: InverseGraph) -> dict[str, InverseOp]:
    """What inverts for each node, by the name of the node that gets its target."""
    module = inverse.graph_module
    found = {}
    for call in module.graph.find_nodes(op="call_module"):
        op = module.get_submodule(str(call.target))
        assert isinstance(op, InverseOp)
        found[call.meta[TARGET_OF]] = op
    return found


def _node(
    node: fx.Node, stretch: Stretch | None, rules: dict[str, InverseOp], rec: Reconstruction | None
) -> dict[str, Any]:
    path = str(node.meta["path"])
    meta = node.meta.get("tensor_meta")
    facts: dict[str, Any] = {
        "name": path,
        "op": "input" if node.op == "placeholder" else str(node.meta["op"]),
        "shape": [int(size) for size in getattr(meta, "shape", ())[1:]],
        "rule": "",
        "method": "",
        "why": _why(node, stretch),
        "status": NONE,
    }
    if node.name in rules:
        rule = rules[node.name].rule
        facts["rule"] = f"{rule.key}: {rule.kind.value}"
        facts["method"] = summary(rule)
    if rec is None or path not in rec.targets:
        return facts
    certificate = rec.certificates[path].measured()
    moved = relative(rec.targets[path] - rec.anchors[path], rec.anchors[path])
    return (
        facts | certificate.to_dict() | {"moved": float(moved.mean()), "sentence": certificate.status.value}
    )


def _why(node: fx.Node, stretch: Stretch | None) -> str:
    """Where the target comes from."""
    if stretch is None:
        return "the output: its target is the output target" if node.users else "its value leads nowhere"
    where = stretch.exit.meta["path"]
    if stretch.is_region:
        return f"paths part here and meet at {where}: the region is inverted as a whole"
    if stretch.copies:
        return f"from the target of {where}, which convolves what is made of copies of it: the two are one linear system"
    return f"from the target of {where}, which follows; what else that takes is held"
