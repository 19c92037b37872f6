"""Every spelling of an op ends as the same ATen call, with the same arguments, under the key of one rule."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from spellings import Spellings, Written, arithmetic, elementwise, moves, several_meanings
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

import fxinvert
from fxinvert.passes import meanings
from fxinvert.passes.leaves import copied
from fxinvert.passes.spelling import to_aten


def written(spellings: Spellings, way: Any) -> nn.Module:
    return way if isinstance(way, nn.Module) else Written(way, spellings.tensors)


def layer(kind: type[nn.Module], tensors: tuple[Tensor, ...], *args: Any, **options: Any) -> nn.Module:
    """One of torch's layers with given parameters."""
    made = kind(*args, **options)
    made.load_state_dict(dict(zip(("weight", "bias"), tensors, strict=False)))
    return made


def layers() -> Iterator[Spellings]:
    dense = (torch.randn(4, 3), torch.randn(4))
    yield Spellings("linear", (2, 3), [
        layer(nn.Linear, dense, 3, 4), F.linear, torch.ops.aten.linear, lambda x, w, b: F.linear(input=x, weight=w, bias=b),
        lambda x, w, b: F.linear(x, bias=b, weight=w),
    ], dense)  # fmt: skip
    yield Spellings(
        "linear",
        (2, 5, 3),
        [layer(nn.Linear, dense[:1], 3, 4, bias=False), F.linear, lambda x, w: F.linear(x, w, None)],
        dense[:1],
    )
    yield Spellings("linear", (5, 3), [
        F.linear, lambda x, w: x @ w.T, lambda x, w: x.matmul(w.mT), lambda x, w: torch.mm(x, w.t()),
        lambda x, w: x @ w.transpose(0, 1), lambda x, w: x @ w.permute(1, 0), lambda x, w: x @ torch.ops.aten.numpy_T(w),
    ], dense[:1])  # fmt: skip
    for d in (1, 2, 3):
        kernel, shape = (torch.randn(4, 2, *[3] * d), torch.randn(4)), (2, 2, *[5] * d)
        module: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[d - 1]
        ways = [getattr(place, f"conv{d}d") for place in (F, torch, torch.ops.aten)]
        yield Spellings(f"conv{d}d", shape, [layer(module, kernel, 2, 4, 3), *ways], kernel)
        options: dict[str, Any] = {"stride": 2, "padding": 1, "dilation": 2}
        strided = [layer(module, kernel, 2, 4, 3, **options), *(_with(way, **options) for way in ways[:2])]
        yield Spellings(
            f"conv{d}d",
            shape,
            [*strided, _with(ways[0], **{k: (v,) * d for k, v in options.items()})],
            kernel,
        )
        same = [
            layer(module, kernel[:1], 2, 4, 3, padding="same", bias=False),
            _with(ways[0], padding="same"),
        ]
        yield Spellings(f"conv{d}d", shape, same, kernel[:1])
        yield from pools(d)


def pools(d: int) -> Iterator[Spellings]:
    shape, functions = (
        (2, 3, *[6] * d),
        {name: getattr(F, f"{name}{d}d") for name in ("max_pool", "avg_pool", "adaptive_avg_pool")},
    )
    most: Any = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[d - 1]
    mean: Any = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[d - 1]
    adaptive: Any = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[d - 1]
    for key, module in (("max_pool", most), ("avg_pool", mean)):
        pool, op = functions[key], f"{key}{d}d"
        direct = getattr(torch.ops.aten, op)
        yield Spellings(
            op,
            shape,
            [
                module(2),
                _with(pool, kernel_size=2),
                lambda x, f=pool: f(x, (2,) * d, 2),
                lambda x, f=direct: f(x, [2] * d),
            ],
        )
        options = {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}
        yield Spellings(
            op,
            shape,
            [
                module(**options),
                _with(pool, **options),
                lambda x, f=pool: f(x, 3, 2, padding=(1,) * d, ceil_mode=True),
            ],
        )
    pool, op = functions["adaptive_avg_pool"], f"adaptive_avg_pool{d}d"
    yield Spellings(op, shape, [adaptive(2), _with(pool, output_size=2), lambda x: pool(x, (2,) * d)])


