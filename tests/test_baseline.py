"""AdamW for a time: it learns, it keeps to its time, and it leaves everything else as it was."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fxinvert.errors import DataError
from fxinvert.training.baseline import ShuffledBatches, adamw_for

Batches = list[tuple[Tensor, Tensor]]


def blobs() -> Batches:
    x = torch.randn(64, 4)
    return [(x, (x[:, 0] > 0).long())]


def test_it_learns_and_leaves_the_model() -> None:
    model, data = nn.Linear(4, 2), blobs()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    run = adamw_for(model, data, 0.5, 0.1, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert run.steps > 10
    assert run.seconds >= 0.5
    assert not run.model.training
    assert model.training
    x, y = data[0]
    assert (run.model(x).argmax(1) == y).float().mean() > 0.95


def test_no_time_is_no_step() -> None:
    model = nn.Linear(4, 2)
    run = adamw_for(model, blobs(), 0.0, 0.1, seed=0)
    assert run.steps == 0
    assert torch.equal(run.model.get_parameter("weight"), model.weight)


def test_numbers_are_fitted() -> None:
    x = torch.randn(64, 4)
    run = adamw_for(nn.Linear(4, 1), [(x, x[:, :1])], 0.3, 0.1, seed=0)
    assert (run.model(x) - x[:, :1]).square().mean() < 0.1


def test_no_batches() -> None:
    with pytest.raises(DataError, match="no batches"):
        adamw_for(nn.Linear(4, 2), [], 0.1, 0.1, seed=0)


def test_shuffled_batches_hold_every_sample_once() -> None:
    data = ShuffledBatches(torch.arange(10.0)[:, None], torch.arange(10), batch_size=4)
    first, second = (torch.cat([y for _, y in data]).tolist() for _ in range(2))
    assert first != second
    assert sorted(first) == sorted(second) == list(range(10))
