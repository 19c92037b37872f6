"""How far updates are taken: the search along a step, sizes of updates found together, the sample it is judged on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from runs import data, network
from torch import Tensor, nn

from fxinvert.inversion.replay import Values
from fxinvert.training.batch import Batch
from fxinvert.training.chunks import source_of
from fxinvert.training.context import Context
from fxinvert.training.data import Batches
from fxinvert.training.held_out import KEPT, HeldOutSample
from fxinvert.training.judge import LEAST, MOST, Candidate, interpolated, judge, tallies
from fxinvert.training.metrics import Metrics, Tally
from fxinvert.training.outputs import Remembered, outputs_over
from fxinvert.training.sizes import Quadratic, quadratic
from fxinvert.training.variants import Variants
from fxinvert.training.work import Proposal, Update, moved


def context_of(model: nn.Module, given: Any = None) -> tuple[Context, list[Batch]]:
    samples = data() if given is None else given
    context = Context(model, {"train": source_of(samples)})
    return context, list(Batches(samples, torch.device("cpu")))


def changes(context: Context, scale: float = 0.3) -> Proposal:
    generator = torch.Generator().manual_seed(0)
    return [
        Update(op, {n: scale * torch.randn(context.tensors[n].shape, generator=generator) for n in names})
        for op, names in (("0", ("0.weight", "0.bias")), ("2", ("2.weight", "2.bias")))
    ]


def test_candidates_are_measured_as_if_they_were_taken() -> None:
    context, batches = context_of(network())
    proposal = changes(context)
    before = context.state()
    candidates = [Candidate(0, sizes) for sizes in ((0.0, 0.0), (1.0, 0.0), (0.0, 0.5), (0.3, 2.0))]
    found = [
        total.metrics for total in tallies(context, batches, proposals=[proposal], candidates=candidates)
    ]
    for candidate, metrics in zip(candidates, found, strict=True):
        context.load({**before, **moved(before, proposal, candidate.sizes)})
        with torch.no_grad():
            taken = sum((Tally.of(context.graph(*b.inputs), b) for b in batches), Tally()).metrics
        assert metrics.loss == pytest.approx(taken.loss, rel=1e-6)
        context.load(before)


def test_what_is_asked_for_again_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    context, batches = context_of(network())
    begun, proposal = context.state(), changes(context)
    other, none = moved(begun, proposal, (1.0, 1.0)), dict[str, Tensor]()
    half = moved(begun, proposal, (0.5, 0.5))
    run: list[Values] = []
    once, common = Remembered(), Variants.common

    def counted(variants: Variants, inputs: Any) -> Values:
        run.append(common(variants, inputs))
        return run[-1]

    for state, digest in ((begun, "a"), (begun | other, "b"), (begun, "a")):
        context.load(state, digest)
        for changed in ([none], [other, none], [half], [none, other, half, none]):
            wanted = [list(own) for _, own in outputs_over(context, batches, changed)]
            with monkeypatch.context() as patch:
                patch.setattr(Variants, "common", counted)
                given = [list(own) for _, own in once(context, batches, changed)]
            torch.testing.assert_close(given, wanted, rtol=0, atol=0)
    # for each of two states, the output with nothing changed, and what comes before all of the changes
    assert len(run) == 2 * 2 * len(batches)
    monkeypatch.setattr(Variants, "common", counted)
    for loaded, kept in (("", 2**26), ("c", 0)):  # what it holds is not told; there is no room
        context.load(begun, loaded)
        monkeypatch.setattr("fxinvert.training.budget.LARGEST_COMMON", kept)
        run.clear()
        for _ in range(2):
            assert len(list(once(context, batches, [{}]))) == len(batches)
        assert len(run) == 2 * len(batches)


def test_the_quadratic_model_is_exact_where_the_output_is_affine_in_the_sizes() -> None:
    """Two updates of one affine layer, squared error: the least of the model is the least of the loss."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x = torch.randn(60, 4).double()
    exact = nn.Linear(4, 3).double()
    context, batches = context_of(model, [(x, exact(x).detach())])
    difference = exact.weight.detach() - model.weight.detach()
    bias = exact.bias.detach() - model.bias.detach()
    proposal = [Update("a", {"weight": 2 * difference}), Update("b", {"bias": 0.8 * bias})]
    sizes = quadratic(context, batches, proposal=proposal).least(MOST)
    assert sizes == pytest.approx((0.5, 1.25), rel=1e-6)


def test_sizes_stay_between_nothing_and_the_most() -> None:
    model = Quadratic(torch.tensor([1.0, -9.0]).double(), torch.eye(2).double())
    assert model.least(2.0) == (0.0, 2.0)


@pytest.mark.parametrize(
    ("losses", "step"),
    [
        ((1.0, 0.25, 0.0), 1.0),
        ((1.0, 0.5, 1.0), 0.5),
        ((1.0, 2.0, 3.0), LEAST),
        ((1.0, 0.5, 0.0), MOST),
        ((1.0, float("nan"), float("inf")), LEAST),
    ],
)
def test_a_parabola_says_how_far_to_go(losses: tuple[float, float, float], step: float) -> None:
    assert interpolated(*losses) == pytest.approx(step)


def some(count: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch((torch.randn(count, 3, generator=generator),), torch.arange(count))


def sampled(batches: list[Batch]) -> list[list[int]]:
    sample = HeldOutSample()
    for batch in batches:
        sample.add(batch)
    return [batch.labels.tolist() for batch in sample.batches()]


def test_the_sample_does_not_depend_on_the_order_of_the_data() -> None:
    whole, size = some(5 * KEPT), 100
    rows = torch.split(torch.arange(5 * KEPT), size)
    shuffled = torch.split(torch.randperm(5 * KEPT, generator=torch.Generator().manual_seed(1)), size)
    first, second = (sampled([whole.select(own) for own in order]) for order in (rows, shuffled))
    assert first == second
    assert sum(map(len, first)) == KEPT
    assert max(map(len, first)) <= size


def test_samples_of_several_shapes_are_kept() -> None:
    found = sampled([Batch((torch.randn(4, n),), torch.full((4,), n)) for n in (3, 5, 3)])
    assert sorted(label for batch in found for label in batch) == [3] * 8 + [5] * 4


class Deceptive:
    """Held-out data of which the sample says that a step helps, and all of them that it harms."""

    sampled = True

    def search(self, proposals: Any, candidates: Any) -> list[Metrics]:
        return [Metrics(1.0 - max(c.sizes), None, 10) for c in candidates]

    def measure(self, proposals: Any, candidates: Any) -> list[Metrics]:
        return [Metrics(2.0, None, 100) for _ in candidates]

    def quadratic(self, proposal: Proposal) -> Quadratic:
        raise AssertionError("one update needs no model")


def test_a_step_that_only_helps_on_the_sample_is_not_taken() -> None:
    start = Metrics(1.5, None, 100)
    judged = judge([[Update("a", {})]], "searched", Deceptive(), start)
    assert judged.metrics == start
    assert judged.candidate.sizes == (0.0,)


class Exploding(Deceptive):
    """Held-out data on which only short steps help, and longer ones overshoot without measure."""

    sampled = False

    def search(self, proposals: Any, candidates: Any) -> list[Metrics]:
        steps = [max(c.sizes) for c in candidates]
        return [Metrics(1.0 - step + (10 * step) ** 12, None, 10) for step in steps]


def test_a_short_step_is_found_where_longer_ones_explode() -> None:
    judged = judge([[Update("a", {})]], "none", Exploding(), Metrics(1.0, None, 10))
    assert judged.candidate.sizes == (LEAST,)
