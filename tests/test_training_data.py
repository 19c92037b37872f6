"""Training data: what is kept aside, and what is refused."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

import fxinvert
from fxinvert import DataError
from fxinvert.training.batch import Batch, check_alike, types_of
from fxinvert.training.data import Batches, Part, batched
from fxinvert.training.fingerprint import kept_aside

CPU = torch.device("cpu")


def samples(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 4, generator=torch.Generator().manual_seed(seed))


@given(
    st.integers(0, 99),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int64, torch.uint8]),
)
def test_a_sample_is_kept_aside_by_its_content_alone(seed: int, dtype: torch.dtype) -> None:
    x = (100 * samples(50, seed)).to(dtype)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(kept_aside(x)[order], kept_aside(x[order]))
    assert torch.equal(kept_aside(x)[:7], kept_aside(x[:7]))


def test_a_fifth_is_kept_aside_even_of_coarse_images() -> None:
    images = torch.randint(0, 17, (5000, 1, 8, 8), generator=torch.Generator().manual_seed(0)).float() / 16
    assert 0.17 < kept_aside(images).float().mean() < 0.23


def test_parts_are_disjoint_and_complete_however_the_loader_shuffles() -> None:
    data = TensorDataset(samples(200), torch.arange(200))
    loader = DataLoader(data, batch_size=32, shuffle=True)
    both = Batches(loader, CPU)

    def labels(part: Part) -> set[int]:
        return {int(label) for batch in both.of(part) for label in batch.labels}

    held_out = labels("held_out")
    assert held_out == labels("held_out")
    assert held_out.isdisjoint(labels("train"))
    assert held_out | labels("train") == labels("all") == set(range(200))


def test_data_that_come_whole_are_cut_into_batches() -> None:
    """Whichever way they are given, the same batches."""
    x, y = samples(600), torch.arange(600)
    expected = [(x[:256], y[:256]), (x[256:512], y[256:512]), (x[512:], y[512:])]
    for whole in ((x, y), [x, y], (x.numpy(), y.numpy()), TensorDataset(x, y), ((x,), y), ({"x": x}, y)):
        for part, (inputs, labels) in zip(batched(whole, "train_data"), expected, strict=True):
            assert torch.equal(tree_leaves(part)[0], inputs)
            assert torch.equal(tree_leaves(part)[1], labels)
    assert batched(expected, "train_data") is expected
    assert batched(expected[:2], "train_data") == expected[:2]
    with pytest.raises(DataError, match=r"validation_data: labels has shape \(599,\), input 0 \(600"):
        batched((x, y[1:]), "validation_data")


def test_batches_may_be_arrays_and_these_may_be_read_only(recwarn: pytest.WarningsRecorder) -> None:
    x = samples(6).numpy()
    x.flags.writeable = False
    ((inputs, labels),) = Batches([({"x": x}, torch.arange(6).numpy())], CPU)
    assert torch.equal(tree_leaves(inputs)[0], samples(6))
    assert labels.dtype == torch.int64
    assert not recwarn.list


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            (samples(4).double(), torch.arange(4)),
            "input 0: float64 with 3 axes; .* there: float32 with 3 axes",
        ),
        ((samples(4)[0], torch.arange(3)), "input 0: float32 with 2 axes; .* there: float32 with 3 axes"),
        ((samples(4), torch.ones(4)), "labels: floating-point numbers; .* there: integers"),
        ((samples(4), torch.ones(4).bool()), "labels: truth values; .* there: integers"),
        (({"x": samples(4)}, torch.arange(4)), r"input 'x': .*not there|input 0: not there"),
    ],
)
def test_batches_are_of_the_types_of_the_first(other: Any, message: str) -> None:
    first = (samples(4), torch.arange(4))
    ((batch),) = Batches([first], CPU)

    def check(given: Batch, where: str) -> None:
        check_alike(given, types_of(batch), where, "batch 0")

    list(Batches([first, (samples(2), torch.arange(2, dtype=torch.int32))], CPU, check=check))
    with pytest.raises(DataError, match=f"batch 1 of train_data: {message}"):
        list(Batches([first, other], CPU, check=check))


@pytest.mark.parametrize("where", ["train", "validation"])
def test_a_batch_of_another_shape_than_the_model_takes_is_named(where: str) -> None:
    first, other = (samples(40), torch.arange(40) % 3), (torch.randn(40, 3, 5), torch.arange(40) % 3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    train, validation, at = ([first, other], None, 1) if where == "train" else ([first], [other], 0)
    message = (
        rf"batch {at} of {where}_data: .*shape \(\d+, 3, 5\); the model was traced with \(B, 3, 4\).*padding"
    )
    with pytest.raises(DataError, match=message):
        fxinvert.post_train(model, train, validation_data=validation, sweeps=1)


@pytest.mark.parametrize("method", ["closed_form", "gauss_newton", "gradient"])
def test_a_model_that_takes_any_shape_is_not_run_at_another_than_it_was_traced_with(method: str) -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            rows: Tensor = self.last(x.sum(1) / x.shape[1])  # a graph knows the number that this was
            return rows

    first, other = (samples(40), torch.arange(40) % 3), (torch.randn(40, 7, 4), torch.arange(40) % 3)
    with pytest.raises(DataError, match=r"batch 1 of train_data: input 0 has shape \(40, 7, 4\)"):
        fxinvert.post_train(Mean(), [first, other], method=method, sweeps=1)


@pytest.mark.parametrize("where", ["train", "validation"])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.arange(40) % 4, r"labels range from 0 to 3; the model has 3 classes"),
        (torch.arange(40)[:, None] % 3, r"labels of shape \(40, 1\) do not fit outputs of shape \(40, 3\)"),
        ({"a": torch.arange(40) % 3}, r"labels by the names 'a', where one output is supervised"),
        (torch.arange(120).reshape(40, 3), r"labels of shape .*truth values.*labels\.float\(\)"),
    ],
)
def test_labels_that_do_not_fit_are_named_by_data_and_batch(where: str, labels: Any, message: str) -> None:
    x, fitting = samples(40), torch.arange(40) % 3
    data = {"train": [(x, fitting)] * 2, "validation": [(x, fitting)] * 2}
    data[where] = (
        [(x, fitting), (samples(40, 1), labels)] if isinstance(labels, Tensor) else [(x, labels)] * 2
    )
    model, at = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), int(isinstance(labels, Tensor))
    kind = r"labels(\['a'\])?: (not there|integers)" if where == "validation" and not at else message
    with pytest.raises(DataError, match=f"^batch {at} of {where}_data: .*{kind}"):
        fxinvert.post_train(model, data["train"], validation_data=data["validation"], sweeps=1)


def test_a_batch_that_the_model_does_not_run_on_is_named() -> None:
    index, y = torch.arange(40) % 5, torch.arange(40) % 3
    unknown = torch.where(torch.arange(40) == 7, 5, index)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    with pytest.raises(
        DataError, match=r"^batch 1 of train_data: the model does not run on these inputs: index out of range"
    ):
        fxinvert.post_train(model, [(index, y), (unknown, y)], validation_data=[(index, y)], sweeps=1)


def test_labels_that_do_not_fit_are_named_by_output() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(12, 3), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            flat = x.flatten(1)
            return {"first": self.first(flat), "second": self.second(flat)}

    y = torch.arange(40)
    data = [(samples(40), {"first": y % 3, "second": y % 3})]
    with pytest.raises(DataError, match=r"^batch 0 of train_data, output 'second': labels range from 0 to 2"):
        fxinvert.post_train(Two(), data, output=("first", "second"), sweeps=1)


def test_labels_that_ask_for_nothing_are_refused() -> None:
    x, y, model = samples(60), torch.arange(60) % 3, nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    nothing, aside = torch.full_like(y, -100), torch.where(kept_aside(x), -100, y)
    for train, validation, message in (
        ((x, nothing), None, "train_data: all labels are -100"),
        ((x, nothing), (x, y), "train_data: all labels are -100"),
        ((x, y), (x, nothing), "validation_data: all labels are -100"),
        ((x, aside), None, "samples that steps are judged by are -100.*validation_data"),
    ):
        with pytest.raises(DataError, match=message):
            fxinvert.post_train(model, train, validation_data=validation, sweeps=1)
    rest = torch.where(kept_aside(x), y, -100)
    assert fxinvert.post_train(model, [(x, y), (x, rest)], sweeps=1).final.accuracy is not None


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ((samples(4), np.array(["a", "b", "a", "b"])), "labels is an array of <U1"),
        ((samples(4).numpy().astype(object), torch.arange(4)), "input 0 is an array of object"),
        (
            (samples(4).to_sparse(), torch.arange(4)),
            r"input 0 is of layout torch.sparse_coo; .*to_dense\(\)",
        ),
        ((samples(4), samples(4), torch.arange(4)), "is tuple of 3; a pair"),
        ({"ids": samples(4), "answer": torch.arange(4)}, "is dict with ids, answer; a pair"),
        (
            {"x": samples(4), "label": torch.arange(4), "labels": torch.arange(4)},
            "with x, label, labels; a pair",
        ),
        (((), torch.arange(4)), "has no inputs, only labels"),
        ({"labels": torch.arange(4)}, "has no inputs, only labels"),
    ],
)
def test_what_is_no_batch_is_told(pair: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(Batches([pair], CPU))


def test_what_numpy_makes_arrays_of_are_arrays() -> None:
    class Frame:  # a data frame iterates over the names of its columns
        def __init__(self, values: Any) -> None:
            self.values = values

        def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
            return np.asarray(self.values, dtype)

        def __iter__(self) -> Iterator[str]:
            return iter(["a", "b"])

    x = samples(300)
    found = list(Batches((Frame(x.numpy()), Frame(np.arange(300))), CPU))
    assert torch.equal(torch.cat([tree_leaves(batch.inputs)[0] for batch in found]), x)
    assert torch.equal(torch.cat([batch.labels for batch in found]), torch.arange(300))
    ((inputs, labels),) = Batches([(x.numpy()[:, ::-1], np.arange(300).astype(">i4"))], CPU)
    assert torch.equal(tree_leaves(inputs)[0], x.flip(1))
    assert torch.equal(labels, torch.arange(300, dtype=torch.int32))
    with pytest.raises(DataError, match="input 0 is an array of object"):
        list(Batches((Frame([["a", None]]), Frame([1])), CPU))


def test_inputs_by_name_may_be_any_mapping() -> None:
    ((inputs, _),) = Batches([(UserDict(x=samples(4)), torch.arange(4))], CPU)
    assert isinstance(inputs, dict)
    assert [*inputs] == ["x"]


@pytest.mark.parametrize("name", ["labels", "label"])
def test_labels_may_be_among_the_inputs_by_name(name: str) -> None:
    """As in the batches of the transformers library."""
    rows = [{"x": x, name: y} for x, y in zip(samples(6), torch.arange(6), strict=True)]
    (batch,) = Batches(DataLoader(rows, 6), CPU)  # type: ignore[arg-type]
    assert isinstance(batch.inputs, dict)
    assert [*batch.inputs] == ["x"]
    assert torch.equal(batch.inputs["x"], samples(6))
    assert torch.equal(batch.labels, torch.arange(6))
    (whole,) = Batches({"x": samples(6), name: torch.arange(6)}, CPU)
    assert torch.equal(tree_leaves(whole.inputs)[0], samples(6))


class Once:
    """A loader that gives its batches only the first time."""

    def __init__(self) -> None:
        self.left = [(samples(4), torch.zeros(4, dtype=torch.int64))]

    def __iter__(self) -> Iterator[Any]:
        left, self.left = self.left, []
        return iter(left)


def test_a_loader_that_gives_nothing_the_second_time_is_refused() -> None:
    batches = Batches(Once(), CPU)
    assert len(list(batches)) == 1
    with pytest.raises(DataError, match="only once"):
        list(batches)


def test_a_generator_is_refused_at_once() -> None:
    with pytest.raises(DataError, match=r"only once.*generator.*DataLoader"):
        Batches((pair for pair in [(samples(2), torch.zeros(2))]), CPU)


def test_labels_of_several_rows_for_a_sample_are_cut_into_samples() -> None:
    labels = torch.arange(6.0)
    (batch,) = Batches([(samples(3), labels)], CPU)
    assert torch.equal(batch.labels, labels.view(3, 2))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "no batches"),
        (7, "iterable of"),
        ({"x": samples(3)}, "train_data is dict with x; a pair .* with the labels as 'labels'"),
        ([samples(3)], "pair"),
        ([(samples(3), [0, 1, 2])], r"labels\[0\] is int; a tensor is needed"),
        ([(samples(3), torch.zeros(2))], "same number of samples"),
        ([(samples(3), torch.tensor(1.0))], "same number of samples; .* DataLoader"),
        ([(samples(3), torch.zeros(7))], "same number of samples"),
        ([(samples(3)[0], 1)], "labels is int; a tensor is needed.* DataLoader"),
        ((samples(3), [0, 1, 2]), r"train_data: labels\[0\] is int; a tensor is needed"),
        (
            [(samples(3), torch.zeros(3)), (samples(0), torch.zeros(0))],
            "batch 1 of train_data has no samples",
        ),
        ("data.npz", "train_data is str; .* read from that file"),
        (
            [(samples(3), torch.zeros(3)), (samples(3) / 0, torch.zeros(3))],
            "batch 1 of train_data: input 0 has NaN",
        ),
        ([(samples(2), torch.tensor([0.0, float("nan")]))], "labels has NaN .* first in sample 1"),
    ],
)
def test_bad_data_is_refused_with_the_place(source: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(Batches(source, CPU))
