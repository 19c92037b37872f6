"""How closely linearized targets are found: exactly from rows, in some steps for every op, in one step for all ops together."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from small_models import Model
from torch import Tensor, nn

import fxinvert
from fxinvert.inversion.linearized import CAREFUL, PROBES, QUICK, Effort
from fxinvert.output_target import output_target
from fxinvert.training.chunks import source_of
from fxinvert.training.context import Context

OUTPUTS, SAMPLES = 40, 60


def given(output: Tensor, labels: Tensor) -> Tensor:
    return labels


def branching() -> tuple[nn.Module, Tensor, Tensor]:
    """a(x) and what is made of it, to 40 outputs, an affine model in float64; inputs and output targets."""
    torch.manual_seed(0)
    model = Model(lambda self, x: self.c((h := self.a(x)) + self.b(h)),
                  a=nn.Linear(5, 6), b=nn.Linear(6, 6), c=nn.Linear(6, OUTPUTS)).double()  # fmt: skip
    return model, torch.randn(SAMPLES, 5).double(), torch.randn(SAMPLES, OUTPUTS).double()


def through(model: Any) -> dict[str, Tensor]:
    """The dense maps from values to the output."""
    c, inside = model.c.weight.detach(), torch.eye(6).double() + model.b.weight.detach()
    return {"a": c @ inside, "b": c}


def found(model: nn.Module, x: Tensor, wanted: Tensor, effort: Effort) -> dict[str, Tensor]:
    """What ops' targets are off their values."""
    inverse = fxinvert.invert(model, x, output_target=given, reconstruction="linearized")
    inverse.effort = effort
    with torch.no_grad():
        values = inverse.forward(x)
        nodes = [n for n in values if n.meta.get("path") in ("a", "b")]
        targets = inverse.targets(values, wanted, nodes)
        return {n.meta["path"]: targets[n] - values[n] for n in nodes}


@pytest.mark.parametrize("steps", [1, 2])
def test_a_few_steps_come_closest_within_their_span(steps: int) -> None:
    """Within span{Jᵀr} or span{Jᵀr, JᵀJJᵀr}, by the dense map J from a value to the output."""
    model, x, wanted = branching()
    with torch.no_grad():
        missing = wanted - model(x)
    for name, correction in found(model, x, wanted, Effort(16, steps)).items():
        j = through(model)[name]
        spanned = [missing @ j]
        spanned += [spanned[0] @ j.T @ j] if steps == 2 else []
        basis = torch.stack(spanned, 2)
        weights = torch.linalg.lstsq(j @ basis, missing[..., None]).solution
        torch.testing.assert_close(correction, (basis @ weights)[..., 0], rtol=1e-6, atol=1e-9)


def test_one_step_for_all_ops_goes_along_the_slope_for_about_as_long_as_it_should() -> None:
    """Its lengths are estimated: right on average, and none as long as to miss the target's own direction by more than all."""
    model, x, wanted = branching()
    with torch.no_grad():
        missing = wanted - model(x)
    for name, correction in found(model, x, wanted, Effort(16, None)).items():
        j = through(model)[name]
        slope = missing @ j
        exact = slope.square().sum(1) / (slope @ j.T).square().sum(1)
        lengths = (correction / slope).mean(1)
        torch.testing.assert_close(correction, lengths[:, None] * slope)
        assert abs(float((lengths / exact).log().mean())) < 0.25
        assert float(((slope @ j.T) * missing).sum(1).mul(lengths).sub(missing.square().sum(1)).max()) <= 1e-9
        left = (missing - correction @ j.T).square().sum() / missing.square().sum()
        best = (missing - exact[:, None] * slope @ j.T).square().sum() / missing.square().sum()
        assert float(1 - left) > 0.6 * float(1 - best) > 0


def test_one_step_for_all_ops_takes_as_many_passes_whatever_their_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passes, grad = list[int](), torch.autograd.grad

    def counted(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        passes.append(len(inputs))
        return grad(outputs, inputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    model, x, wanted = branching()
    found(model, x, wanted, QUICK)
    assert passes == [2] * (1 + PROBES)


def test_one_step_of_a_sample_does_not_depend_on_others() -> None:
    model, x, wanted = branching()
    whole = found(model, x, wanted, QUICK)
    for first, last in pairwise((0, 1, 20, SAMPLES)):
        for name, correction in found(model, x[first:last], wanted[first:last], QUICK).items():
            torch.testing.assert_close(correction, whole[name][first:last], rtol=1e-12, atol=1e-14)


def test_training_takes_quick_targets_and_inversion_careful_ones() -> None:
    model, x, wanted = branching()
    context = Context(model, {"train": source_of([(x, wanted)])})
    assert context.inverse(output_target(given)).effort == QUICK
    assert fxinvert.invert(model, x, output_target=given).effort == CAREFUL


@pytest.mark.parametrize("effort", [CAREFUL, QUICK])
@pytest.mark.parametrize("outputs", [3, 100])
def test_what_the_output_hardly_follows_has_finite_targets(outputs: int, effort: Effort) -> None:
    """Its derivative is not zero, but the square is, in float32."""
    torch.manual_seed(0)
    faint, plain = nn.Linear(4, 6), nn.Linear(4, 6)
    model = Model(
        lambda self, x: self.leave(1e-14 * self.faint(x) + self.plain(x).tanh()),
        faint=faint, plain=plain, leave=nn.Linear(6, outputs),
    )  # fmt: skip
    graph, x = fxinvert.trace(model, torch.randn(2, 4)), torch.randn(5, 4)
    inverse = fxinvert.invert(graph, output_target="regression", reconstruction="linearized")
    inverse.effort = effort
    rec = inverse(x, model(x).detach() + 0.1 * torch.randn(5, outputs))
    assert all(bool(torch.isfinite(rec.targets[name]).all()) for name in rec.names)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_targets_of_one_step_in_half_precision_are_near_those_in_single(dtype: torch.dtype) -> None:
    model, x, wanted = branching()
    single = found(model.float(), x.float(), wanted.float(), QUICK)
    for name, correction in found(model.to(dtype), x.to(dtype), wanted.to(dtype), QUICK).items():
        assert correction.dtype is dtype
        torch.testing.assert_close(correction.float(), single[name], rtol=0.1, atol=0.05)


def test_a_sample_that_meets_its_target_stays() -> None:
    model, x, wanted = branching()
    with torch.no_grad():
        wanted[:3] = model(x)[:3]
    for correction in found(model, x, wanted, QUICK).values():
        assert bool((correction[:3] == 0).all())
        assert bool((correction[3:] != 0).any(1).all())
