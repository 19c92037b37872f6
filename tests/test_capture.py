"""Capture: any model, by symbolic tracing or `torch.export`, comes out as the same kind of graph."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from small_models import Model
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxinvert
from fxinvert.errors import CutError, NoRuleError, TraceError

X = torch.linspace(-1, 1, 18).reshape(3, 6)


def branching(self: Any, x: Tensor) -> Tensor:
    """Symbolic tracing cannot follow it: it branches on a size."""
    y = self.first(x)
    if y.shape[-1] == 6:
        y = torch.relu(y)
    result: Tensor = self.last(y)
    return result


def exported(function: Callable[..., Any] = branching, **parts: Any) -> Model:
    return Model(function, **(parts or {"first": nn.Linear(6, 6), "last": nn.Linear(6, 4)}))


def active(graph: fx.GraphModule) -> list[str]:
    return [n.meta["path"] for n in graph.graph.nodes if n.meta.get("active")]


def keys(graph: fx.GraphModule) -> list[str]:
    return [n.meta["op"] for n in graph.graph.nodes if n.meta.get("active") and "op" in n.meta]


def inverted(graph: fx.GraphModule, *inputs: Tensor) -> fxinvert.Reconstruction:
    """The reconstruction for the output that the model gives anyway: every target is its anchor."""
    inverse = fxinvert.invert(graph, output_target="regression")
    rec = inverse(inputs if len(inputs) > 1 else inputs[0], graph(*inputs))
    for name in rec.names:
        torch.testing.assert_close(rec.targets[name], rec.anchors[name])
    return rec


# --- two ways, one graph ------------------------------------------------------------------------------------


def test_hooks_that_a_first_run_registers_are_registered_once() -> None:
    """As those by which transformers' models collect what their layers give."""

    class Collecting(nn.Module):
        hooked = False

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
            self.last = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            if not self.hooked:
                for layer in self.layers:
                    layer.register_forward_hook(lambda module, args, output: self.found.append(output))
                self.hooked = True
            self.found: list[Tensor] = []
            for layer in self.layers:
                x = layer(x).tanh()
            result: Tensor = self.last(torch.cat(self.found, 1))
            return result

    model, x = Collecting(), torch.randn(5, 4)
    graph = fxinvert.trace(model, x)
    assert not any(layer._forward_hooks for layer in model.layers)
    torch.testing.assert_close(graph(x), model(x))
    torch.testing.assert_close(fxinvert.trace(model, x)(x), model(x))


def test_what_cannot_be_followed_is_exported_and_the_reason_recorded() -> None:
    model = exported()
    graph = fxinvert.trace(model, X)
    assert "torch.export, because Model cannot be traced symbolically" in graph.meta["captured"]
    assert active(graph) == ["x", "first", "relu", "last"]
    for batch in (1, 5):
        x = torch.randn(batch, 6)
        torch.testing.assert_close(graph(x), model(x))
    assert inverted(graph, X).names == ["x", "first", "relu", "last"]
    assert [s.trained for s in fxinvert.partition(graph).segments] == [("first",), ("last",)]


def test_symbolic_tracing_comes_first() -> None:
    assert "captured" not in fxinvert.trace(nn.Sequential(nn.Linear(6, 4)), X).meta


def test_both_ways_give_the_same_names_and_share_the_parameters() -> None:
    first, last = nn.Linear(6, 6), nn.Linear(6, 4)
    plain = Model(lambda self, x: self.last(torch.relu(self.first(x))), first=first, last=last)
    one, two = (fxinvert.trace(model, X) for model in (plain, exported(first=first, last=last)))
    assert active(one) == active(two)
    assert keys(one) == keys(two)
    names = ["first.weight", "first.bias", "last.weight", "last.bias"]
    for graph in (one, two):
        assert sorted(dict(graph.named_parameters())) == sorted(names)
        assert graph.get_parameter("first.weight") is first.weight


def test_ready_graphs_and_exported_programs_are_taken() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (X,), dynamic_shapes=({0: batch},), strict=False)
    for ready in (fx.symbolic_trace(model), program):
        graph = fxinvert.trace(ready, X)
        torch.testing.assert_close(graph(X), model(X))
        assert keys(graph) == ["linear", "relu", "linear"]
        inverted(graph, X)


def test_ready_graphs_evaluate_even_if_they_were_captured_in_training_mode() -> None:
    parts = {
        "first": nn.Linear(6, 4),
        "norm": nn.BatchNorm1d(4),
        "drop": nn.Dropout(0.5),
        "last": nn.Linear(4, 2),
    }
    model = Model(
        lambda self, x: self.last(F.dropout(self.drop(self.norm(self.first(x))), 0.5, self.training)), **parts
    )
    program = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    ready: list[Any] = [fx.symbolic_trace(model), program]
    with torch.no_grad():
        model(5 * X)
        expected = model.eval()(X)
    for graph in ready:
        torch.testing.assert_close(fxinvert.trace(graph, X)(X), expected)
    inputs = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in program.state_dict.items()}
    result = fxinvert.post_train(program, (inputs, torch.tanh(inputs[:, :2])), sweeps=1)
    assert result.final.loss < result.baseline.loss
    assert all(torch.equal(value, before[name]) for name, value in program.state_dict.items())
    model.load_state_dict(result.model.state_dict())
    torch.testing.assert_close(model(inputs), result.model(inputs))


