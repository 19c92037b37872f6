"""Trace: the graph computes what the model computes, the model is left as it was, and what cannot be is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import Model, Network, Optional, Variadic, used
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import fxinvert
import fxinvert.models as zoo
from fxinvert.errors import TraceError


def named(graph: fx.GraphModule, path: str) -> fx.Node:
    node: fx.Node
    (node,) = [n for n in graph.graph.nodes if n.meta.get("path") == path]
    return node


# --- the graph is the model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_graph_reproduces_the_model_for_any_batch(dtype: torch.dtype, batch: int) -> None:
    model = used(Network()).eval().to(dtype)
    graph = fxinvert.trace(model, torch.randn(batch, 2, 6, 6, dtype=dtype))
    for size in (1, 2, 7):
        x = torch.randn(size, 2, 6, 6, dtype=dtype)
        assert torch.equal(graph(x), model(x))


@pytest.mark.parametrize("name", ["digits_cnn", "digits_mlp"])
def test_the_reference_networks_keep_their_names(name: str) -> None:
    model, x = zoo.load(name), zoo.digits().x_test[:5]
    graph = fxinvert.trace(model, x)
    assert torch.equal(graph(x), model(x))
    paths = [n.meta["path"] for n in graph.graph.nodes if n.meta.get("active")]
    assert paths == ["images", *(path for path, _ in model.named_children())]
    assert "torch.ops.aten.linear.default(flatten, fc1_weight, fc1_bias)" in graph.code
    if name == "digits_cnn":
        assert "torch.ops.aten.conv2d.default(images, conv1_weight, conv1_bias)" in graph.code


def test_paths_parameters_and_shapes() -> None:
    model = Network().eval()
    graph = fxinvert.trace(model, torch.randn(3, 2, 6, 6))
    paths = [n.meta["path"] for n in graph.graph.nodes if n.meta.get("active")]
    assert paths == [
        "images", "stem.0", "stem.1", "stem.2", "blocks.0.0", "blocks.0.1", "act", "blocks.1.0", "blocks.1.1", "act@2",
        "mul", "add", "max_pool2d", "head.pool", "view", "head.fc",
    ]  # fmt: skip
    for node in graph.graph.nodes:
        if node.op == "output" or node.meta.get("op") == "size":
            continue
        assert node.meta["tensor_meta"].dtype == torch.float32
        assert node.name.isidentifier()
    shapes = {
        n.meta["path"]: tuple(n.meta["tensor_meta"].shape) for n in graph.graph.nodes if n.meta.get("active")
    }
    assert shapes["stem.1"] == (3, 4, 6, 6)
    assert shapes["max_pool2d"] == (3, 4, 3, 3)
    assert shapes["head.fc"] == (3, 3)
    assert named(graph, "stem.1").meta["op"] == "batch_norm"
    read = [str(n.target) for n in graph.graph.find_nodes(op="get_attr")]
    expected = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    assert set(read) == expected - {"stem.1.num_batches_tracked"}
    for name in read:
        own = model.get_parameter(name) if name in dict(model.named_parameters()) else model.get_buffer(name)
        assert getattr(graph.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) is own


def test_what_is_computed_from_parameters_and_buffers_follows_them() -> None:
    model = Model(
        lambda self, x: x * self.p.exp() + self.b * 2, p=nn.Parameter(torch.randn(3)), b=torch.randn(3)
    )
    x = torch.randn(2, 3)
    graph = fxinvert.trace(model, x)
    with torch.no_grad():
        model.get_parameter("p").add_(1)
        model.get_buffer("b").add_(1)
    assert torch.equal(graph(x), model(x))
    assert set(vars(model)["_buffers"]) == {"b"}


def test_sizes_are_joined_with_numbers() -> None:
    model = Model(lambda self, x: x.view(x.size()[:-1] + torch.Size([2, 3])).tanh().view((*x.size()[:2], 6)))
    graph, x = fxinvert.trace(model, torch.randn(2, 5, 6)), torch.randn(3, 5, 6)
    assert torch.equal(graph(x), model(x))


@pytest.mark.parametrize("name", ["max", "sort", "median"])
def test_fields_of_results_are_read_by_name(name: str) -> None:
    model = Model(lambda self, x: getattr(torch, name)(x, dim=2).values)
    graph, x = fxinvert.trace(model, torch.randn(2, 5, 4)), torch.randn(3, 5, 4)
    assert torch.equal(graph(x), model(x))
    assert [n.meta["op"] for n in graph.graph.nodes if n.op == "call_function"] == [name, "getitem"]


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_layers_take_their_first_state_from_the_model(
    kind: type[nn.RNN | nn.GRU | nn.LSTM],
) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        state = self.first(x[:, 0])[None]
        outputs: Tensor = self.layer(x, (state, state) if kind is nn.LSTM else state)[0]
        return outputs

    model = Model(forward, layer=kind(3, 4, batch_first=True), first=nn.Linear(3, 4))
    graph, x = fxinvert.trace(model, torch.randn(2, 5, 3)), torch.randn(3, 5, 3)
    torch.testing.assert_close(graph(x), model(x))
    assert "first" in fxinvert.invert(graph, output_target="regression")(x, model(x).detach()).targets


def test_a_tied_parameter_has_one_name() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    graph = fxinvert.trace(model, torch.randn(2, 3))
    assert [str(n.target) for n in graph.graph.find_nodes(op="get_attr")] == [
        "0.weight",
        "0.bias",
        "0.weight",
        "2.bias",
    ]


def test_no_two_ops_have_the_same_path() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.mul * F.relu(x)
        x = self.relu(F.relu(self.relu(x)))
        return x.view(-1, 4).relu()

    model = Model(
        forward,
        relu=nn.Sequential(nn.Conv1d(4, 4, 1, padding_mode="circular")),
        mul=nn.Parameter(torch.ones(1)),
    )
    graph = fxinvert.trace(model, torch.randn(1, 4, 4))
    paths = [n.meta["path"] for n in graph.graph.nodes if n.meta.get("active")]
    assert len(set(paths)) == len(paths)
    assert {"relu.0", "relu.0@2", "relu", "relu_1"} <= set(paths) or {"relu.0", "relu.0@2"} <= set(paths)
    assert "mul" not in paths, "the parameter's name"


def test_parametrized_and_pruned_weights_are_followed() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    nn.utils.parametrizations.weight_norm(model[0])
    prune.l1_unstructured(model[1], "weight", 0.5)  # type: ignore[no-untyped-call]
    graph = fxinvert.trace(model, torch.randn(2, 3))
    x = torch.randn(5, 3)
    assert torch.equal(graph(x), model(x))
    assert isinstance(model[1].weight, Tensor)


def test_attention_is_taken_apart() -> None:
    model = Model(
        lambda self, x: self.attention(x, x, x, need_weights=False)[0],
        attention=nn.MultiheadAttention(4, 2, batch_first=True),
    )
    x = torch.randn(2, 3, 4)
    graph = fxinvert.trace(model, x)
    torch.testing.assert_close(graph(x), model.eval()(x))
    kinds = [node.meta.get("op", "") for node in graph.graph.nodes]
    assert kinds.count("linear") == 2
    assert "scaled_dot_product_attention" in kinds


@pytest.mark.parametrize(
    "model", [nn.BatchNorm1d(3), nn.Linear(3, 2), nn.Identity(), nn.MultiheadAttention(4, 2)]
)
def test_a_single_layer_is_a_model(model: nn.Module) -> None:
    if isinstance(model, nn.MultiheadAttention):
        x = torch.randn(2, 3, 4)
        with pytest.raises(TraceError, match="needs an input 'key'"):
            fxinvert.trace(model, x)
        return
    x = torch.randn(2, 3)
    assert torch.equal(fxinvert.trace(model, x)(x), model.eval()(x))


# --- the model is left as it was ----------------------------------------------------------------------------


def test_the_model_is_left_as_it_was_found() -> None:
    model = used(Network())
    model.train()
    model.get_submodule("blocks.1").eval()
    model.get_parameter("head.fc.weight").requires_grad_(False)
    x = torch.randn(3, 2, 6, 6)
    modes = [module.training for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    state, given = copy.deepcopy(model.state_dict()), x.clone()
    gradients = [p.requires_grad for p in model.parameters()]
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    graph = fxinvert.trace(model, x)
    assert torch.equal(torch.rand(1), expected), "random numbers were drawn"
    assert [module.training for module in model.modules()] == modes
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert [p.requires_grad for p in model.parameters()] == gradients
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(x, given)
    assert all(p.grad is None for p in model.parameters())
    assert not graph.training
    assert torch.equal(graph(x), copy.deepcopy(model).eval()(x)), (
        "the graph evaluates whatever the model's mode"
    )


def test_a_model_that_draws_random_numbers_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    with pytest.raises(TraceError, match="the model is random"):
        fxinvert.trace(Model(lambda self, x: F.dropout(x)), torch.randn(4, 3, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_forward_leaves_on_the_model_is_undone() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.features = self.fc(x)
        self.cache["last"] = x
        self.calls.add_(1) if not isinstance(x, fx.Proxy) else None
        features: Tensor = self.features.relu()
        return features

    model = Model(forward, fc=nn.Linear(3, 2), cache={}, calls=torch.zeros(1))
    fxinvert.trace(model, torch.randn(2, 3))
    assert not hasattr(model, "features")
    assert model.cache == {}
    assert float(model.get_buffer("calls")) == 0
    model(torch.randn(2, 3))
    assert isinstance(model.features, Tensor)


class Noisy(nn.Module):
    """Random while training, and kept whole by a rule of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        assert not isinstance(x, fx.Proxy), "looked inside"
        result: Tensor = self.inner(x) * self.gain
        return result


