"""Trustworthy targets: pushed forward, does a reconstructed feature give the label, and how far is it from the anchor?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

import fxinvert
from benchmarks.studies import targets_page
from benchmarks.studies.data import NORMALIZE, pools
from benchmarks.studies.frame import Run, Study
from benchmarks.studies.starts import CONVERGED, FRESH, start
from fxinvert import models
from fxinvert.inversion import output_given
from fxinvert.models.samples import Samples
from fxinvert.models.train import reproducible
from fxinvert.models.zoo import NETWORKS
from fxinvert.passes.flow import Flow
from fxinvert.rules.certificate import relative

SAMPLES = 64
#: Gauss–Newton steps that refine a target
REFINE = 20
#: of an output that is no class: relative distance to the output target
TOLERANCE = 1e-2
#: whose targets of the input are shown, and how many
SHOWN, SHOWN_SAMPLES = ("digits_cnn", "mnist_cnn"), 4

OTHERS = ("mnist_cnn", "cifar_cnn", "resnet20")
QUICK = ("digits_cnn", "digits_mlp")


def runs(seeds: int) -> Iterator[Run]:
    """Every network as trained, and the chains with random weights, too; plain targets and refined ones."""
    for seed in range(seeds):
        for network in (*NETWORKS, *OTHERS):
            for state in (
                ("converged", "random") if network in ("digits_cnn", *OTHERS[:2]) else ("converged",)
            ):
                for refine in (0, REFINE):
                    settings = {"network": network, "state": state, "refine": refine, "samples": SAMPLES}
                    yield Run(f"{network}-{state}-{refine}", settings, seed, network in QUICK)


def measure(run: Run) -> dict[str, Any]:
    """For every cut, in order: hits of all samples, and the mean relative distance from the anchor."""
    given = run.settings
    model, samples = subject(given["network"], given["state"], given["samples"], run.seed)
    output, labels = next(iter(samples.labels.items()))
    example = tuple(values[:2] for values in samples.inputs)
    graph = fxinvert.trace(model, example, output=output if len(samples.labels) > 1 else None)
    inverse = fxinvert.invert(
        graph,
        output_target="regression" if labels.is_floating_point() else "margin",
        refine=given["refine"],
        reconstruction="linearized" if Flow(graph).branches else "nodewise",
    )
    exits = {segment.exit for segment in fxinvert.partition(graph).segments}
    inputs = next(iter(graph.graph.nodes))
    nodes = [n for n in graph.graph.nodes if exits & {n.name, n.meta.get("path")} and n.op != "output"]
    shown = given["network"] in SHOWN and given["refine"] > 0
    with torch.no_grad():
        values = inverse.forward(samples.inputs if len(samples.inputs) > 1 else samples.inputs[0])
        goal = inverse.output_target(values[inverse.output_node], labels)
        found = inverse.targets(values, labels, [inputs, *nodes] if shown else nodes)

        def row(node: fx.Node) -> dict[str, Any]:
            hits = right(output_given(graph, values, node, found[node]), goal, labels)
            moved = relative(found[node] - values[node], values[node])
            return {"cut": node.meta["path"], "hits": int(hits.sum()), "moved": float(moved.mean())}

        rows = [row(node) for node in nodes if node is not inverse.output_node]
        before = int(right(values[inverse.output_node], goal, labels).sum())
        images = _images(values[inputs], found[inputs], labels) if shown else []
    return {"cuts": rows, "samples": len(labels), "right_before": before, "images": images}


def right(outputs: Tensor, goal: Tensor, labels: Tensor) -> Tensor:
    """For each sample, whether the output says what it should: the label is on top, or the number is reached; `(B,)`."""
    if labels.is_floating_point():
        return relative(outputs - goal, goal) <= TOLERANCE
    return (outputs.argmax(1 if outputs.dim() != 3 else 2) == labels).reshape(len(labels), -1).all(1)


def subject(network: str, state: str, count: int, seed: int) -> tuple[nn.Module, Samples]:
    """A network, and test samples drawn by the seed."""
    known = network in NETWORKS
    test = models.data_of(network).test if known else NORMALIZE[network](pools(network).test)
    drawn = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))[:count]
    if state == "random":
        with reproducible(seed):
            model = FRESH[network]().eval()
    else:
        model = models.load(network) if known else start(CONVERGED[network])
    return model, test.select(drawn)


def _images(anchors: Tensor, targets: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """The samples whose inputs move most: as they are, and as they should have been."""
    most = relative(targets - anchors, anchors).topk(min(SHOWN_SAMPLES, len(labels))).indices
    return [
        {"label": int(labels[i]), "anchor": anchors[i, 0].tolist(), "target": targets[i, 0].tolist()}
        for i in most
    ]


STUDY = Study("targets", 1, runs, measure, targets_page.section, targets_page.pictures)