@pytest.mark.parametrize("function", [branching, lambda self, x: self.last(self.first(x))])
def test_dropout_and_batch_norm_evaluate_whatever_the_models_mode(function: Callable[..., Any]) -> None:
    norm = nn.BatchNorm1d(6)
    first = nn.Sequential(nn.Linear(6, 6), norm, nn.Dropout(0.5))
    model = exported(function, first=first, last=nn.Linear(6, 4)).train()
    before = copy.deepcopy(norm.state_dict())
    graph = fxinvert.trace(model, X)
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(norm.state_dict(), before)
    torch.testing.assert_close(graph.train()(X), model.eval()(X))


def test_a_function_of_another_library_that_hides_parameters_is_seen_through() -> None:
    model = Model(lambda self, x: projected(x, self.weight), weight=nn.Parameter(torch.randn(4, 6)))
    graph = fxinvert.trace(model, X)
    assert "projected takes parameters" in graph.meta["captured"]
    assert keys(graph) == ["linear", "tanh"]
    assert fxinvert.partition(graph).segments[0].parameters == ("weight",)


@fx.wrap
def projected(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight).tanh()


def test_what_takes_parameters_and_cannot_be_exported_stays_whole() -> None:
    model = Model(lambda self, x: sized(x, self.weight), weight=nn.Parameter(torch.randn(6)))
    graph = fxinvert.trace(model, X)
    assert "captured" not in graph.meta
    torch.testing.assert_close(graph(X), model(X))


@fx.wrap
def sized(x: Tensor, weight: Tensor) -> Tensor:
    return torch.stack([x[i] * weight for i in range(len(x))])


# --- inputs and outputs -------------------------------------------------------------------------------------


@dataclass
class Answer:
    hidden: Tensor
    logits: Tensor


