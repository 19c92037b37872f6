"""One budget of memory: what a sweep takes, measured by what torch allocates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from allocated import peak
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fxinvert
from fxinvert.errors import SolveError
from fxinvert.output_target import automatic, output_target
from fxinvert.training import ClosedForm, NormalEquations
from fxinvert.training.batch import Batch
from fxinvert.training.budget import BLOCKS, FEWEST, MEMORY_LIMIT, VALUES, Budget, Size, budget_for
from fxinvert.training.chunks import source_of
from fxinvert.training.context import Context
from fxinvert.training.op_sums import sums, told_together
from fxinvert.training.wide import WideEquations

MIB = 2**20


class Network(nn.Module):
    """Convolutions, and a layer with many inputs: (N, 3, 32, 32) → (N, 10)."""

    def __init__(self, pool: tuple[int, int], channels: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, 16, 3, padding=1)
        self.pool, wide = nn.AvgPool2d(pool), 16 * (32 // pool[0]) * (32 // pool[1])
        self.third, self.last = nn.Linear(wide, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 32, 32) → (N, 10)."""
        x = self.second(self.first(x).relu()).relu()
        logits: Tensor = self.last(self.third(self.pool(x).flatten(1)).relu())
        return logits


def images(batches: int, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.rand(size, 3, 32, 32, generator=generator), torch.randint(0, 10, (size,), generator=generator))
        for _ in range(batches)
    ]


def network(pool: tuple[int, int]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Network(pool)


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "pool"), [(64, (4, 2)), (64, (8, 4)), (192, (4, 2))])
def test_a_sweep_keeps_to_its_limit(limit: int, pool: tuple[int, int]) -> None:
    data, held_out = images(2, 16), images(1, 16)
    taken = peak(
        lambda: fxinvert.post_train(
            network(pool),
            data,
            validation_data=held_out,
            schedule="parallel",
            sweeps=1,
            chunk=1,
            output_target="cross_entropy",
            memory_limit=limit * MIB,
        )
    )
    assert taken <= limit * MIB


def needed(error: Exception) -> int:
    """What an error says is needed at least."""
    return int(str(error).split("at least ")[1].split()[0])


def context_of(limit: int) -> Context:
    sources = {"train": source_of(images(1, 2))}
    return Context(network((8, 4)), sources, reconstruction="linearized", memory_limit=limit)


def summed(limit: int, batch: Batch) -> Any:
    context = context_of(limit)
    (found,) = sums(
        context, [batch], output_targets=[output_target("cross_entropy")], paths=["first", "second", "third", "last"],
        satisfied_weight=0.1, weighted=False,
    )  # fmt: skip
    return found


def test_sums_do_not_depend_on_how_many_samples_fit() -> None:
    ((x, y),) = images(1, 16)
    batch = Batch((x,), y)
    assert [len(part) for part in context_of(48 * MIB).parts(batch)] == [8, 8]
    few, many = summed(48 * MIB, batch), summed(1024 * MIB, batch)
    for name, own in few.items():
        assert isinstance(own, NormalEquations)
        assert own.rows == many[name].rows
        for found, expected in ((own.gram, many[name].gram), (own.cross, many[name].cross)):
            assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())


def test_a_matrix_that_does_not_fit_is_not_held() -> None:
    ((x, y),) = images(1, 4)
    kinds = {name: type(own) for name, own in summed(24 * MIB, Batch((x,), y)).items()}
    assert kinds.pop("linear(weight=third.weight, bias=third.bias)") is WideEquations
    assert set(kinds.values()) == {NormalEquations}


SIZES = st.lists(
    st.builds(Size, st.integers(1, 4), st.integers(1, 300), st.integers(1, 3000)), min_size=1, max_size=6
)
SAMPLES = st.one_of(st.integers(1, 2000), st.just(math.inf))


@given(SIZES, st.integers(2**10, 2**31), SAMPLES)
def test_what_is_said_to_be_needed_is_enough(sizes: list[Size], limit: int, samples: float) -> None:
    numbered, budget = dict(enumerate(sizes)), Budget(limit)
    try:
        found = budget.rows(numbered, 1, samples)
    except SolveError as error:
        budget = Budget(needed(error))
        assert budget.limit > limit
        found = budget.rows(numbered, 1, samples)
    held = [size.sums(samples) for i, size in numbered.items() if found[i] in (None, size.few(samples))]
    assert 2 * sum(held) <= budget.sums
    for i, size in numbered.items():
        rows = found[i]
        assert rows is None or rows == size.few(samples) or rows >= FEWEST
    assert budget.sums + BLOCKS * budget.block < budget.limit / 2


