"""Export of attention with more and fewer axes than batch, heads, positions and features."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxinvert
from fxinvert.export import export_onnx


class Attends(nn.Module):
    """Attention with these axes between those of samples and positions, and a mask with these."""

    mask: Tensor | None

    def __init__(self, axes: tuple[int, ...], mask: tuple[int, ...] | None, causal: bool = False) -> None:
        super().__init__()
        self.axes, self.causal = axes, causal
        self.parts = nn.Linear(6, 12)
        self.register_buffer("mask", None if mask is None else torch.rand(mask) > 0.3)
        if self.mask is not None:
            self.mask[..., 0] = True

    def forward(self, x: Tensor) -> Tensor:
        parts: Tensor = self.parts(x).unflatten(1, (*self.axes, -1))
        q, k, v = parts.chunk(3, -1)
        return F.scaled_dot_product_attention(
            q, k[..., :1, :, :] if self.axes else k, v, self.mask, is_causal=self.causal
        )


@pytest.mark.parametrize(
    ("axes", "mask"),
    [((), None), ((), (3, 3)), ((2, 3), None), ((2, 3), (2, 1, 3, 3)), ((2, 2, 3), (3, 3)), ((2, 3), (1, 1, 3, 3, 3))],
)  # fmt: skip
def test_axes_before_the_heads(axes: tuple[int, ...], mask: tuple[int, ...] | None, tmp_path: Path) -> None:
    """Windows and samples, as in hierarchical transformers: any number of axes, over which a mask may be repeated."""
    torch.manual_seed(0)
    positions = 3
    for number in axes:
        positions *= number
    model = Attends(axes, mask).eval()
    example = torch.randn(2, positions, 6)
    export_onnx(model, example, tmp_path / "m.onnx", batch_sizes=(1, 2, 5))


def test_attention_of_a_captured_model(tmp_path: Path) -> None:
    example = torch.randn(2, 12, 6)
    graph = fxinvert.trace(Attends((2, 2), None, causal=True), example)
    export_onnx(graph, example, tmp_path / "m.onnx", batch_sizes=(1, 2, 5))