class Many(nn.Module):
    """Nested and keyword inputs; an output of any kind."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.fc, self.wrap = nn.Linear(6, 4), wrap

    def forward(
        self, pair: tuple[Tensor, dict[str, Tensor]], *, scale: float = 1.0, extra: Any = None
    ) -> Any:
        x, more = pair
        hidden = self.fc(x * scale + more["y"])
        if extra is not None:
            hidden = hidden + extra
        return self.wrap(hidden, hidden.relu())


@pytest.mark.parametrize(
    ("wrap", "output"),
    [
        (lambda h, y: (h, y), 1),
        (lambda h, y: [h, y], 1),
        (lambda h, y: {"h": h, "y": y}, "y"),
        (lambda h, y: {"h": h, "y": y}, 1),
        (Answer, None),
        (Answer, "logits"),
    ],
)
def test_nested_inputs_by_keyword_and_outputs_of_any_kind(wrap: Any, output: Any) -> None:
    model = Many(wrap)
    inputs = {"pair": (X, {"y": 2 * X}), "scale": 0.5, "extra": torch.ones(3, 1)}
    graph = fxinvert.trace(model, inputs, output=output)
    placeholders = [str(n.target) for n in graph.graph.find_nodes(op="placeholder")]
    assert placeholders == ["pair_0", "pair_1_y", "extra"]
    expected = model.fc(X * 0.5 + 2 * X) + 1
    torch.testing.assert_close(graph(X, 2 * X, torch.ones(3, 1)), expected.relu())
    fxinvert.invert(graph, output_target="regression")(inputs, torch.zeros(3, 4))


def test_several_supervised_outputs_are_joined() -> None:
    model = Many(lambda h, y: {"h": h, "y": y})
    graph = fxinvert.trace(model, ((X, {"y": X}),), output=("h", "y"))
    hidden = model.fc(2 * X)
    torch.testing.assert_close(graph(X, X), torch.cat([hidden, hidden.relu()], 1))
    labels = {"h": torch.zeros(3, 4), "y": torch.ones(3, 4)}
    rec = fxinvert.invert(graph, output_target="regression")(((X, {"y": X}),), labels)
    torch.testing.assert_close(rec.output_target, torch.cat([*labels.values()], 1))


# --- what models do ----------------------------------------------------------------------------------------


def _attention(self: Any, x: Tensor) -> Any:
    tokens = x.reshape(-1, 3, 2)
    mixed: Tensor = self.mix(tokens, tokens, tokens)[0]
    return mixed.flatten(1)


def _chunks(self: Any, x: Tensor) -> Any:
    a, b, c = self.fc(x).chunk(3, -1)
    left, right = torch.split(x, [2, 4], -1)
    parts = x.reshape(-1, 3, 2).unbind(1)
    return torch.cat([a * b + c, left, right + 1, parts[0] * parts[2]], -1)


def _twice(self: Any, x: Tensor) -> Any:
    result: Tensor = self.fc(self.act(self.fc(self.act(x))))
    return result


def _tied(self: Any, x: Tensor) -> Any:
    return F.linear(self.fc(x).tanh(), self.fc.weight.t())


def _windows(self: Any, x: Tensor) -> Any:
    """Folds windows into the batch, mixes the entries of each, and takes them out again."""
    windows = x.reshape(-1, 2)
    mixed = windows + self.fc(windows).softmax(-1)
    return mixed.reshape(-1, 6)


def _cast(self: Any, x: Tensor) -> Any:
    result: Tensor = self.fc(x.double().exp().to(x.dtype)) * x.shape[0] / x.size(0)
    return result


MODELS = {
    "attention": Model(_attention, mix=nn.MultiheadAttention(2, 1, batch_first=True)),
    "chunks": Model(_chunks, fc=nn.Linear(6, 6)),
    "twice": Model(_twice, fc=nn.Linear(6, 6), act=nn.Tanh()),
    "tied": Model(_tied, fc=nn.Linear(6, 6)),
    "windows": Model(_windows, fc=nn.Linear(2, 2)),
    "cast": Model(_cast, fc=nn.Linear(6, 6)),
    "transformer": nn.Sequential(
        nn.Unflatten(1, (3, 2)), nn.TransformerEncoderLayer(2, 1, 4, batch_first=True), nn.Flatten()
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_trace_invert_and_partition(name: str) -> None:
    model = MODELS[name].eval()
    graph = fxinvert.trace(model, X)
    x = torch.randn(5, 6)
    torch.testing.assert_close(graph(x), model(x))
    inverted(graph, x)
    target = model(x) + 0.05 * torch.randn(5, 6 if name != "chunks" else 10)
    rec = fxinvert.invert(graph, output_target="regression")(x, target.detach())
    assert all(bool(torch.isfinite(rec.targets[name]).all()) for name in rec.names)
    trained = [n for s in fxinvert.partition(graph).segments for n in s.parameters]
    assert set(trained) == {n for n, _ in model.named_parameters()}


def test_a_module_that_is_called_twice_has_two_names_in_one_segment() -> None:
    plan = fxinvert.partition(fxinvert.trace(MODELS["twice"], X))
    assert [s.trained for s in plan.segments] == [("fc", "fc@2")]


def test_tied_weights_stay_in_one_segment() -> None:
    (segment,) = fxinvert.partition(fxinvert.trace(MODELS["tied"], X)).segments
    assert segment.parameters == ("fc.weight", "fc.bias")


def test_windows_in_the_batch_are_inverted_sample_by_sample() -> None:
    graph = fxinvert.trace(MODELS["windows"], X)
    rows = {n.meta["path"]: n.meta["rows"] for n in graph.graph.nodes if n.meta.get("active")}
    assert rows["fc"] == 3
    assert rows["x"] == 1
    inverse = fxinvert.invert(graph, output_target="regression")
    x = torch.randn(4, 6)
    target = graph(x) + 0.1 * torch.randn(4, 6)
    together, alone = inverse(x, target), inverse(x[1:2], target[1:2])
    assert together.targets["fc"].shape == (12, 2)
    assert len(together.certificates["x"].residual) == 4
    torch.testing.assert_close(together.targets["x"][1:2], alone.targets["x"], rtol=1e-3, atol=1e-4)
    assert bool((together.consistency("x") < 1e-3).all())


# --- in-place ops in exported graphs -----------------------------------------------------------------------


def _writes(self: Any, x: Tensor) -> Any:
    y = self.fc(x)
    if y.shape[1] == 6:
        y[:, 1:4] += x[:, 1:4]
        y[:, 5] = 0.5
        z = y.relu_() * 2
        y.add_(1)
        y.view(-1, 2, 3)[:, 0].mul_(3.0)
    return y + z


def test_views_that_are_written_into_are_written_out() -> None:
    model = exported(_writes, fc=nn.Linear(6, 6))
    graph = fxinvert.trace(model, X)
    x = torch.randn(4, 6)
    torch.testing.assert_close(graph(x), model(x))
    assert not [n for n in graph.graph.nodes if str(n.target).endswith("_.Tensor")]
    inverted(graph, x)


def _added_to(self: Any, x: Tensor) -> Any:
    y = self.fc(x)
    z = y.relu_()
    y[:, 1:].add_(x[:, 1:])
    return z + y


def _parts_scaled(self: Any, x: Tensor) -> Any:
    y = self.fc(x)
    first, second = y.chunk(2, 1)
    first.mul_(second)
    return y


def _seen_through_a_view(self: Any, x: Tensor) -> Any:
    y = self.fc(x)
    pairs = y.view(-1, 2, 3)
    y.mul_(2)
    pairs[:, 0] += 1
    return pairs.flatten(1)


def _narrowed(self: Any, x: Tensor) -> Any:
    y = self.fc(x)
    y[:, 1:3].copy_(x[:, :2])
    y.narrow(1, 0, 2).fill_(1.0)
    return y


def _input_changed(self: Any, x: Tensor) -> Any:
    x.mul_(2)
    return self.fc(x) + x


def _through_data(self: Any, x: Tensor) -> Any:
    y = self.fc(x.data if x.shape[1] == 6 else x)
    y.data[:, 0] = 0
    return F.linear(y.data, self.fc.weight.data, self.fc.bias)


@pytest.mark.parametrize(
    "forward", [_added_to, _parts_scaled, _seen_through_a_view, _narrowed, _input_changed, _through_data]
)
def test_what_symbolic_tracing_cannot_write_out_is_exported(forward: Any) -> None:
    model, x = Model(forward, fc=nn.Linear(6, 6)), torch.randn(4, 6)
    graph = fxinvert.trace(model, X)
    with torch.no_grad():
        torch.testing.assert_close(graph(x), model(x.clone()))
    assert graph.meta["captured"].startswith("by torch.export")
    inverted(graph, x)


def _autocast(self: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = self.fc(x).relu()
        with torch.autocast("cpu", enabled=False):
            y = self.fc(y.float())
    return self.head(y)


def test_autocast_in_forward_is_followed() -> None:
    model, x = Model(_autocast, fc=nn.Linear(6, 6), head=nn.Linear(6, 2)), torch.randn(4, 6)
    graph = fxinvert.trace(model, X)
    with torch.no_grad():
        torch.testing.assert_close(graph(x), model(x), rtol=0, atol=0)
    assert keys(graph).count("_to_copy") == 2
    inverted(graph, x)


def _mapped(self: Any, x: Tensor) -> Any:
    return torch.vmap(lambda v: self.fc(v).cumsum(0))(x)


def test_vmap_in_forward_is_followed() -> None:
    model, x = Model(_mapped, fc=nn.Linear(6, 6)), torch.randn(4, 6)
    graph = fxinvert.trace(model, X)
    torch.testing.assert_close(graph(x), model(x))
    assert "cumsum" in keys(graph)
    inverted(graph, x)


@functools.lru_cache(maxsize=2)
def _grid(rows: int, height: Any, width: Any) -> Any:
    return (torch.arange(0, height)[:, None] + torch.arange(width)).flatten().expand(rows, -1).float()


def _with_a_grid(self: Any, x: Tensor) -> Any:
    """Of sizes that lie in a tensor, of which export has no values, and kept for as many samples."""
    height, width = torch.tensor([2, 3])
    grid = torch.tanh(_grid(x.shape[0], height, width))
    return self.fc(x + grid if grid.shape[1] == 6 else x)


def test_what_is_kept_by_sizes_and_made_by_sizes_in_tensors_is_followed() -> None:
    model = Model(_with_a_grid, fc=nn.Linear(6, 4))
    graph = fxinvert.trace(model, X)
    for x in (torch.randn(5, 6), X):
        torch.testing.assert_close(graph(x), model(x))
    inverted(graph, X)


def _masked(self: Any, x: Tensor) -> Any:
    mask = x.new_zeros(6)
    for i, part in enumerate((slice(0, 2), slice(2, 6))):
        mask[part] = i
    return self.fc(x) * mask


def _in_time(x: Tensor) -> Tensor:
    """Overlapping ones in time, samples second in memory."""
    chunks = x.transpose(0, 1).contiguous().transpose(0, 1).view(x.shape[0], 3, 2, 4)
    far, near, step, each = chunks.stride()
    return chunks.as_strided((x.shape[0], 5, 2, 4), (far, near // 2, step, each))


def _patches(x: Tensor) -> Tensor:
    """Those of a map, every other one."""
    return x.as_strided((x.shape[0], 2, 3, 2, 2), (24, 8, 1, 4, 1))


def _a_diagonal(x: Tensor) -> Tensor:
    """No windows: it stays as it is."""
    return x.as_strided((x.shape[0], 4), (24, 5))


@pytest.mark.parametrize(("view", "known"), [(_in_time, True), (_patches, True), (_a_diagonal, False)])
def test_views_by_strides_are_windows(view: Callable[[Tensor], Tensor], known: bool) -> None:
    """Which do not depend on how a tensor lies in memory, as targets may lie in another way."""
    model, x = exported(lambda self, x: self.last(view(self.first(x)).flatten(1)), first=nn.Linear(4, 4), last=nn.LazyLinear(2)), torch.randn(3, 6, 4)  # fmt: skip
    model(x)
    graph = fxinvert.trace(model, x)
    assert ("as_strided" in graph.code) is not known
    for other in (torch.randn(1, 6, 4), torch.randn(4, 6, 4)):
        torch.testing.assert_close(graph(other), model(other))


def test_conditions_that_no_sample_decides_choose_between_both_branches() -> None:
    """What all samples share, and the model's own values, may decide for all of them."""

    def forward(self: Any, given: Any) -> Any:
        x, flag = given
        x = torch.cond(flag, lambda v: (self.first(v), v + 2), lambda v: (v.tanh(), v + 1), (x,))[0]
        return self.last(torch.cond(self.last.bias.sum() > 0, lambda v: v * 2, lambda v: v.sigmoid(), (x,)))

    model = exported(forward)
    graph = fxinvert.trace(model, ((X, torch.tensor(True)),))
    for flag in torch.tensor([True, False]):
        torch.testing.assert_close(graph(X, flag), model((X, flag)))


