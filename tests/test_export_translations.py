"""Ops that have a translation to ONNX of ours, and views for which torch's does not hold."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxinvert
from fxinvert.export.translations import translations


def grouped_mm() -> Any:
    """The op as transformers defines it, or the same where that is not installed."""
    if find_spec("transformers"):
        __import__("transformers.integrations.moe")
    elif not hasattr(torch.ops.transformers, "grouped_mm_fallback"):

        def each(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
            parts = torch.tensor_split(input, offs.cpu()[:-1])
            return torch.cat([part @ own for part, own in zip(parts, weight, strict=True)])

        def fake(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
            return input.new_empty(input.shape[0], weight.shape[2])

        schema = "(Tensor input, Tensor weight, Tensor offs) -> Tensor"
        torch.library.custom_op("transformers::grouped_mm_fallback", each, mutates_args=(), schema=schema)
        torch.library.register_fake("transformers::grouped_mm_fallback", fake)
    return torch.ops.transformers.grouped_mm_fallback


class Experts(nn.Module):
    """Every row goes through the matrix that a gate chooses; those of one are multiplied together."""

    def __init__(self, multiply: Any) -> None:
        super().__init__()
        self.gate, self.multiply = nn.Linear(6, 3), multiply
        self.weight = nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, x: Tensor) -> Any:
        chosen = self.gate(x).argmax(-1)
        order = torch.argsort(chosen)
        ends = (chosen[:, None] == torch.arange(3)).sum(0).cumsum(0)
        return self.multiply(x[order], self.weight, ends)[torch.argsort(order)]


def test_grouped_products_of_experts_are_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Experts(grouped_mm()).eval()
    assert len(translations()) == 32
    report = fxinvert.export_onnx(model, torch.randn(6, 6), tmp_path / "model.onnx", batch_sizes=(1, 3))
    assert report.max_abs < 1e-4


class Checked(nn.Module):
    """Checks all entries of a tensor as torch has it done in code that is captured."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        torch._check_tensor_all(x < 100)  # type: ignore[no-untyped-call]
        return self.layer(x)


def test_checks_of_all_entries_are_left_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    fxinvert.export_onnx(Checked().eval(), torch.randn(2, 6), tmp_path / "model.onnx", batch_sizes=(1, 3))
    assert {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node} == {"Gemm"}


def test_whether_all_are_true_is_computed(tmp_path: Path) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch._is_all_true(x < 1)

    x = torch.tensor([[0.5], [-2.0]])
    for values in (x, x + 1):
        assert fxinvert.export_onnx(Model(), values, tmp_path / "model.onnx", batch_sizes=(2,)).max_abs == 0


class Windows(nn.Module):
    """Overlapping windows by strides, of sequences that have the samples second in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        chunks = self.layer(x.transpose(0, 1)).transpose(0, 1).view(x.shape[0], 3, 2, 4)
        far, near, step, each = chunks.stride()
        return chunks.as_strided((x.shape[0], 5, 2, 4), (far, near // 2, step, each)).flatten(1)


def test_windows_by_strides_are_exported_however_they_lie_in_memory(tmp_path: Path) -> None:
    """torch's translation reads values in the order of the axes."""
    report = fxinvert.export_onnx(
        Windows(), torch.randn(3, 6, 4), tmp_path / "model.onnx", batch_sizes=(1, 4)
    )
    assert report.max_abs < 1e-5


@pytest.mark.parametrize("number", [1.0, 1])
@pytest.mark.parametrize("alpha", [1, 2])
def test_numbers_less_a_mask_are_exported(number: float, alpha: int, tmp_path: Path) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return x * torch.rsub(mask, number, alpha=alpha)

    inputs = (torch.randn(2, 3), torch.tensor([[1, 1, 0], [1, 0, 0]]))
    assert fxinvert.export_onnx(Model(), inputs, tmp_path / "model.onnx", batch_sizes=(1, 3)).max_abs == 0


@pytest.mark.parametrize("axis", [1, 2])
def test_axes_that_are_squeezed_and_stay_are_exported(axis: int, tmp_path: Path) -> None:
    """torch squeezes an axis of length 1 only; ONNX takes that of any other length for an error."""

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (2 * x).squeeze(axis) + x.squeeze(axis)

    inputs = torch.randn(2, 3, 1)
    report = fxinvert.export_onnx(Model(), inputs, tmp_path / "model.onnx", batch_sizes=(1, 3))
    assert report.max_abs == 0


def test_a_batch_of_one_sample_is_not_squeezed(tmp_path: Path) -> None:
    """What torch takes away of one sample is written into it as into several; ONNX's squeezing leaves no axis to write by."""

    class Shifted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.roll(1, 1).clone()
            y[:, 0] = x.sum(1, keepdim=True).squeeze()
            return y

    report = fxinvert.export_onnx(Shifted(), torch.randn(4, 3), tmp_path / "model.onnx")
    assert report.batch_sizes == (1, 2, 7)