def _with(function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    return lambda *args: function(*args, **options)


class Normalized(nn.Module):
    """Batch norm spelled as a function, on the layer's own statistics."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm
        return F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, self.training, 0.1, n.eps)


def normalization() -> Iterator[Spellings]:
    norm = nn.BatchNorm2d(3)
    norm.running_mean, norm.running_var = torch.randn(3), torch.rand(3) + 0.5
    yield Spellings("batch_norm", (2, 3, 2, 2), [norm, nn.Sequential(norm), Normalized(norm)])


TABLE = [
    s
    for family in (elementwise, moves, arithmetic, several_meanings, layers, normalization)
    for s in family()
]


def calls(graph: fx.GraphModule) -> list[tuple[Any, ...]]:
    """What a graph computes, free of names: (target, key, arguments), parameters by value."""

    def shown(node: fx.Node) -> Any:
        if node.op != "get_attr":
            return node.op
        value: Tensor = operator.attrgetter(str(node.target))(graph)
        return value.flatten().tolist()

    return [
        (n.op, n.target, n.meta["op"], *fx.node.map_arg((n.args, n.kwargs), shown))
        for n in graph.graph.nodes
        if n.meta.get("active") and n.op != "placeholder"
    ]


@pytest.mark.parametrize("spellings", TABLE, ids=lambda s: f"{s.op}-{'x'.join(map(str, s.shape))}")
def test_all_spellings_end_as_one_call(spellings: Spellings) -> None:
    x = torch.rand(spellings.shape) * 2 - 0.7
    forms = []
    for way in spellings.ways:
        model = written(spellings, way).eval()
        given = x.clone()
        graph = fxinvert.trace(model, given)
        assert torch.equal(given, x), "the example was changed"
        assert torch.equal(graph(x.clone()), model(x.clone()))
        forms.append(calls(graph))
    ((_, target, key, *_),) = forms[0]
    assert key == spellings.op
    assert key in fxinvert.default_rules()
    if key != "softsign":  # the one op without an ATen op of its own
        assert isinstance(target, torch._ops.OpOverload)
        assert not target._schema.is_mutable
    for way, form in zip(spellings.ways, forms, strict=True):
        assert form == forms[0], way


@pytest.mark.parametrize("spellings", TABLE, ids=lambda s: f"{s.op}-{'x'.join(map(str, s.shape))}")
def test_every_spelling_can_be_inverted(spellings: Spellings) -> None:
    x = torch.rand(spellings.shape) * 0.5 + 0.1
    for way in spellings.ways[:2]:
        inverse = fxinvert.invert(written(spellings, way), x, output_target="regression")
        rec = inverse(x, inverse.graph(x))
        torch.testing.assert_close(rec.targets[rec.names[0]], x, rtol=0, atol=0)


def test_what_looks_alike_but_is_not_stays_apart() -> None:
    """Functions whose arguments or results differ from those of the ATen op of their name are left alone."""
    x, tokens = torch.rand(2, 3, 6), torch.tensor([[1, 0], [2, 2]])
    weight = torch.randn(4, 3)
    assert not [*to_aten(F.embedding, (tokens, weight), {}, lambda argument: argument)]
    assert [*to_aten(torch.embedding, (weight, tokens), {}, lambda argument: argument)]
    pooled = fxinvert.trace(Written(lambda x: F.adaptive_max_pool1d(x, 2), ()), x)
    assert torch.equal(pooled(x), F.adaptive_max_pool1d(x, 2))
    deepened = fxinvert.trace(Written(torch.atleast_2d, ()), x)  # not a list, as of several tensors
    assert torch.equal(deepened(x), x)
    embedded = fxinvert.trace(Written(lambda t, w: F.embedding(t, w), (weight,)), tokens)
    assert torch.equal(embedded(tokens), F.embedding(tokens, weight))
    quotient = fxinvert.trace(Written(lambda x: 1.5 / (x + 1), ()), x)
    torch.testing.assert_close(quotient(x), 1.5 / (x + 1))
    rounded = fxinvert.trace(Written(lambda x: torch.div(x, 0.3, rounding_mode="floor"), ()), x)
    assert torch.equal(rounded(x), torch.div(x, 0.3, rounding_mode="floor"))


def test_a_result_that_rounds_differently_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums depend on where in memory their operands lie; what is meant does not."""
    monkeypatch.setattr(
        meanings,
        "copied",
        lambda given: tree_map(lambda v: v * (1 + 1e-7) if isinstance(v, Tensor) else v, copied(given)),
    )
    graph = fxinvert.trace(nn.Linear(6, 3), torch.randn(2, 6))
    ((_, target, *_),) = calls(graph)
    assert target is torch.ops.aten.linear.default


@pytest.mark.parametrize(
    ("op", "shape", "size", "function"),
    [
        ("linear", (5, 3), (4, 3), lambda x, w, b: x @ w.T + b),
        ("linear", (2, 5, 3), (4, 3), lambda x, w, b: b + x.matmul(w.mT)),
        ("linear", (2, 5, 3), (4, 3), lambda x, w, b: F.linear(x, w).add_(b)),
        ("addmm", (5, 3), (3, 4), lambda x, w, b: x @ w + b),
        ("addmm", (5, 3), (3, 4), lambda x, w, b: b + torch.mm(x, w)),
    ],
)
def test_a_bias_that_is_added_belongs_to_the_layer(
    op: str, shape: tuple[int, ...], size: tuple[int, ...], function: Any
) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(size)), nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Any:
            return function(x, self.weight, self.bias)

    model, x = Layer().eval(), torch.randn(shape)
    graph = fxinvert.trace(model, x)
    torch.testing.assert_close(graph(x), model(x))
    (node,) = [n for n in graph.graph.nodes if n.op == "call_function"]
    assert node.meta["op"] == op
    (segment,) = fxinvert.partition(graph).segments
    assert set(segment.parameters) == {"weight", "bias"}
