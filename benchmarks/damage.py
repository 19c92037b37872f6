"""Which layer is damaged: noise on the weights of one, and whether repairing each segment alone finds it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

import fxinvert
from benchmarks.measure import Ratio
from fxinvert import models

#: the damaged layers
LAYERS = {
    "digits_mlp": ("fc1", "fc2", "fc3"),
    "digits_cnn": ("conv1", "conv2", "fc1", "fc2"),
    "digits_mixer": (
        "patches",
        *(f"blocks.{i}.{kind}_mlp.2" for i in range(2) for kind in ("token", "channel")),
    ),
    "digits_resnet": ("layer1.0.conv1", "layer1.1.conv2", "layer2.0.downsample.0", "head"),
}
#: samples to train on and to judge on, and the share of the latter that is right after the damage
TRAIN, HELD_OUT, RIGHT = 600, 400, 0.6


def damaged(name: str, layer: str) -> nn.Module:
    """A converged network, the noise on one layer's weights as large as it takes."""
    model, digits = models.load(name), models.digits()
    weight = dict(model.named_parameters())[f"{layer}.weight"]
    x, y = digits.x_train[TRAIN : TRAIN + HELD_OUT], digits.y_train[TRAIN : TRAIN + HELD_OUT]
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(layer))) * weight.std()
    whole, low, high = weight.detach().clone(), 0.0, 20.0
    with torch.no_grad():
        for _ in range(25):
            size = (low + high) / 2
            weight.copy_(whole + size * noise)
            right = float((model(x).argmax(1) == y).float().mean())
            low, high = (size, high) if right > RIGHT else (low, size)
    return model


def run() -> Iterator[Ratio]:
    """Held-out loss with the damaged segment repaired, over the least with another one; below 1 it is found."""
    digits = models.digits()
    train = models.batches(digits.x_train[:TRAIN], digits.y_train[:TRAIN], 100)
    held = slice(TRAIN, TRAIN + HELD_OUT)
    judge = models.batches(digits.x_train[held], digits.y_train[held])
    for name, layers in LAYERS.items():
        for layer in layers:
            model = damaged(name, layer)
            plan = fxinvert.partition(fxinvert.trace(model, digits.x_train[:2]))
            (own,) = (segment.name for segment in plan.segments if layer in segment.trained)
            found = fxinvert.repair_alone(model, train, plan=plan, validation_data=judge)
            losses = {segment: metrics.loss for segment, metrics in found.repaired.items()}
            least = min(loss for segment, loss in losses.items() if segment != own)
            place = 1 + list(found.gained).index(own)
            yield Ratio(
                f"{name}, {layer} damaged: repair {own}",
                "repair another segment",
                losses[own] / least,
                1.0,
                f"held-out loss {found.baseline.loss:.3f} → {losses[own]:.3f}; place {place} of {len(losses)}",
            )