def test_what_is_taken_along_an_axis_is_taken_of_any_batch() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.fc(x).reshape(-1, 2, 3) if x.shape[1] == 6 else x
        taken = torch.take_along_dim(y, y[:, :1].argsort(-1), -1)  # by the order of the first row
        return torch.take_along_dim(taken, taken.argmax(1, keepdim=True), 1).flatten(1)

    model = Model(forward, fc=nn.Linear(6, 6))
    graph, x = fxinvert.trace(model, X), torch.cat([X, -X])
    assert graph.meta["captured"]
    torch.testing.assert_close(graph(x), model(x))


def test_constants_that_are_filled_piece_by_piece_are_folded() -> None:
    model = exported(_masked, fc=nn.Linear(6, 6))
    graph = fxinvert.trace(model, X)
    assert keys(graph) == ["linear", "mul"]
    (mask,) = [n for n in graph.graph.find_nodes(op="get_attr") if "fc" not in str(n.target)]
    assert getattr(graph, str(mask.target)).tolist() == [0, 0, 1, 1, 1, 1]
    torch.testing.assert_close(graph(X), model(X))


def _asks_a_constant(self: Any, x: Tensor) -> Any:
    mask = torch.ones_like(x)
    return self.fc(x) if mask.all() and mask.sum(1).max().item() == 6 else x


