"""Sizes that are computed from data, and views of values that lie in memory in several ways."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxinvert

X = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))


class Experts(nn.Module):
    """Every sample goes to one of three experts, which take theirs one after the other: how many is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.leave = nn.Linear(5, 3), nn.Linear(4, 2)
        self.experts = nn.ModuleList(nn.Linear(5, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(1)
        order = chosen.argsort()
        counts = F.one_hot(chosen, 3).sum(0).tolist()
        parts = [f(part) for f, part in zip(self.experts, torch.split(x[order], counts), strict=True)]
        mixed = torch.zeros_like(x[:, :4]).index_add(0, order, torch.cat(parts))
        result: Tensor = self.leave(torch.tanh(mixed))
        return result


class Attends(nn.Module):
    """What attention gives lies in memory as this view wants it, but only in the kernel that is not differentiated."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.leave = nn.Linear(4, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.mix(torch.stack([x[:, :4], x[:, 1:]], 1)).view(-1, 2, 3, 2, 2)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind()
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        result: Tensor = self.leave(torch.cat([mixed.view(-1, 8), x[:, :4].tanh()], 1))
        return result


def trained(model: nn.Module) -> None:
    """The graph computes what the model computes, of any batch, and training works."""
    graph = fxinvert.trace(model, X[:4])
    for batch in (X[:3], X[30:]):
        torch.testing.assert_close(graph(batch), model(batch))
    target = torch.tanh(X @ torch.randn(5, 2, generator=torch.Generator().manual_seed(1)))
    result = fxinvert.post_train(model, (X, target), sweeps=1, confidence=0.5)
    assert result.final.loss < result.baseline.loss


def test_parts_whose_sizes_are_computed_follow_the_data() -> None:
    torch.manual_seed(0)
    model = Experts()
    assert "captured" in fxinvert.trace(model, X[:4]).meta
    trained(model)


def test_views_do_not_ask_how_a_value_lies_in_memory() -> None:
    torch.manual_seed(0)
    trained(Attends())


def test_rows_that_a_mask_picks_are_no_samples_even_if_it_picks_all_of_the_example() -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.inner, self.leave = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x, kept = torch.tanh(self.enter(x)), x[:, 0] > -1
            x = x.index_put((kept,), torch.tanh(self.inner(x[kept])))
            result: Tensor = self.leave(x)
            return result

    torch.manual_seed(0)
    model = Picks()
    graph = fxinvert.trace(model, X[X[:, 0] > -1][:4])
    rows = {n.meta["path"]: n.meta["rows"] for n in graph.graph.nodes if n.op != "output"}
    assert (rows["enter"], rows["inner"], rows["leave"]) == (1, 0, 1)
    assert [s.trained for s in fxinvert.partition(graph).segments] == [("enter",), ("leave",)]
    trained(model)
