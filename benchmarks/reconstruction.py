"""One reconstruction of every node, against one forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

import fxinvert
from benchmarks.measure import Ratio, ratio
from benchmarks.studies.networks import cifar_cnn
from fxinvert import models
from fxinvert.inversion.replay import output_given


def trained(steps: int = 150) -> nn.Module:
    """The same network, trained to tell ten noisy patterns apart."""
    model, patterns = cifar_cnn(), torch.rand(10, 3, 32, 32)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(steps):
        labels = torch.randint(0, 10, (64,))
        optimizer.zero_grad()
        images = patterns[labels] + 0.5 * torch.randn(64, 3, 32, 32)
        torch.autograd.backward(nn.functional.cross_entropy(model(images), labels))
        optimizer.step()
    return model


def worst_share(inverse: fxinvert.InverseGraph, x: Tensor, y: Tensor) -> float:
    """The share of samples whose label is on top when the model is run from the targets at the worst cut."""
    values, rec = inverse.forward(x), inverse(x, y)
    nodes = {n.meta["path"]: n for n in inverse.graph.graph.nodes if "path" in n.meta}
    with torch.no_grad():
        outputs = [output_given(inverse.graph, values, nodes[name], rec.targets[name]) for name in rec.names]
    return min(float((output.argmax(1) == y).float().mean()) for output in outputs)


def run(batch: int = 256) -> Iterator[Ratio]:
    """Reconstruction over forward, factorizations kept."""
    torch.manual_seed(0)
    for name, model, shape in (
        ("digits_cnn", models.load("digits_cnn", "early"), (1, 8, 8)),
        ("digits_mlp", models.load("digits_mlp", "early"), (1, 8, 8)),
        ("cifar_cnn", cifar_cnn(), (3, 32, 32)),
        ("cifar_cnn, trained", trained(), (3, 32, 32)),
    ):
        x, y = torch.rand(batch, *shape), torch.randint(0, 10, (batch,))
        inverse = fxinvert.invert(model, x[:2], output_target="margin")
        plain, refined = (
            100 * worst_share(fxinvert.invert(model, x[:2], output_target="margin", refine=n), x, y)
            for n in (0, 8)
        )
        note = f"label on top at the worst cut: {plain:.0f} % of samples, {refined:.0f} % with refine=8"
        with torch.no_grad():
            yield ratio(
                f"{name}: reconstruct",
                partial(inverse, x, y),
                "forward",
                partial(model, x),
                aim=12.0 if name.startswith("cifar_cnn") else None,
                note=note,
            )
