"""A custom op: the inverse of a layer of one's own, checked, then used to post-train and to look inside.

python examples/a_custom_op.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fxinvert
from fxinvert import models
from fxinvert.rules import Op
from fxinvert.testing import check_rule


class SignedSquareRoot(nn.Module):
    """sign(x)·√|x|: compresses large activations."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, …) -> (N, …)."""
        return x.sign() * x.abs().sqrt()


@fxinvert.inverse_rule(SignedSquareRoot)
def invert_signed_square_root(op: Op, target: Tensor) -> Tensor:
    """It is one to one: sign(t)·t²."""
    return target.sign() * target.square()


def main() -> dict[str, float]:
    """Checks the rule, builds a network around the op, and tells its accuracy before and after post-training."""
    torch.manual_seed(0)
    print(check_rule(SignedSquareRoot(), torch.randn(16, 8, dtype=torch.float64)))

    data = models.digits()
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 48), SignedSquareRoot(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 10)
    )
    print(fxinvert.invert(model, data.x_test[:2]))

    result = fxinvert.post_train(model, models.batches(data.x_train, data.y_train))
    before, after = (models.accuracy(m, data.x_test, data.y_test) for m in (model, result.model))
    print(f"test: accuracy {before:.1%} → {after:.1%}, from fresh weights, without back-propagation")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