def test_modules_that_stay_whole_evaluate_and_share_their_parameters() -> None:
    rules = fxinvert.default_rules().extend({Noisy: lambda op, target: target})
    noisy = Noisy()
    model = nn.Sequential(nn.Linear(3, 3), noisy)
    x, mean = torch.randn(4, 3), noisy.get_buffer("inner.0.running_mean")
    graph = fxinvert.trace(model, x, rules=rules)
    before = graph(x)
    model.train()
    assert torch.equal(graph(x), before)
    assert not bool(mean.any())
    assert all(module.training for module in model.modules())
    with torch.no_grad():
        noisy.gain.fill_(2.0)
        mean.fill_(0.5)
    assert torch.equal(graph(x), copy.deepcopy(model).eval()(x))


# --- graphs, inputs, outputs --------------------------------------------------------------------------------


def test_a_traced_graph_is_taken() -> None:
    model, x = used(Network()).eval(), torch.randn(2, 2, 6, 6)
    raw = fx.symbolic_trace(model)
    text = str(raw.graph)
    graph = fxinvert.trace(raw, x)
    assert str(raw.graph) == text
    assert torch.equal(graph(x), model(x))
    assert graph.code == fxinvert.trace(model, x).code
    assert fxinvert.trace(graph, x) is graph
    again = fxinvert.trace(copy.deepcopy(graph), x)
    assert [n.meta.get("path") for n in again.graph.nodes] == [n.meta.get("path") for n in graph.graph.nodes]