def _checks(self: Any, x: Tensor) -> Any:
    assert x.isfinite().all(), "not finite"
    if x.amax() > 100:
        raise ValueError("too large")
    return self.fc(x)


def _has_torch_check(self: Any, x: Tensor) -> Any:
    torch._check_with(ValueError, bool(x.isfinite().all()), lambda: "not finite")
    return self.fc(x) if torch.ones(2).all() else x


def _says_something(self: Any, x: Tensor) -> Any:
    if x.amax() < 0:
        warnings.warn("negative", stacklevel=1)
    return self.fc(x)


def _knows_of_the_capture(self: Any, x: Tensor) -> Any:
    mask = None if torch.compiler.is_compiling() else torch.ones(x.shape[0], 1)
    return self.fc(x) * mask


def _knows_of_tensors_without_values(self: Any, x: Tensor) -> Any:
    factor = 2 if isinstance(x, torch._subclasses.FakeTensor) else 3
    return self.fc(x) * factor if x.shape[1] == 6 else x


def _knows_of_tensors(self: Any, x: Tensor) -> Any:
    return self.fc(x * 2 if isinstance(x, Tensor) else x[:, :3])


def _keeps_what_it_made_for_a_shape(self: Any, x: Tensor) -> Any:
    if getattr(self, "shape", None) != x.shape:
        self.shape, self.steps = x.shape, torch.arange(x.shape[1]).to(x.dtype)
    return self.fc(x) * self.steps


def _copies_large_batches(self: Any, x: Tensor) -> Any:
    return self.fc(x.contiguous() if x.shape[0] >= 64 else x) if x.shape[1] == 6 else x


def _asks_more_in_the_capture(self: Any, x: Tensor) -> Any:
    said = f"given {x.sum()} of {x.shape[1] + 0}"
    return self.fc(x) if said and torch.ones(x.shape[1]).all() else x


def _shows_a_number(self: Any, x: Tensor) -> Any:
    y = self.fc(x)
    self.said = f"{y.mean().item():.3f} of {y.abs().max().item():.3f}" if y.shape[1] == 6 else ""
    return y


def _checks_a_number(self: Any, x: Tensor) -> Any:
    if x.abs().max().item() > 100:
        raise ValueError("too large")
    return self.fc(x)


def _converts(self: Any, x: Tensor) -> Any:
    self.fc = self.fc.to(x.dtype)
    return self.fc(x) if x.shape[1] == 6 else x


@pytest.mark.parametrize(
    "forward",
    [
        _asks_a_constant,
        _checks,
        _has_torch_check,
        _says_something,
        _knows_of_the_capture,
        _knows_of_tensors_without_values,
        _knows_of_tensors,
        _keeps_what_it_made_for_a_shape,
        _copies_large_batches,
        _asks_more_in_the_capture,
        _shows_a_number,
        _checks_a_number,
        _converts,
    ],
)
def test_what_runs_ask_without_changing_what_is_computed_is_answered(forward: Any) -> None:
    model = Model(forward, fc=nn.Linear(6, 6))
    with warnings.catch_warnings(action="error", category=UserWarning):  # other answers are tried in silence
        graph = fxinvert.trace(model, X)
    assert set(keys(graph)) <= {"linear", "mul"}
    torch.testing.assert_close(graph(2 * X), model(2 * X))
    inverted(graph, X)


