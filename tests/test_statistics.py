"""Normal equations: sums that add up, and the least-squares solution they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxinvert.linalg.memory import full_precision
from fxinvert.training import NormalEquations, grams
from fxinvert.training.blocks import added, equations_over
from fxinvert.training.wide import WideEquations


def problem(rows: int, n: int, m: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(1, rows, n, generator=generator, dtype=torch.float64)
    errors = torch.randn(1, rows, m, generator=generator, dtype=torch.float64)
    weights = torch.rand(rows, generator=generator, dtype=torch.float64) + 0.1
    return features, errors, weights


@given(st.integers(5, 30), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_undamped_solution_is_weighted_least_squares(rows: int, n: int, m: int, seed: int) -> None:
    features, errors, weights = problem(rows, n, m, seed)
    weights = weights if seed % 2 else torch.full_like(weights, 0.3)
    solved = NormalEquations.of(features, errors, weights).solve(0.0)
    root = weights.sqrt()[:, None]
    expected = torch.linalg.lstsq(features[0] * root, errors[0] * root).solution.T
    assert torch.allclose(solved.change[0], expected, rtol=1e-6, atol=1e-8)


@given(st.integers(0, 99), st.integers(1, 19))
def test_sums_of_parts_are_the_sums_of_the_whole(seed: int, cut: int) -> None:
    features, errors, weights = problem(20, 4, 3, seed)
    whole = NormalEquations.of(features, errors, weights)
    parts = NormalEquations.of(features[:, :cut], errors[:, :cut], weights[:cut])
    parts += NormalEquations.of(features[:, cut:], errors[:, cut:], weights[cut:])
    assert torch.allclose(whole.gram, parts.gram)
    assert torch.allclose(whole.cross, parts.cross)
    assert whole.rows == parts.rows
    assert whole.error == pytest.approx(parts.error)


def test_damping_is_relative_to_the_scale_of_the_features() -> None:
    features, errors, weights = problem(40, 4, 3, 0)
    small = NormalEquations.of(features, errors, weights).solve(0.1).change
    large = NormalEquations.of(1e3 * features, errors, weights).solve(0.1).change
    assert torch.allclose(small, 1e3 * large)


def test_dead_columns_keep_their_weights_and_the_others_are_solved_as_without_them() -> None:
    features, errors, weights = problem(40, 4, 3, 0)
    padded = torch.cat([features, torch.zeros(1, 40, 2, dtype=torch.float64)], -1)
    solved = NormalEquations.of(padded, errors, weights).solve(0.0)
    assert solved.dead == 2
    assert torch.equal(solved.change[..., 4:], torch.zeros(1, 3, 2, dtype=torch.float64))
    assert torch.allclose(
        solved.change[..., :4], NormalEquations.of(features, errors, weights).solve(0.0).change
    )


def test_all_features_dead() -> None:
    solved = NormalEquations.of(torch.zeros(1, 5, 2), torch.ones(1, 5, 3), torch.ones(5)).solve(1e-2)
    assert solved.dead == 2
    assert not solved.change.any()


def test_singular_system_escalates_and_reports_its_damping() -> None:
    features, errors, weights = problem(40, 3, 2, 0)
    twice = torch.cat([features, features], -1)
    solved = NormalEquations.of(twice, errors, weights).solve(0.0)
    assert solved.damping > 0
    assert torch.isfinite(solved.change).all()
    # both copies share the weight that one would have had
    alone = NormalEquations.of(features, errors, weights).solve(0.0).change
    assert torch.allclose(solved.change[..., :3] + solved.change[..., 3:], alone, atol=1e-4)


def test_groups_are_independent() -> None:
    first, second = problem(30, 3, 2, 0), problem(30, 3, 2, 1)
    weights = first[2]
    both = NormalEquations.of(
        torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]]), weights
    ).solve(0.1)
    for i, (features, errors, _) in enumerate((first, second)):
        alone = NormalEquations.of(features, errors, weights).solve(0.1)
        assert torch.allclose(both.change[i], alone.change[0])


def test_explained_share_is_one_for_a_linear_error_and_small_for_noise() -> None:
    features, noise, weights = problem(400, 4, 3, 0)
    linear = features @ torch.ones(4, 3, dtype=torch.float64)
    assert NormalEquations.of(features, linear, weights).solve(0.0).explained == pytest.approx(1.0)
    assert NormalEquations.of(features, noise, weights).solve(0.0).explained < 0.1


def test_weights_of_samples_stand_for_all_their_rows() -> None:
    features, errors, _ = problem(30, 3, 2, 0)
    per_sample = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    weighted = NormalEquations.of(features, errors, per_sample)
    kept = NormalEquations.of(features[:, :10], errors[:, :10], torch.ones(10))
    kept += NormalEquations.of(features[:, 20:], errors[:, 20:], 2 * torch.ones(10))
    assert torch.allclose(weighted.gram, kept.gram)
    assert torch.allclose(weighted.cross, kept.cross)


@given(st.integers(1, 7), st.integers(1, 5), st.booleans(), st.integers(0, 99))
def test_sums_in_blocks_are_the_sums_of_the_whole(
    samples: int, positions: int, by_row: bool, seed: int
) -> None:
    features, errors, weights = problem(samples * positions, 4, 3, seed)
    weights = weights if by_row else weights[:samples]
    asked: list[int] = []

    def some(rows: slice) -> Tensor:
        made: Tensor = features.reshape(1, samples, positions, 4)[:, rows].flatten(1, 2)
        asked.append(made.shape[1])
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grams, "ROWS", 3)
        patch.setattr(grams, "COLUMNS", 2)
        parts = equations_over(some, errors, weights, samples, block=2 * positions * 4 * 8)
    assert isinstance(parts, NormalEquations)
    per_row = weights if by_row else weights.repeat_interleave(positions)
    assert max(asked) <= 2 * positions
    assert sum(asked) == parts.rows == samples * positions
    assert torch.allclose(parts.gram, (features * per_row[None, :, None]).mT @ features)
    assert torch.allclose(parts.cross, (errors * per_row[None, :, None]).mT @ features)
    assert torch.allclose(parts.gram, parts.gram.mT)
    assert parts.error == pytest.approx(float((errors.square() * per_row[None, :, None]).sum()))


def test_sums_of_single_precision_carry_on_in_double() -> None:
    rows = 50 * grams.ROWS
    features, errors = torch.full((1, rows, 1), 0.1), torch.zeros(1, rows, 1)
    made = NormalEquations.of(features, errors, torch.ones(rows))
    assert made.gram.item() == pytest.approx(rows * float(torch.tensor(0.1)) ** 2, rel=1e-6)


@pytest.mark.parametrize("kind", [NormalEquations, WideEquations])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sums_stay_where_the_rows_are(kind: type[NormalEquations | WideEquations], device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    rows = problem(30, 5, 3, 0)
    there = [value.to(device) for value in rows]
    made, solved = added(kind.of(*there), kind.of(*there)), added(kind.of(*rows), kind.of(*rows)).solve(1e-2)
    assert made.cross.device.type == device
    assert torch.allclose(made.solve(1e-2).change.cpu(), solved.change)


def test_products_on_cuda_have_all_digits_of_float32() -> None:
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision
    try:
        convolutions.fp32_precision = "tf32"
        with full_precision(torch.device("cuda")):
            assert convolutions.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert convolutions.fp32_precision == "tf32"
        with full_precision(torch.device("cpu")):
            assert convolutions.fp32_precision == "tf32"
    finally:
        convolutions.fp32_precision = before