def test_inputs_with_defaults_and_any_number_of_inputs() -> None:
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(fxinvert.trace(Optional(), x)(x), 2 * x)
    assert torch.equal(fxinvert.trace(Optional(), (x, y))(x, y), 2 * (x + y))
    assert torch.equal(fxinvert.trace(Variadic(), (x, y))(x, y), x - y)
    raw = fx.symbolic_trace(Model(lambda self, x: x + self.b, b=torch.ones(3)))
    assert torch.equal(fxinvert.trace(raw, x)(x), x + 1)


@pytest.mark.parametrize(
    ("function", "output", "expected"),
    [
        (lambda self, x: (x + 1, x * 2), 1, lambda x: x * 2),
        (lambda self, x: [x + 1, x * 2], 0, lambda x: x + 1),
        (lambda self, x: {"a": x + 1, "b": x * 2}, "b", lambda x: x * 2),
        (lambda self, x: {"a": x + 1, "size": x.shape}, None, lambda x: x + 1),
        (lambda self, x: (x * 2,), None, lambda x: x * 2),
        (lambda self, x: x.chunk(3, 1), 2, lambda x: x[:, 2:]),
        (lambda self, x: x.max(1), 0, lambda x: x.amax(1)),
        (lambda self, x: x + 1, 0, lambda x: x + 1),
        (lambda self, x: (x + 1, (x, x * 2)), None, lambda x: x + 1),
        (lambda self, x: (x + 1, (x, x * 2)), "1.1", lambda x: x * 2),
        (lambda self, x: (x + 1, (x, x * 2)), 2, lambda x: x * 2),
        (lambda self, x: {"maps": [x * 2], "states": None}, None, lambda x: x * 2),
        (lambda self, x: {"maps": [x, {"last": x * 2}]}, "maps.1.last", lambda x: x * 2),
    ],
)
def test_one_output_is_picked(
    function: Callable[..., Any], output: int | str | None, expected: Callable[[Tensor], Tensor]
) -> None:
    x = torch.randn(2, 3)
    assert torch.equal(fxinvert.trace(Model(function), x, output=output)(x), expected(x))


@pytest.mark.parametrize(
    ("function", "output", "message"),
    [
        (lambda self, x: (x + 1, x * 2), None, r"returns 2 outputs \(0, 1\).*output=0"),
        (
            lambda self, x: {"logits": x, "extra": x * 2},
            None,
            r"returns 2 outputs \('logits', 'extra'\).*output='logits'",
        ),
        (lambda self, x: (x + 1, x * 2), 2, r"no output 2; it returns 0, 1"),
        (lambda self, x: {"a": x, "b": (x, x)}, "b", r"no output 'b'; it returns 'a', 'b.0', 'b.1'"),
        (lambda self, x: {"a": x, "b": x}, "c", r"no output 'c'; it returns 'a', 'b'"),
        (lambda self, x: x + 1, "logits", r"no output 'logits'; it returns a single tensor"),
        (lambda self, x: x.shape, None, r"returns Size; a tensor"),
        (lambda self, x: None, None, r"returns NoneType; a tensor"),
    ],
)
def test_outputs_that_are_not_clear_are_refused(
    function: Callable[..., Any], output: int | str | None, message: str
) -> None:
    with pytest.raises(TraceError, match=message):
        fxinvert.trace(Model(function), torch.randn(2, 3), output=output)