@given(SIZES, st.integers(2**10, 2**31), SAMPLES)
def test_what_is_summed_in_a_pass_fits_or_is_alone(sizes: list[Size], limit: int, samples: float) -> None:
    numbered, budget = dict(enumerate(sizes)), Budget(limit)
    passes = budget.passes(numbered, 1, samples)
    assert [key for keys in passes for key in keys] == list(numbered)
    try:
        budget.rows(numbered, 1, samples)
    except SolveError:
        for keys in passes:
            own = {key: numbered[key] for key in keys}
            few = {key: size.few(samples) for key, size in own.items()}
            assert len(keys) == 1 or budget.rows(own, 1, samples) == few
    else:
        assert len(passes) == 1


def test_several_passes_give_the_same_sums() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )
    batch = Batch((torch.randn(4, 3, 8, 8),), torch.arange(4) % 3)
    context = Context(model, {"train": source_of([tuple(batch)])})

    def found(summed: list[str] | None) -> Any:
        return sums(
            context, [batch], output_targets=[output_target("cross_entropy")], paths=["0", "2", "5"],
            satisfied_weight=0.1, weighted=False, position_fraction=0.5, summed=summed,
        )[0]  # fmt: skip

    once, apart = found(None), found(["0"]) | found(["2", "5"])
    assert list(once) == list(apart)
    assert all(torch.equal(once[use].gram, apart[use].gram) for use in once)
    assert all(torch.equal(once[use].cross, apart[use].cross) for use in once)


def test_ops_whose_statistics_do_not_fit_together_are_trained_in_several_passes() -> None:
    torch.manual_seed(0)
    layers = (layer for _ in range(3) for layer in (nn.Linear(48, 48), nn.Tanh()))
    model = nn.Sequential(*layers, nn.Linear(48, 4))
    data = [(x := torch.randn(32, 48), x[:, :4].argmax(1)) for _ in range(16)]
    plan = fxinvert.partition(fxinvert.trace(model, data[0][0]), segments=1)
    settings: dict[str, Any] = {"plan": plan, "method": "closed_form"}
    little, much = (
        fxinvert.post_train(
            model, data, sweeps=1, output_target="cross_entropy", memory_limit=limit, **settings
        )
        for limit in (2**20, 2**30)
    )
    assert little.final.loss < little.baseline.loss
    assert little.final.loss == pytest.approx(much.final.loss, rel=1e-4)
    told = fxinvert.estimate(model, data[0][0], samples=512, batch=32, memory_limit=2**20, **settings)
    assert "2 passes" in str(told)


def test_output_targets_whose_sums_do_not_fit_together_are_told_one_by_one() -> None:
    """Of a layer with many outputs; what is chosen is the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2000))
    x, y = torch.randn(256, 6), torch.arange(256) % 5
    found = [
        fxinvert.post_train(
            model, (x, y), sweeps=1, memory_limit=limit, method=ClosedForm(last_layer=False), confidence=0.5
        )
        for limit in (3 * MIB, 1024 * MIB)
    ]
    groups = []
    for limit in (3 * MIB, 1024 * MIB):
        context = Context(model, {"train": source_of([(x, y)])}, memory_limit=limit)
        groups.append(told_together(context, ["2"], automatic(y), len(x)))
    assert [len(own) for own in groups] == [len(automatic(y)), 1]
    little, much = found
    assert little.output_target == much.output_target
    assert little.final.loss < little.baseline.loss
    assert little.final.loss == pytest.approx(much.final.loss, rel=1e-4)


@given(st.integers(0, 2**40))
def test_by_default_a_sample_of_any_model_fits(each: int) -> None:
    ((x, y),) = images(1, 3)
    limit = budget_for(each, []).limit
    assert len([*budget_for(each, []).parts(Batch((x,), y), each)]) <= 3
    assert (limit == MEMORY_LIMIT) == (each <= VALUES * MEMORY_LIMIT)


@given(st.integers(1, 2**18), st.integers(1, 2**12))
def test_by_default_the_sums_of_any_table_fit(rows: int, columns: int) -> None:
    """Of an embedding, and of the layer that gives a score for each of its rows."""
    rows = max(rows, columns)
    budget = budget_for(0, [torch.empty(rows, columns, device="meta")])
    for size in (Size(1, columns, rows, diagonal=True), Size(1, rows, columns)):
        assert budget.passes({"table": size, "other": Size(1, 8, 8)}) in (
            [["table", "other"]],
            [["table"], ["other"]],
        )
        assert budget.rows({"table": size}) == {"table": None}


def test_a_limit_too_small_for_a_sample_says_what_is_needed() -> None:
    def train(limit: int) -> None:
        fxinvert.post_train(
            network((8, 4)), images(8, 32), memory_limit=limit, method=ClosedForm(), sweeps=1,
            reconstruction="linearized",
        )  # fmt: skip

    with pytest.raises(SolveError, match=r"a sample's values and targets take .* at least \d+ bytes") as told:
        train(MIB)
    enough = needed(told.value)
    with pytest.raises(SolveError, match=r"the statistics of ops .* at least \d+ bytes") as told:
        train(enough)
    assert "weight=third.weight" in str(told.value)
    train(needed(told.value))