def test_what_it_calls_may_check_values_too() -> None:
    """Distributions of torch ask whether their parameters are what they should be, and raise."""

    def forward(self: Any, x: Tensor) -> Any:
        place, scale = self.fc(x).chunk(2, 1)
        return torch.distributions.Normal(place, scale.exp(), validate_args=True).log_prob(x[:, :3])  # type: ignore[no-untyped-call]

    model = Model(forward, fc=nn.Linear(6, 6))
    graph = fxinvert.trace(model, X)
    torch.testing.assert_close(graph(2 * X), model(2 * X))
    inverted(graph, X)


def _indexes(self: Any, x: Tensor) -> Any:
    first = torch.zeros((), dtype=torch.long)
    y = self.fc(x[:, first : torch.tensor(6)])
    y[:, first] = 1.0
    return torch.stack([y[torch.arange(x.shape[0]), first + 2], y[:, first]], 1) if x.shape[1] == 6 else x


def test_tensors_of_one_integer_in_an_index_are_read_as_runs_read_them() -> None:
    model = Model(_indexes, fc=nn.Linear(6, 6))
    graph = fxinvert.trace(model, X)
    torch.testing.assert_close(graph(2 * X), model(2 * X))
    inverted(graph, X)


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.fc(x) * (2.0 if x.sum() > 0 else 1.0),
        lambda self, x: self.fc(x)[:, x[0, 0].long()] if x.shape[1] == 6 else x,
        lambda self, x: self.fc(x) if x.sum() > 0 else self.twin(x),
        lambda self, x: self.fc(x) if self.fc.weight.sum() > 0 else x,
        lambda self, x: self.fc(x) * x.sum().item(),
        lambda self, x: self.fc(x) if x.sum().item() > -1e6 else self.twin(x),
        lambda self, x: self.fc(x) if abs(x.sum().item() - float(X.sum())) < 1e-2 else x,
        lambda self, x: self.fc(x) if x.new_ones(x[x[:, 0] > -0.5].shape[0]).sum() > 0 else x,
    ],
)
def test_what_data_or_parameters_decide_is_refused(forward: Any) -> None:
    own = nn.Linear(6, 6)
    model = Model(forward, fc=own, twin=copy.deepcopy(own))  # another way, even if it gives the same
    with pytest.raises(TraceError):
        fxinvert.trace(model, X)


@dataclass
class Scored:
    loss: Tensor
    scores: Tensor
    best: Tensor
    features: Tensor


def _scored(self: Any, x: Tensor) -> Any:
    y = self.fc(x)
    return Scored(y.mean(), y @ y.mT, y.argmax(1), y)


def test_without_a_name_the_first_output_with_rows_is_supervised() -> None:
    model = Model(_scored, fc=nn.Linear(6, 4))
    torch.testing.assert_close(fxinvert.trace(model, X)(X), model(X).features)


# --- refused ------------------------------------------------------------------------------------------------


def _data_dependent(self: Any, x: Tensor) -> Any:
    return self.fc(x[: int(x.abs().sum().item())])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda self, x: self.fc(x[x > 0].reshape(-1, 6)), "samples|batch size|does not run"),
        (
            _data_dependent,
            r"cannot be traced symbolically.*line \d+, in _data_dependent.*torch.export cannot capture.*in _data_dependent",
        ),
        (lambda self, x: self.fc(x.view(len(x), 6)), "cannot be traced.*computes with the batch size"),
    ],
)
def test_shapes_that_depend_on_data_or_a_fixed_batch_are_refused(function: Any, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        fxinvert.trace(Model(function, fc=nn.Linear(6, 6)), X.clone())


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda self, x: self.fc(x).round(), "'round'"),
        (lambda self, x: (self.fc(x) > 0).float(), "'gt'"),
        (lambda self, x: self.fc(x) > 0, "'gt'"),
        (lambda self, x: self.fc(x).argmax(-1), "'argmax'"),
    ],
)
def test_what_ends_the_way_to_the_output_is_named(function: Any, message: str) -> None:
    graph = fxinvert.trace(Model(function, fc=nn.Linear(6, 6)), X)
    for ask in (fxinvert.partition, lambda g: fxinvert.invert(g, output_target="regression")):
        with pytest.raises((NoRuleError, CutError), match=message):
            ask(graph)


def test_a_complex_output_is_refused() -> None:
    with pytest.raises(NoRuleError, match="complex, given by node 'fft"):
        fxinvert.invert(Model(lambda self, x: torch.fft.fft(self.fc(x)), fc=nn.Linear(6, 6)), X)


