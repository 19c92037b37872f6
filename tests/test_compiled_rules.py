"""Rules, compiled: the same answers from fewer passes over memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_elementwise_rules import prelu
from torch import Tensor, nn

import fxinvert
from fxinvert.errors import SolveError
from fxinvert.inversion.inverse_graph import InverseGraph
from fxinvert.rules import Status, kernels

COMPILER = shutil.which(os.environ.get("CXX", "g++"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler: neither CXX nor g++"),
]

#: one of every kind of choice among branches
MODULES: dict[str, Callable[[], nn.Module]] = {
    "above a constant": nn.ReLU,
    "ends that are only approached": nn.Sigmoid,
    "tables of two branches": nn.GELU,
    "a step": nn.Hardshrink,
    "a slope for every channel": lambda: prelu(0.5, -1.0, 2.0),
}


@pytest.fixture(autouse=True, scope="module")
def compiled_anew() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_kernels", {})
        yield


def inverses(module: nn.Module, x: Tensor) -> tuple[InverseGraph, InverseGraph]:
    """Compiled, and not."""
    both = (
        fxinvert.invert(module, x[:2], output_target=lambda outputs, labels: labels, compiled=compiled)
        for compiled in (True, False)
    )
    return next(both), next(both)


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_answers_are_those_of_the_rule(make: Callable[[], nn.Module]) -> None:
    module, x = make(), 3 * torch.randn(6, 3, 50)
    compiled, plain = inverses(module, x)
    far = 5 * torch.randn_like(x)  # out of the range of some
    reachable = module(torch.randn_like(x)).detach()
    for t in (reachable, far):
        found, expected = compiled(x, t), plain(x, t)
        torch.testing.assert_close(found.targets["input"], expected.targets["input"], rtol=1e-5, atol=1e-5)
        assert found.certificates["input"].status is expected.certificates["input"].status
    assert found.certificates["input"].projected == expected.certificates["input"].projected
    # what happened stays, bit for bit; a kernel serves batches of any size
    count = len(kernels._kernels)
    for rows in (1, 2, 4):
        some = x[:rows]
        assert torch.equal(compiled(some, module(some).detach()).targets["input"], some)
    assert len(kernels._kernels) == count


def group_norm(scale: float) -> nn.GroupNorm:
    """With scales of one size, and not of one sign."""
    module = nn.GroupNorm(2, 4)
    module.weight.data = scale * torch.tensor([1.0, -1.0, 1.0, 1.0])
    nn.init.normal_(module.bias)
    return module


def test_norms_whose_scales_are_of_one_size_are_compiled() -> None:
    module, x = group_norm(0.5), 3 * torch.randn(8, 4, 5) + 1
    compiled, plain = inverses(module, x)
    far = x.clone()  # out of the range, but for the first four samples
    far[:4] = module(torch.randn_like(x)).detach()[:4]
    for t in (far, far.roll(4, 0)):
        found, expected = (inverse(x, t).certificates["input"].measured() for inverse in (compiled, plain))
        torch.testing.assert_close(found.residual, expected.residual, rtol=1e-4, atol=1e-5)
        # how far ε is felt is known to the rounding of a norm only
        torch.testing.assert_close(found.distance, expected.distance, rtol=0.05, atol=1e-3)
        assert found.status is expected.status is Status.PROJECTED
        assert found.projected == expected.projected
    # a kernel serves batches of any size, as many samples as an axis is long, and other scales
    count = len(kernels._kernels)
    module.weight.data.mul_(3)
    for rows in (1, 2, 5, 8):
        some = x[:rows]
        assert torch.equal(compiled(some, module(some).detach()).targets["input"], some)
    t = module(torch.randn_like(x)).detach()
    assert float(compiled(x, t).certificates["input"].residual.max()) <= 1e-5
    t[3, 2, 1], t[5, 0, 0] = torch.nan, torch.inf
    failed = compiled(x, t).certificates["input"]
    assert failed.failed.nonzero()[:, 0].tolist() == [3, 5]
    assert len(kernels._kernels) == count


@pytest.mark.parametrize(
    ("norm", "shape"), [(nn.LayerNorm(12), (5, 12)), (nn.RMSNorm(12), (5, 12)), (nn.GroupNorm(2, 4), (4, 20))]
)
def test_norms_with_other_scales_are_compiled_for_targets_in_the_range(
    norm: nn.Module, shape: tuple[int, ...]
) -> None:
    """Others take iterations, which are not; whichever sample it is, the answers are those of the rule."""
    nn.init.uniform_(norm.weight, 0.5, 2)  # type: ignore[arg-type]
    x = 3 * torch.randn(8, *shape) + 1
    compiled, plain = inverses(norm, x)
    entry = next(iter(compiled.graph.graph.nodes)).name
    reached, far = norm(torch.randn_like(x)).detach(), torch.randn_like(x)
    last = reached.clone()
    last[7] = far[7]
    count = len(kernels._kernels)
    for t, status in ((reached, Status.NEAREST), (far, Status.PROJECTED), (last, Status.PROJECTED)):
        found, expected = (inverse(x, t) for inverse in (compiled, plain))
        own, other = (each.certificates[entry].measured() for each in (found, expected))
        torch.testing.assert_close(own.residual, other.residual, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own.distance, other.distance, rtol=0.05, atol=1e-3)
        assert own.status is other.status is status
    assert len(kernels._kernels) == count + 1
    for rows in (1, 2, 5, 8):
        some = x[:rows]
        assert torch.equal(compiled(some, norm(some).detach()).targets[entry], some)
    reached[3, 2, 1], reached[5, 0, 0] = torch.nan, torch.inf
    failed = compiled(x, reached).certificates[entry]
    assert failed.failed.nonzero()[:, 0].tolist() == [3, 5]
    assert len(kernels._kernels) == count + 1


def test_samples_that_are_not_finite_stay_at_their_anchors() -> None:
    x, t = torch.randn(4, 8), torch.rand(4, 8)
    t[1, 3], t[2, 0] = torch.nan, -torch.inf
    found = inverses(nn.ReLU(), x)[0](x, t)
    assert found.certificates["input"].status is Status.FAILED
    assert found.certificates["input"].failed.tolist() == [False, True, True, False]
    assert torch.equal(found.targets["input"][1:3], x[1:3])


@pytest.mark.parametrize("make", [nn.ReLU, nn.Sigmoid, nn.Hardshrink], ids=lambda make: make.__name__)
def test_infinite_anchors_stay(make: Callable[[], nn.Module]) -> None:
    """As of scores that a mask hides. A kernel does not look for them, and is followed by one that does."""
    module, x, t = make(), torch.randn(4, 50), torch.rand(4, 50)
    x[1, 3], x[2, 7] = torch.inf, -torch.inf
    found, expected = (inverse(x, t) for inverse in inverses(module, x))
    torch.testing.assert_close(found.targets["input"], expected.targets["input"], rtol=1e-5, atol=1e-5)
    assert torch.equal(found.targets["input"].isinf(), x.isinf())


def test_other_digits_and_other_slopes_are_other_kernels() -> None:
    x = torch.randn(4, 3, 50)
    slopes = prelu(0.5, 1.0, 2.0)
    compiled, plain = inverses(slopes, x)
    t = torch.randn_like(x)
    for slope in (0.5, 0.25):
        slopes.weight.data.fill_(slope)
        assert torch.allclose(compiled(x, t).targets["input"], plain(x, t).targets["input"])
    for dtype, digits in ((torch.float64, 1e-8), (torch.bfloat16, 1e-2)):
        module = nn.GELU() if dtype == torch.float64 else nn.Tanh()
        inputs, wanted = x.to(dtype), module(torch.randn_like(x)).to(dtype)
        found = inverses(module, inputs)[0](inputs, wanted)
        assert found.targets["input"].dtype == dtype
        assert float(found.certificates["input"].residual.max()) <= digits


def test_training_takes_compiled_rules() -> None:
    torch.manual_seed(0)
    first, x = nn.Linear(5, 8), torch.randn(400, 5)
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(8, 3))
    data, weights = [(x, x[:, :3].argmax(1))], [first.weight.detach()]
    with pytest.MonkeyPatch.context() as patch:
        for compiled in (False, True):
            kept = dict[Any, Any]()
            patch.setattr(kernels, "_kernels", kept)
            result = fxinvert.post_train(
                model, data, sweeps=1, reconstruction="nodewise", confidence=0.5, compiled=compiled
            )
            weights.append(result.model.state_dict()["0.weight"])
            assert bool(kept) is compiled
    torch.testing.assert_close(weights[1], weights[2], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(weights[0], weights[1])


def test_without_a_compiler_an_error_says_what_is_needed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # kernels of other runs lie in the usual one
    x = torch.randn(2, 4)
    with (
        config.patch({"cpp.cxx": (None, str(tmp_path / "none"))}),
        pytest.raises(SolveError, match=r"'softsign'.*No working C\+\+ compiler.*leave out compiled=True"),
    ):
        inverses(nn.Softsign(), x)[0](x, x / 4)
