"""Export of attention with more and fewer axes than batch, heads, positions and features, and with masks."""

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


@pytest.mark.parametrize("fill", [None, -torch.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("axes", [(), (2,)])
def test_what_attends_to_nothing(fill: float | None, axes: tuple[int, ...], tmp_path: Path) -> None:
    """Padding before a text: in a causal mask its positions see none. With -inf they are 0 in torch, with a number a mean."""

    class Model(Attends):
        def forward(self, x: Tensor, given: Tensor) -> Tensor:  # type: ignore[override]
            positions = x.shape[1] // (2 if self.axes else 1)
            causal = torch.ones(positions, positions, dtype=torch.bool).tril()
            mask = given[:, None, :positions].bool() & causal
            mask = mask[:, None] if self.axes else mask
            self.mask = mask if fill is None else torch.where(mask, 0.0, fill)
            return super().forward(x)

    torch.manual_seed(0)
    model, x = Model(axes, None).eval(), torch.randn(3, 8, 6)
    given = torch.ones(3, 8, dtype=torch.long)
    given[-1, :2] = 0
    report = export_onnx(model, (x, given), tmp_path / "m.onnx", batch_sizes=(1, 3))
    assert report.max_abs < 1e-5
