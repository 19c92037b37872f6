"""Which reconstruction is taken where the user does not say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxinvert
from fxinvert.inversion.choice import LARGEST, reconstruction_for


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(x + self.layer(x).tanh())
        return y


def convolutions(width: int, taps: int) -> nn.Module:
    """On maps of 16 × 16: `width` · 256 numbers between two kernels."""
    between = nn.Conv2d(width, width, taps, padding=taps // 2)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), between, nn.Flatten(), nn.LazyLinear(3)
    )


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)), (6,), "nodewise"),
        (Residual(), (6,), "linearized"),
        (convolutions(LARGEST // 256, 3), (1, 16, 16), "nodewise"),
        (convolutions(LARGEST // 256 + 1, 3), (1, 16, 16), "linearized"),
        (convolutions(LARGEST // 256 + 1, 1), (1, 16, 16), "nodewise"),  # every pixel is a system of its own
        (nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)), (LARGEST, 4), "nodewise"),  # every row
    ],
    ids=["chain", "branch", "small maps", "large maps", "pointwise", "rows"],
)
def test_chains_of_small_ops_are_inverted_node_by_node(
    model: nn.Module, shape: tuple[int, ...], expected: str
) -> None:
    x = torch.randn(3, *shape)
    model(x)
    assert reconstruction_for(fxinvert.trace(model, x)) == expected


def test_a_large_chain_is_trained_and_explained_as_when_linearized() -> None:
    torch.manual_seed(0)
    model, x, labels = convolutions(LARGEST // 256 + 1, 3), torch.randn(40, 1, 16, 16), torch.arange(40) % 3
    model(x)
    own, asked = (
        fxinvert.post_train(model, [(x, labels)], sweeps=1, only="0", progress=False, reconstruction=how)
        for how in ("auto", "linearized")
    )
    for name, value in own.model.state_dict().items():
        assert torch.equal(value, asked.model.state_dict()[name])
    default, linearized = (
        fxinvert.explain(model, x[:2], labels[:2], reconstruction=how) for how in ("auto", "linearized")
    )
    assert torch.equal(default.cuts[0].target, linearized.cuts[0].target)
