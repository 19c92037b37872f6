"""Models that compute with the batch along the second axis are inverted and trained as those that keep it in front."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxinvert

T, E, HEADS = 5, 8, 2


class Encoder(nn.Module):
    """Torch's own encoder, in either layout."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first
        layer = nn.TransformerEncoderLayer(E, HEADS, 16, batch_first=first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(E, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.encoder(x if self.first else x.transpose(0, 1))
        z: Tensor = self.head(y.mean(1 if self.first else 0))
        return z


class Positions(nn.Module):
    """Positions, a token in front, softmax over positions, the first and the last of them."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.axis = int(first)
        self.positions, self.token = nn.Parameter(torch.randn(T, E)), nn.Parameter(torch.randn(1, 1, E))
        self.mix, self.norm, self.score = nn.Linear(E, E), nn.LayerNorm(E), nn.Linear(E, 1)
        self.head = nn.Linear(3 * E, 3)

    def forward(self, x: Tensor) -> Tensor:
        axis = self.axis
        if not axis:
            x = x.permute(1, 0, 2)
        x = x + self.positions.unsqueeze(1 - axis)
        token = self.token.expand(*((1, x.shape[1]) if not axis else (x.shape[0], 1)), E)
        x = torch.cat([token, x], axis)
        x = self.norm(x + torch.tanh(self.mix(x)))
        pooled = (self.score(x).softmax(axis) * x).sum(axis)
        y: Tensor = self.head(torch.cat([pooled, x.select(axis, 0), x.select(axis, -1)], 1))
        return y


class Fairseq(nn.Module):
    """Attention that puts the heads behind the batch, as fairseq's does."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first
        self.qkv, self.out, self.feed, self.head = (
            nn.Linear(E, 3 * E),
            nn.Linear(E, E),
            nn.Linear(E, E),
            nn.Linear(E, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        batch = len(x)
        if self.first:
            q, k, v = (
                part.reshape(batch, T, HEADS, -1).transpose(1, 2).flatten(0, 1)
                for part in self.qkv(x).chunk(3, -1)
            )
        else:
            x = x.transpose(0, 1)
            q, k, v = (
                part.contiguous().view(T, batch * HEADS, E // HEADS).transpose(0, 1)
                for part in self.qkv(x).chunk(3, -1)
            )
        mixed = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        if self.first:
            mixed = mixed.reshape(batch, HEADS, T, -1).transpose(1, 2).flatten(2)
        else:
            mixed = mixed.transpose(0, 1).contiguous().view(T, batch, E)
        x = x + self.out(mixed)
        x = x + F.relu(self.feed(x))
        y: Tensor = self.head(x[:, 0] if self.first else x[0])
        return y


MODELS: list[Callable[[bool], nn.Module]] = [Encoder, Positions, Fairseq]


def twins(make: Callable[[bool], nn.Module]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    first = make(True).eval()
    behind = make(False).eval()
    behind.load_state_dict(first.state_dict())
    return first, behind


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("samples", [1, 2, T])
def test_the_same_is_trained(make: Callable[[bool], nn.Module], samples: int) -> None:
    x = torch.randn(samples, T, E)
    trained = [
        {
            path
            for segment in fxinvert.partition(fxinvert.trace(model, x)).segments
            for path in segment.trained
        }
        for model in twins(make)
    ]
    assert len(trained[0]) == len(trained[1]) > 3


@pytest.mark.parametrize("make", MODELS)
def test_training_ends_with_the_same_weights(make: Callable[[bool], nn.Module]) -> None:
    first, behind = twins(make)
    x = torch.randn(160, T, E)
    labels = x.mean(1)[:, :3].argmax(1)
    expected, found = (
        fxinvert.post_train(
            model, [(x[40:], labels[40:])], validation_data=[(x[:40], labels[:40])], sweeps=1, progress=False
        )
        for model in (first, behind)
    )
    assert found.final.loss < found.baseline.loss
    assert found.final.loss == pytest.approx(expected.final.loss, rel=1e-3)
    state = found.model.state_dict()
    for name, value in expected.model.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-2, atol=1e-3)


def test_targets_have_the_batch_in_front() -> None:
    first, behind = twins(Encoder)
    x, labels = torch.randn(4, T, E), torch.arange(4) % 3
    inverses = (
        fxinvert.invert(fxinvert.trace(model, x), output_target="margin", reconstruction="linearized")
        for model in (first, behind)
    )
    expected, found = (inverse(x, labels) for inverse in inverses)
    for name in ("encoder.linear_2", "encoder"):
        assert found.targets[name].shape[:2] == (4, T)
        torch.testing.assert_close(found.targets[name], expected.targets[name], rtol=1e-4, atol=1e-5)


def test_what_treats_positions_otherwise_than_samples_stays_where_it_is() -> None:
    class Running(nn.Module):
        """Sums over positions, by an op that names the axis otherwise than by `dim`."""

        def __init__(self) -> None:
            super().__init__()
            self.before, self.after, self.head = nn.Linear(E, E), nn.Linear(E, E), nn.Linear(E, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.before(x.transpose(0, 1)).flip([0])
            y = y.reshape(T * len(x), E).reshape(T, len(x), E)
            z: Tensor = self.head(self.after(y).relu()[0])
            return z

    model, x = Running(), torch.randn(3, T, E)
    graph = fxinvert.trace(model, x)
    assert torch.allclose(graph(torch.cat([x, x])), model(torch.cat([x, x])))
    assert {p for s in fxinvert.partition(graph).segments for p in s.trained} == {"before", "after", "head"}