class Rotated(nn.Module):
    """Rotary positions as complex numbers, by the positions of the input, and more that is done with complex values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        places = torch.arange(x.shape[1])[None].expand(x.shape[0], -1)
        angles = places[..., None] * torch.tensor([1.0, 0.1])
        turns = 1.5 * torch.polar(torch.ones_like(angles), angles)
        pairs = torch.view_as_complex(self.layer(x).unflatten(-1, (2, 2, 2)))
        turned = pairs * turns[:, :, None, :]
        first = turned[:, 0].unsqueeze(-2).expand(-1, -1, 3, -1) * 1j
        return torch.view_as_real(turned).flatten(1), torch.view_as_real(torch.exp(first).tanh()).flatten(1)


class Spectral(nn.Module):
    """A Fourier neural operator's layer: the lowest frequencies are mixed by complex weights and written among zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)
        self.weight = nn.Parameter(torch.randn(4, 4, 3, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Any:
        waves = torch.fft.rfft(self.layer(x).mT)
        mixed = torch.zeros(x.shape[0], 4, waves.shape[-1], dtype=torch.cfloat)
        mixed[:, :, :3] = torch.einsum("bik,iok->bok", waves[:, :, :3], self.weight.detach())
        mixed[:, :, 3] = waves[:, :, 1]
        return torch.fft.irfft(mixed, n=x.shape[1]).mT


class Heard(nn.Module):
    """A vocoder's end: frames of waves are padded, and added up where they overlap."""

    def forward(self, x: Tensor) -> Any:
        waves = torch.stft(x.flatten(1), 16, 4, window=torch.hann_window(16), return_complex=True)
        return torch.istft(F.pad(waves, (1, 1)), 16, 4, window=torch.hann_window(16), length=48)


@pytest.mark.parametrize("kind", [Rotated, Spectral, Heard])
def test_ops_on_complex_values_are_exported(kind: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    report = fxinvert.export_onnx(kind().eval(), torch.randn(2, 6, 8), tmp_path / "model.onnx")
    assert report.max_abs < 1e-5


def test_what_a_user_exports_afterwards_is_translated_as_before(tmp_path: Path) -> None:
    from onnxscript.function_libs.torch_lib.registration import default_registry

    fxinvert.export_onnx(nn.Linear(3, 2), torch.randn(2, 3), tmp_path / "ours.onnx")
    ours = [
        f for entry in default_registry.values() for f in entry.complex if f.__module__.startswith("fxinvert")
    ]
    assert ours == []


def test_complex_values_that_are_written_into_others_are_inverted() -> None:
    """torch has no derivative of a complex value that is put back into another."""
    torch.manual_seed(0)
    model, x = Spectral().eval(), torch.randn(3, 6, 8)
    inverse = fxinvert.invert(model, x, output_target="regression")
    rec = inverse(x, model(x + 0.1 * torch.randn_like(x)).detach())
    assert bool((rec.consistency("x") < 0.05).all())


class Ordered(nn.Module):
    """What is found by order, compared, or has no op in ONNX, of values, some of them equal, along several axes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bounds", torch.tensor([-1.0, 0.0, 0.5, 2.0]))

    def forward(self, x: Tensor) -> Any:
        pairs, bounds = x.view(-1, 2, 4), self.get_buffer("bounds")
        where = [
            x.median(1, keepdim=True)[1],
            pairs.kthvalue(3, 2)[1],
            pairs.cummax(2)[1].flatten(1),
            x.round().cummin(1)[1],
            torch.sort(x.round(), dim=1, descending=True, stable=True)[1],
            torch.bucketize(x, bounds),
            torch.searchsorted(bounds, x, right=True),
            torch.searchsorted(x.sort(1)[0], x.round()),
        ]
        values = [
            x.median(1, keepdim=True)[0],
            pairs.kthvalue(2, 1)[0],
            pairs.cummax(1)[0].flatten(1),
            x.cummin(1)[0],
            x.cumprod(1),
            torch.cdist(pairs, pairs + 1, p=1).flatten(1),
            torch.cdist(pairs, pairs + 1, p=3).flatten(1),
            torch.hypot(x, x + 1),
            torch.copysign(x, -x.round()),
            torch.fmax(x, x.round() / x.round()),
            torch.fmin(x.round() / x.round(), x),
        ]
        return torch.cat(where, 1), torch.cat(values, 1)


def test_what_is_found_by_order_is_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8).clamp(-0.9, 0.9) * 2
    report = fxinvert.export_onnx(Ordered().eval(), x, tmp_path / "model.onnx", batch_sizes=(1, 3))
    assert report.max_abs < 1e-5


def test_special_functions_are_exported_where_they_are_infinite_too(tmp_path: Path) -> None:
    class Special(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return torch.stack([x.lgamma(), x.digamma(), x.erfinv(), torch.special.ndtri(x)])[:, 0]

    lines = [torch.linspace(-1.3, 1.3, 53), torch.linspace(-7.1, 50, 53)]
    places = torch.tensor([0.0, 1, -1, -2, 2, 1e-20, 1e-5, 0.999999, 1e5, 1e12, 1e30, torch.inf])
    x = torch.cat([*lines, places])[None]
    path = tmp_path / "model.onnx"
    fxinvert.export_onnx(Special(), x, path, batch_sizes=(1,), atol=1e-6, rtol=2e-6)
    (found,) = onnxruntime.InferenceSession(path).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), Special()(x), rtol=2e-6, atol=1e-6, equal_nan=True)
