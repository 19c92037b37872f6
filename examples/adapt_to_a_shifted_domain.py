"""Adapt a trained network to a domain that it has not seen: digits in haze, from 200 labelled images.

As many images of the old domain are shown too, so that it is not forgotten.

    python examples/adapt_to_a_shifted_domain.py
"""

from __future__ import annotations

import torch
from torch import Tensor

import fxinvert
from fxinvert import models

LABELLED = 200


def hazy(images: Tensor) -> Tensor:
    """The new domain: grey digits before a grey background."""
    return 0.35 + 0.3 * images


def main() -> dict[str, float]:
    """Post-trains on the new domain, and tells the accuracy in both domains, before and after."""
    model = models.load("digits_cnn", "converged")
    data = models.digits()
    images, classes = data.x_train[: 2 * LABELLED], data.y_train[: 2 * LABELLED]
    both = torch.cat([hazy(images[:LABELLED]), images[LABELLED:]])
    domains = {"new": hazy(data.x_test), "old": data.x_test}

    result = fxinvert.post_train(model, models.batches(both, classes, batch_size=100))

    scores = {}
    for name, images in domains.items():
        for state, network in (("before", model), ("after", result.model)):
            scores[f"{name} {state}"] = models.accuracy(network, images, data.y_test)
        print(f"{name} domain: accuracy {scores[f'{name} before']:.1%} → {scores[f'{name} after']:.1%}")
    print(f"from {LABELLED} labelled images of each, in {result.seconds:.1f} s")
    return scores


if __name__ == "__main__":
    main()
