"""Chunks and feeds: fixed pieces of the data, whoever reads them, and what changes between passes is found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import data, train, weights
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from fxinvert import DataError
from fxinvert.training.batch import Batch, checked
from fxinvert.training.chunks import source_of
from fxinvert.training.data import Begun
from fxinvert.training.fingerprint import Fingerprint, fingerprint
from fxinvert.training.held_out import KEPT, HeldOutSample, bound

Data = list[tuple[Tensor, Tensor]]


def batch_of(items: Data) -> Batch:
    return Batch((torch.cat([x for x, _ in items]),), torch.cat([y for _, y in items]))


def samples_of(batch: Batch) -> Tensor:
    (x,) = batch.inputs
    assert isinstance(x, Tensor)
    return x


def prints(items: Data) -> Fingerprint:
    return sum((fingerprint(checked(item, ""), i)[0] for i, item in enumerate(items)), Fingerprint())


# fingerprints


@given(st.integers(1, 50))
def test_a_fingerprint_of_samples_does_not_depend_on_batches_or_order(size: int) -> None:
    whole = batch_of(data())
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(size))
    x, y = samples_of(whole)[order], whole.labels[order]
    other = prints(list(zip(torch.split(x, size), torch.split(y, size), strict=True)))
    first = prints(data())
    assert (other.samples, other.inputs, other.labels, other.pairs) == (
        first.samples,
        first.inputs,
        first.labels,
        first.pairs,
    )
    assert other.ordered != first.ordered


@given(st.integers(0, 319), st.integers(0, 5))
def test_any_change_of_a_sample_changes_the_fingerprint(row: int, column: int) -> None:
    whole = batch_of(data())
    x = samples_of(whole).clone()
    x[row, column] = torch.nextafter(x[row, column], torch.tensor(9.0))
    assert prints([(x, whole.labels)]).inputs != prints([(samples_of(whole), whole.labels)]).inputs


def test_labels_that_change_places_change_the_pairs_only() -> None:
    whole = batch_of(data())
    before, after = (
        prints([(samples_of(whole), whole.labels)]),
        prints([(samples_of(whole), whole.labels.flip(0))]),
    )
    assert (before.inputs, before.labels) == (after.inputs, after.labels)
    assert before.pairs != after.pairs


def test_structures_of_tensors_are_batches() -> None:
    inputs = ({"image": torch.rand(4, 2), "speed": torch.rand(4)}, torch.rand(4, 3))
    batch = checked((inputs, {"steer": torch.rand(4), "stop": torch.zeros(4, dtype=torch.bool)}), "here")
    assert len(batch) == 4
    kept = batch.select(torch.tensor([True, False, True, False]))
    assert isinstance(kept.inputs, tuple)
    assert kept.inputs[0]["image"].shape == (2, 2)
    assert kept.labels["stop"].shape == (2,)
    assert fingerprint(batch, 0)[0] != fingerprint(batch.map(lambda value: value.flip(0)), 0)[0]
    with pytest.raises(DataError, match=r"here: labels\['steer'\] has shape \(3,\), input 0 \(4, 2\)"):
        checked((inputs, {"steer": torch.rand(3)}), "here")
    with pytest.raises(DataError, match=r"here: input 0\['speed'\] has NaN"):
        checked((({"speed": torch.full((4,), torch.nan)},), torch.zeros(4)), "here")


# chunks


def slices(size: int) -> Callable[[], Any]:
    return lambda: [data()[i : i + size] for i in range(0, 20, size)]


@pytest.mark.parametrize("given", [data(), lambda: data(), lambda: iter_only(data()), lambda: iter(data())])
def test_chunks_hold_all_batches_in_order(given: Any) -> None:
    source = source_of(given, size=3)
    for _ in range(2):
        chunks = list(source.chunks())
        assert [chunk.index for chunk in chunks] == list(range(7))
        assert [chunk.first for chunk in chunks] == list(range(0, 21, 3))
        read = [item for chunk in chunks for item in chunk.read()]
        assert all(torch.equal(a[0], b[0]) for a, b in zip(read, data(), strict=True))


def iter_only(items: Data) -> Any:
    class Loader:
        def __iter__(self) -> Iterator[Any]:
            return iter(items)

    return Loader()


def test_a_factory_and_its_data_give_the_same_bytes() -> None:
    expected = weights(train(sweeps=1))
    assert weights(train(lambda: data(), sweeps=1)) == expected
    assert weights(train([lambda i=i: data()[i : i + 4] for i in range(0, 20, 4)], sweeps=1)) == expected


#: so many that a fifth of them is more than what is kept to search steps on
MANY = data(6000, 200)
FORMS: dict[str, Any] = {
    "loader": DataLoader(TensorDataset(*map(torch.cat, zip(*MANY, strict=True))), batch_size=200),
    "factory": lambda: MANY,
    "factory of a generator": lambda: iter(MANY),
    "shards": [lambda i=i: MANY[i : i + 4] for i in range(0, len(MANY), 4)],
}


def trained(form: Any, **settings: Any) -> tuple[str, float, list[float]]:
    """The weights and steps of a run that is judged on more samples than it searches on."""
    result = train(form, sweeps=1, schedule="parallel", **settings)
    assert result.baseline.samples > KEPT
    return weights(result), result.final.loss, [record.step for record in result.history]


def test_the_same_data_in_any_form_give_the_same_bytes() -> None:
    expected = trained(MANY)
    assert {name: trained(form) for name, form in FORMS.items()} == dict.fromkeys(FORMS, expected)
    shards = FORMS["shards"]
    assert trained(shards, validation_data=shards) == trained(MANY, validation_data=MANY)


@pytest.mark.slow
def test_data_that_workers_read_give_the_same_bytes() -> None:
    assert trained(FORMS["factory"], executor="processes", workers=2) == trained(MANY)


@given(st.integers(0, 2**30), st.integers(1, 5 * KEPT), st.integers(1, 900))
def test_a_sample_gathered_from_parts_is_that_of_the_whole(seed: int, count: int, size: int) -> None:
    # some are alike
    x = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    whole = HeldOutSample()
    parts = [HeldOutSample() for _ in range(3)]
    for i, rows in enumerate(torch.split(x, size)):
        batch = Batch((rows,), torch.zeros(len(rows)))
        whole.add(batch)
        parts[i % 3].add(batch)
    most = bound(torch.cat([part.hashes for part in parts]))
    joined = HeldOutSample()
    joined.largest = max(part.largest for part in parts)
    for part in parts:
        part.limit(most)
        joined.join(part)
    pairs = zip(joined.batches(), whole.batches(), strict=True)
    assert all(torch.equal(samples_of(a), samples_of(b)) for a, b in pairs)


def test_a_chunk_can_be_read_by_its_number() -> None:
    shards = source_of([lambda i=i: [data()[i]] for i in range(4)])
    (item,) = shards.chunk(2).read()
    assert torch.equal(item[0], data()[2][0])
    assert "shard 2" in shards.chunk(2).what


# later passes


class Changing:
    """A loader whose data changes after some passes."""

    def __init__(self, change: Callable[[Data], Data], after: int = 4) -> None:
        self.change, self.left = change, after

    def __iter__(self) -> Iterator[Any]:
        self.left -= 1
        return iter(data() if self.left >= 0 else self.change(data()))


def without_the_last(items: Data) -> Data:
    return items[:-1]


def without_most(items: Data) -> Data:
    return items[:3]


def twice(items: Data) -> Data:
    return items * 2


def smaller_batches(items: Data) -> Data:
    return [(x[:-1], y[:-1]) for x, y in items]


def other_labels(items: Data) -> Data:
    return [(x, (y + 1) % 3) for x, y in items]


def labels_in_other_places(items: Data) -> Data:
    return [(x, y.flip(0)) for x, y in items]


def noise(items: Data) -> Data:
    return [(x + 0.01, y) for x, y in items]


def backwards(items: Data) -> Data:
    return items[::-1]


@pytest.mark.parametrize("after", [1, 4])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_the_last, "304 samples where there were 320"),
        (without_most, "fewer batches in a later pass"),
        (twice, "more batches in a later pass"),
        (smaller_batches, "300 samples where there were 320"),
        (other_labels, "has other labels in a later pass"),
        (labels_in_other_places, "has other labels in a later pass"),
    ],
)
def test_data_that_changes_between_passes_is_found(
    change: Callable[[Data], Data], said: str, after: int
) -> None:
    """Even from the first pass to the second: the model is traced with the beginning of the first."""
    with pytest.raises(DataError, match=said):
        train(Changing(change, after))


@given(st.lists(st.integers(0, 6), max_size=4))
def test_looking_at_the_beginning_takes_no_pass(looks: list[int]) -> None:
    begun, passes = Begun(Changing(backwards, after=1)), list[list[Any]]()
    for number in looks:
        seen = list(islice(begun.beginning, number))
        assert all(torch.equal(a[0], b[0]) for a, b in zip(seen, data(), strict=False))
    for _ in range(2):
        passes.append([x for x, _ in begun])
    first, second = ([x for x, _ in items] for items in (data(), backwards(data())))
    assert all(
        torch.equal(a, b)
        for own, it in zip(passes, (first, second), strict=True)
        for a, b in zip(own, it, strict=True)
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [(noise, "not the same in chunk 0.*augments"), (backwards, "not the same in chunk 0.*shuffle=False")],
)
def test_a_run_that_can_go_on_needs_the_same_batches(
    tmp_path: Any, change: Callable[[Data], Data], said: str
) -> None:
    assert train(Changing(change)).final.loss < 1  # where nothing has to be resumed that is fine
    with pytest.raises(DataError, match=said):
        train(Changing(change), run_directory=tmp_path)


def test_processes_are_sent_what_was_read_first() -> None:
    """A shuffling loader is read once where its chunks have to be sent."""
    torch.manual_seed(0)
    whole = batch_of(data())
    loader = DataLoader(TensorDataset(samples_of(whole), whole.labels), batch_size=16, shuffle=True)
    result = train(loader, executor="processes", workers=1, sweeps=1)
    assert result.final.loss < result.baseline.loss


@pytest.mark.parametrize("given", [[], list, [list], 7, lambda: 7, lambda: iter(())])
def test_no_data(given: Any) -> None:
    with pytest.raises(DataError, match=r"no batches|an iterable of|factory of train_data made int"):
        train(given)