def test_a_cut_that_is_none_names_the_nearest_that_is() -> None:
    model = Model(lambda self, x: self.last(x + self.first(x)), first=nn.Linear(6, 6), last=nn.Linear(6, 4))
    graph = fxinvert.trace(model, X)
    with pytest.raises(
        CutError,
        match=r"'first' is not a cut: the edge 'x' → 'add' leads past it.*nearest cut is 'add' after it",
    ):
        fxinvert.partition(graph, cuts=["first"])
    with pytest.raises(CutError, match=r"no module or node 'frist'.*did you mean first"):
        fxinvert.partition(graph, cuts=["frist"])


def test_what_a_mask_made_of_sizes_selects_has_a_row_for_every_sample() -> None:
    """As the first token of every sample, by a mask that forward() makes itself."""
    model = Model(
        lambda self, x: self.fc(
            x[torch.zeros_like(x[..., 0]).index_fill(1, self.first, 1.0).nonzero(as_tuple=True)]
        ),
        fc=nn.Linear(4, 2),
        first=torch.tensor([0]),
    )
    x = torch.randn(3, 5, 4)
    inverse = fxinvert.invert(fxinvert.trace(model, x), output_target="regression")
    rec = inverse(x, wanted := torch.randn(3, 2))
    torch.testing.assert_close(model(rec.targets["x"]), wanted, rtol=1e-3, atol=1e-4)


def _by_the_batch(self: Any, x: Tensor) -> Tensor:
    """Stages one behind another along the batch, taken apart by its size, and distances whose kernel depends on it."""
    x = branching(self, x)
    one, two, three = torch.split(torch.cat([x, x.tanh(), 2 * x]), x.shape[0])
    result: Tensor = one + two * three
    if self.codes is not None:
        result = result + torch.cdist(x, self.codes)
    return result


@pytest.mark.parametrize("codes", [None, torch.randn(4, 4)])
def test_ops_that_ask_how_large_the_batch_is_are_captured_for_any(codes: Tensor | None) -> None:
    model = exported(_by_the_batch, first=nn.Linear(6, 6), last=nn.Linear(6, 4), codes=codes)
    graph, x = fxinvert.trace(model, X), torch.randn(40, 6)  # cdist takes another kernel from 25 rows on
    assert "torch.export" in graph.meta["captured"]
    torch.testing.assert_close(graph(x), model(x))
    inverse = fxinvert.invert(graph, output_target="regression", refine=0 if codes is not None else 8)
    rec = inverse(X, wanted := model(X) + 0.01)
    if codes is None:
        torch.testing.assert_close(model(rec.targets["x"]), wanted, rtol=1e-3, atol=1e-3)


def test_numbers_in_tensors_of_the_model_are_read_where_they_stand_among_sizes() -> None:
    """As of paddings, which functions take out of tensors without asking in Python."""
    model = exported(
        lambda self, x: self.last(
            F.pad(branching(self, x), (self.left, self.left + 1))[:, : 7 - self.left]
            .reshape(-1, self.left, 6)
            .sum(1)
        ),
        first=nn.Linear(6, 6),
        last=nn.Linear(6, 6),
        left=torch.tensor(1),
    )
    graph, x = fxinvert.trace(model, X), torch.randn(7, 6)
    torch.testing.assert_close(graph(x), model(x))


def test_tensors_that_are_broadcast_together_follow_one_input_each() -> None:
    """As the difference to quantized values does, which a loss takes and lets go again."""
    model = Model(
        lambda self, x: self.fc(self.joined(x.round(), x)[1] + self.joined(x[:, :1], x)[0]),
        fc=nn.Linear(4, 2),
        joined=torch.broadcast_tensors,
    )
    x = torch.randn(3, 4)
    graph = fxinvert.trace(model, x)
    ops = [n.meta["op"] for n in graph.graph.nodes if n.meta.get("active") and "op" in n.meta]
    assert ops.count("expand_as") == 2
    rec = fxinvert.invert(graph, output_target="regression")(x, wanted := torch.randn(3, 2))
    torch.testing.assert_close(model(rec.targets["x"]), wanted, rtol=1e-3, atol=1e-4)


def test_a_loss_is_no_output_to_be_supervised() -> None:
    @dataclass
    class Quantized:
        loss: Tensor
        values: Tensor

    model = Model(lambda self, x: Quantized((x * x).mean(1), self.fc(x)), fc=nn.Linear(4, 2))
    graph, x = fxinvert.trace(model, torch.randn(3, 4)), torch.randn(5, 4)
    torch.testing.assert_close(graph(x), model(x).values)


def _mixed_by_experts(self: Any, x: Tensor) -> Any:
    """All rows through both experts, as a Llama 4 sums them: torch cannot prove strides of the sum for all batch sizes."""
    rows = x.reshape(-1, x.shape[-1]) if x.shape[1] == 5 else x
    routed = torch.bmm(rows.repeat(2, 1).view(2, -1, 6), self.experts.expand(2, 6, 6)).view(-1, 6)
    return self.fc(rows).add_(routed.reshape(2, -1, 6).sum(0)).view(x.shape)


