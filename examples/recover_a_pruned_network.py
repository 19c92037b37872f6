"""Recover a pruned network: half of the filters and units go, what is left is post-trained and exported.

Whole filters are removed, so that the network really is smaller; weights that are merely set to zero come back unless
`keep_zeros=True` holds them.

    python examples/recover_a_pruned_network.py
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import fxinvert
from fxinvert import models

PIXELS = 16  # of each of conv2's feature maps


def strongest(layer: nn.Conv2d | nn.Linear) -> Tensor:
    """The numbers of the half of a layer's outputs with the largest weights, in order."""
    sizes = torch.linalg.vector_norm(layer.weight.flatten(1), dim=1)
    kept: Tensor = sizes.topk(len(sizes) // 2).indices.sort().values
    return kept


@torch.no_grad()
def pruned(model: models.DigitsCNN) -> models.DigitsCNN:
    """The network without half of conv2's filters and half of fc1's units."""
    small = copy.deepcopy(model)
    filters, units = strongest(model.conv2), strongest(model.fc1)
    inputs = (filters[:, None] * PIXELS + torch.arange(PIXELS)).flatten()  # of fc1: the kept filters' pixels
    small.conv2 = nn.Conv2d(8, len(filters), 3)
    small.fc1 = nn.Linear(len(inputs), len(units))
    small.fc2 = nn.Linear(len(units), 10)
    assert model.conv2.bias is not None
    small.conv2.load_state_dict({"weight": model.conv2.weight[filters], "bias": model.conv2.bias[filters]})
    small.fc1.load_state_dict({"weight": model.fc1.weight[units][:, inputs], "bias": model.fc1.bias[units]})
    small.fc2.load_state_dict({"weight": model.fc2.weight[:, units], "bias": model.fc2.bias})
    return small


def size(model: nn.Module) -> int:
    """How many numbers a network holds."""
    return sum(p.numel() for p in model.parameters())


def main() -> dict[str, float]:
    """Prunes, post-trains, exports; tells sizes and test accuracies."""
    model = models.load("digits_cnn", "converged")
    assert isinstance(model, models.DigitsCNN)
    data = models.digits()
    small = pruned(model)

    result = fxinvert.post_train(small, models.batches(data.x_train, data.y_train))

    networks = {"whole": model, "pruned": small, "recovered": result.model}
    scores = {name: models.accuracy(network, data.x_test, data.y_test) for name, network in networks.items()}
    for name, network in networks.items():
        print(f"{name:9} {size(network):5,} parameters, test accuracy {scores[name]:.1%}")
    with tempfile.TemporaryDirectory() as folder:
        print(fxinvert.export_onnx(result, data.x_test[:2], Path(folder, "small.onnx")))
    return scores


if __name__ == "__main__":
    main()
