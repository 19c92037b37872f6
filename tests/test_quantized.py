"""Networks that are prepared for training with quantization go the whole road, with their observers off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxinvert

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
quantization = pytest.importorskip("torch.ao.quantization")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = quantization.QuantStub(), quantization.DeQuantStub()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.leave(self.last(self.first(self.enter(x)).relu()))
        return found


def prepared(backend: str) -> nn.Module:
    """Weights by row or as a whole; each activation is quantized in one op."""
    model = Net()
    model.qconfig = quantization.get_default_qat_qconfig(backend)
    return quantization.prepare_qat(model.train(), inplace=True)  # type: ignore[no-any-return]


def unfused() -> nn.Module:
    """Only an activation is quantized, and asks its switches in Python."""
    between = quantization.FakeQuantize(quantization.MovingAverageMinMaxObserver, 0, 255, dtype=torch.quint8)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), between, nn.Linear(16, 3))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "weights by row": lambda: prepared("x86"),
    "weights as a whole": lambda: prepared("qnnpack"),
    "an activation": unfused,
}


def problem() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x, teacher = torch.randn(400, 6), torch.randn(3, 6)
    return x, (x @ teacher.T).argmax(1)


def observed(kind: str) -> nn.Module:
    """A model that has seen the data."""
    x, _ = problem()
    model = KINDS[kind]()
    model(x)
    return model.eval()


@pytest.mark.parametrize("method", ["closed_form", "auto"])
@pytest.mark.parametrize("kind", KINDS)
def test_they_are_trained_as_they_compute_and_proven(kind: str, method: str, tmp_path: Path) -> None:
    data = problem()
    model = observed(kind).apply(quantization.disable_observer)
    result = fxinvert.post_train(model, data, method=method, sweeps=1, progress=False)
    before, after = result.baseline.accuracy, result.final.accuracy
    assert before is not None
    assert after is not None
    assert after > before + 0.3
    fxinvert.export_onnx(result.model, data[0][:4], tmp_path / "model.onnx")


@pytest.mark.parametrize("kind", KINDS)
def test_what_observes_is_refused_and_told(kind: str) -> None:
    with pytest.raises(fxinvert.TraceError, match=r"writes to its buffer .*disable_observer"):
        fxinvert.post_train(observed(kind), problem(), progress=False)