def test_what_torch_cannot_prove_of_all_batch_sizes_is_tried() -> None:
    model = Model(_mixed_by_experts, fc=nn.Linear(6, 6), experts=torch.randn(6, 6))
    graph, x = fxinvert.trace(model, torch.randn(4, 5, 6)), torch.randn(7, 5, 6)
    torch.testing.assert_close(graph(x), model(x))


@pytest.mark.parametrize("rows", [2, 30])
def test_batches_whose_parts_are_counted_are_captured_for_any_size(rows: int) -> None:
    def forward(self: Any, x: Tensor) -> Any:
        frames = self.fc(x).flatten(0, 1)  # three of each sample
        frames = frames.contiguous() if frames.shape[0] >= 64 else frames
        return frames.unflatten(0, (-1, 3)).mean(1)

    model, x = Model(forward, fc=nn.Linear(4, 2)), torch.randn(25, 3, 4)
    torch.testing.assert_close(fxinvert.trace(model, x[:rows].repeat(2, 1, 1)[:rows])(x), model(x))


def _by_fours(self: Any, x: Tensor) -> Any:
    torch._check(x.shape[0] % 4 == 0)  # type: ignore[no-untyped-call]
    return self.fc(x) if x.shape[1] == 6 else x


@pytest.mark.parametrize("forward", [_by_fours, lambda self, x: self.fc(x) if len(x) % 2 == 0 else x])
def test_what_holds_for_some_batch_sizes_only_is_refused(forward: Any) -> None:
    with pytest.raises(TraceError, match="computes with the batch size"):
        fxinvert.trace(Model(forward, fc=nn.Linear(6, 6)), torch.randn(4, 6))


class Remembering(nn.Module):
    """Goes on from what it has in a buffer, and begins anew where that is of another size, as neurons that spike do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)
        self.register_buffer("state", torch.zeros(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        self.state: Tensor = torch.zeros_like(self.state)
        for step in range(2):
            if self.state.shape != y.shape:
                self.state = torch.zeros_like(y)
            self.state = self.state / 2 + step * y.tanh()
        return self.state


@pytest.mark.parametrize("before", [0, 2, 3, 4])
def test_what_an_earlier_run_has_left_says_nothing_of_the_batch_size(before: int) -> None:
    model, x = Remembering(), torch.randn(2, 6)
    if before:
        model(torch.randn(before, 6))
    graph = fxinvert.trace(model, x)
    for samples in (1, 2, 3, 4, 9):
        given = torch.randn(samples, 6)
        torch.testing.assert_close(graph(given), model(given))


@pytest.mark.parametrize("factor", [1, 2])
def test_one_batch_size_that_code_names(factor: int) -> None:
    """It is tried whether the model computes the same for it."""

    class Naming(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(x.contiguous() * factor if x.shape[0] == 7 else x)
            return y

    model = Naming()
    if factor > 1:
        with pytest.raises(TraceError, match=r"batch size of the example \(for 7 samples"):
            fxinvert.trace(model, torch.randn(2, 6))
        return
    x = torch.randn(7, 6)
    torch.testing.assert_close(fxinvert.trace(model, x[:2])(x), model(x))


class InADictionary(nn.Module):
    """Reads its parameters from a dictionary of its own, as liquid networks do, so that the exporter takes them for constants."""

    def __init__(self) -> None:
        super().__init__()
        self.own = {"weight": nn.Parameter(torch.randn(4, 6)), "rate": nn.Parameter(torch.rand(4))}
        for name, parameter in self.own.items():
            self.register_parameter(name, parameter)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.own["weight"])
        steps = 2 if x.shape[0] > 0 else 1  # which symbolic tracing does not follow
        for _ in range(steps):
            y = y - y.tanh() * nn.functional.softplus(self.own["rate"])
        return y


def test_parameters_in_a_dictionary_are_trained() -> None:
    torch.manual_seed(0)
    model, x = InADictionary(), torch.randn(80, 6)
    graph = fxinvert.trace(model, x[:2])
    assert dict(graph.named_parameters()).keys() == {"weight", "rate"}
    result = fxinvert.post_train(
        model, [(x, x[:, :4].argmax(1))], method="auto", sweeps=1, progress=False, confidence=0.5
    )
    assert "weight" in result.changed
    assert result.final.loss < result.baseline.loss


class Masks(Tensor):
    """Says what its numbers mean."""


@pytest.mark.parametrize("followed", [False, True])
def test_tensors_of_a_subclass_are_tensors(followed: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            if followed and x.shape[0] < 1:  # which symbolic tracing does not follow
                return x
            y = self.fc(x).as_subclass(Masks).relu()
            z: Tensor = self.head(y).as_subclass(Masks)
            return z

    model, x = Model(), torch.randn(40, 6)
    assert {p for s in fxinvert.partition(fxinvert.trace(model, x[:2])).segments for p in s.trained} == {
        "fc",
        "head",
    }
    result = fxinvert.post_train(model, [(x, x[:, :3].argmax(1))], sweeps=1, progress=False, confidence=0.5)
    assert isinstance(result.model(x), Masks)
    assert isinstance(x.as_subclass(Masks), Masks)
