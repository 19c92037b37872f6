"""Add a class that was missing: a network that was trained on the digits 0 to 8 learns the 9.

python examples/add_a_missing_class.py
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

import fxinvert
from fxinvert import models

NEW = 9
STEPS = 400


def trained_without_it(data: models.ImageData) -> nn.Module:
    """A network for the nine other digits, trained by back-propagation: what one would have at hand."""
    torch.manual_seed(0)
    model = models.digits_cnn()
    model.fc2 = nn.Linear(32, NEW)
    known = data.y_train < NEW
    x, y = data.x_train[known], data.y_train[known]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        rows = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.eval()


@torch.no_grad()
def widened(model: nn.Module) -> nn.Module:
    """The same network with one more answer, which it never gives yet."""
    wider = copy.deepcopy(model)
    old: nn.Linear = wider.fc2  # type: ignore[assignment]
    wider.fc2 = nn.Linear(old.in_features, NEW + 1)
    wider.fc2.weight.zero_()
    wider.fc2.bias.zero_()
    wider.fc2.weight[:NEW], wider.fc2.bias[:NEW] = old.weight, old.bias
    return wider


def main() -> dict[str, float]:
    """Post-trains the widened network, and tells the accuracy on the new class and on the others."""
    data = models.digits()
    model = widened(trained_without_it(data))

    result = fxinvert.post_train(model, models.batches(data.x_train, data.y_train))

    is_new = data.y_test == NEW
    scores = {}
    for name, rows in ((f"the new {NEW}", is_new), ("the others", ~is_new)):
        for state, network in (("before", model), ("after", result.model)):
            scores[f"{name} {state}"] = models.accuracy(network, data.x_test[rows], data.y_test[rows])
        print(f"{name}: accuracy {scores[f'{name} before']:.1%} → {scores[f'{name} after']:.1%}")
    print(f"in {result.seconds:.1f} s")
    return scores


if __name__ == "__main__":
    main()
