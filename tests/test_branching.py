"""Branching graphs: where targets come from, and what they must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import Model
from torch import Tensor, nn
from torch.nn import functional as F

import fxinvert
from fxinvert import models
from fxinvert.errors import SolveError
from fxinvert.passes.flow import Flow
from fxinvert.rules import Status


class Residual(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.inside = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x + 0.3 * self.inside(x))


class Gated(nn.Module):
    """A squeeze-and-excite gate on a convolution, with a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate = nn.Conv1d(3, 3, 3, padding=1), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        gate: Tensor = torch.sigmoid(self.gate(h.mean(-1)))
        gated: Tensor = x + h * gate[..., None]
        return gated


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        mixed: Tensor = self.attention(h, h, h, need_weights=False)[0]
        return x + mixed


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, torch.tanh(self.first(x))], 1)
        return torch.cat([x, torch.tanh(self.second(x))], 1)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double().eval()


#: a model, and the shape of its input without the batch
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (lambda: nn.Sequential(nn.Linear(5, 6), Residual(), Residual(), nn.Linear(6, 4)), (5,)),
    "gated": (lambda: nn.Sequential(Gated(), nn.Flatten(), nn.Linear(15, 4)), (3, 5)),
    "attention": (lambda: nn.Sequential(Attending(), nn.Flatten(), nn.Linear(24, 4)), (3, 8)),
    "dense": (lambda: nn.Sequential(Dense(), nn.Linear(10, 4)), (4,)),
    "product": (lambda: Model(lambda self, x: self.a(x).exp() * self.b(x), a=nn.Linear(5, 4), b=nn.Linear(5, 4)), (5,)),
    "chunks": (lambda: Model(lambda self, x: (h := self.a(x).chunk(2, 1))[0] * h[1].sigmoid(), a=nn.Linear(5, 8)), (5,)),
    "twice": (lambda: Model(lambda self, x: self.a(torch.tanh(self.a(x))) + x, a=nn.Linear(4, 4)), (4,)),
    "square": (lambda: Model(lambda self, x: (h := self.a(x)) * h + h, a=nn.Linear(5, 4)), (5,)),
}  # fmt: skip


@pytest.fixture(params=list(NETWORKS))
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    make, shape = NETWORKS[request.param]
    model = seeded(make)
    return model, torch.randn(6, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def given(outputs: Tensor, labels: Tensor) -> Tensor:
    return labels


# --- what every reconstruction must be ----------------------------------------------------------------------


@pytest.mark.parametrize("reconstruction", ["nodewise", "linearized"])
def test_the_inverse_of_what_happened_is_what_happened(
    network: tuple[nn.Module, Tensor], reconstruction: Any
) -> None:
    model, x = network
    inverse = fxinvert.invert(model, x, output_target=given, reconstruction=reconstruction)
    with torch.no_grad():
        rec = inverse(x, model(x))
    for name in rec.names:
        torch.testing.assert_close(rec.targets[name], rec.anchors[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reconstruction", ["nodewise", "linearized"])
def test_rows_are_independent_of_their_batch(network: tuple[nn.Module, Tensor], reconstruction: Any) -> None:
    model, x = network
    inverse = fxinvert.invert(model, x, output_target=given, reconstruction=reconstruction)
    with torch.no_grad():
        wanted = model(x) + 0.05 * torch.randn(6, 4, dtype=torch.float64)
    rec, alone = inverse(x, wanted), inverse(x[2:3], wanted[2:3])
    for name in rec.names:
        apart = float((rec.targets[name][2:3] - alone.targets[name]).norm())
        # an iteration that stops early amplifies rounding
        assert apart <= 1e-4 * (1 + float(alone.certificates[name].distance)), name


def test_a_value_is_given_what_reaches_the_target_behind_it(network: tuple[nn.Module, Tensor]) -> None:
    """Run on from a value's target with all else at its anchors, the model gives the target that it follows from."""
    model, x = network
    inverse = fxinvert.invert(model, x, output_target=given)
    with torch.no_grad():
        wanted = model(x + 0.02 * torch.randn_like(x))
        values = inverse.forward(x)
        rec = inverse(x, wanted)
        for stretch in Flow(inverse.graph).stretches:
            certificate = rec.certificates[stretch.entry.meta["path"]]
            env = dict(values) | {stretch.entry: rec.targets[stretch.entry.meta["path"]]}
            runner = torch.fx.Interpreter(inverse.graph, garbage_collect_values=False)
            runner.env = env
            for node in (*stretch.inside, stretch.exit):
                env[node] = runner.run_node(node)
            goal = rec.targets[stretch.exit.meta["path"]]
            missed = (env[stretch.exit] - goal).flatten(1).norm(dim=1) / goal.flatten(1).norm(dim=1)
            torch.testing.assert_close(missed, certificate.residual, rtol=1e-3, atol=1e-6)
            if certificate.status in (Status.EXACT, Status.NEAREST):
                assert float(missed.max()) < 1e-5


def test_linearized_targets_of_an_affine_model_are_the_nearest() -> None:
    """Against the pseudo-inverse of the dense map from a value to the output, paths and all."""
    model = seeded(lambda: Model(lambda self, x: self.c((h := self.a(x)) + self.b(h)),
                                 a=nn.Linear(5, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 3)))  # fmt: skip
    x, wanted = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    inverse = fxinvert.invert(model, x, output_target=given, reconstruction="linearized", condition_limit=1e8)
    rec = inverse(x, wanted)
    a, b, c = (getattr(model, name).weight for name in "abc")
    inside = torch.eye(6, dtype=torch.float64) + b
    for name, through in {
        "c": torch.eye(3).double(),
        "add": c,
        "b": c,
        "a": c @ inside,
        "x": c @ inside @ a,
    }.items():
        with torch.no_grad():
            step = (wanted - model(x)) @ torch.linalg.pinv(through).T
        torch.testing.assert_close(rec.targets[name], rec.anchors[name] + step, rtol=1e-6, atol=1e-8)
        assert float(rec.consistency(name).max()) < 1e-6


class Routed(nn.Module):
    """One of two experts for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 2), nn.ModuleList([nn.Linear(4, 5), nn.Linear(4, 5)])
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.gate(x).argmax(-1)[:, None, None].expand(-1, 1, 5)
        every = torch.stack([expert(x) for expert in self.experts], 1)
        output: Tensor = self.last(every.gather(1, chosen).squeeze(1))
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_does_not_lead_to_the_output_keeps_its_anchor(dtype: torch.dtype) -> None:
    """An expert that another was preferred to has no derivative at all."""
    model, x = Routed().to(dtype), torch.randn(20, 4, dtype=dtype)
    chosen = model.gate(x).argmax(-1)
    rec = fxinvert.invert(model, x, reconstruction="linearized")(x, torch.arange(20) % 3)
    for i in range(2):
        anchor, target = rec.anchors[f"experts.{i}"], rec.targets[f"experts.{i}"]
        assert torch.isfinite(target).all()
        assert torch.equal(target[chosen != i], anchor[chosen != i])


@pytest.mark.parametrize("few", [2**19, 2**12])
def test_linearized_targets_are_the_same_a_few_samples_or_values_at_a_time(few: int) -> None:
    """However few fit into memory: samples, or values of a single one."""
    model, x = models.load("digits_resnet"), models.data_of("digits_resnet").test.inputs[0][:5]
    graph = fxinvert.trace(model, x)
    labels = torch.arange(5)
    whole, parts = (
        fxinvert.invert(graph, reconstruction="linearized", memory_limit=limit)(x, labels) for limit in (2**30, few)
    )  # fmt: skip
    for name in whole.names:
        torch.testing.assert_close(parts.targets[name], whole.targets[name], rtol=1e-3, atol=1e-4)


def test_refined_linearized_targets_reach_the_output(network: tuple[nn.Module, Tensor]) -> None:
    model, x = network
    inverse = fxinvert.invert(model, x, output_target=given, reconstruction="linearized", refine=10)
    with torch.no_grad():
        rec = inverse(x, model(x + 0.1 * torch.randn_like(x)))
    assert float(rec.consistency(rec.names[0]).max()) <= 1e-3


# --- the graph's structure ----------------------------------------------------------------------------------


def test_regions_are_the_smallest_that_hold_the_branching() -> None:
    model = seeded(NETWORKS["residual"][0])
    graph = fxinvert.trace(model, torch.randn(2, 5, dtype=torch.float64))
    flow = Flow(graph)
    assert [n.meta["path"] for n in flow.line] == [
        "input",
        "0",
        "1.add",
        "1.leaky_relu",
        "2.add",
        "2.leaky_relu",
        "3",
    ]
    regions = [s for s in flow.stretches if s.is_region]
    assert [(s.entry.meta["path"], s.exit.meta["path"]) for s in regions] == [
        ("1.leaky_relu", "2.add"),
        ("0", "1.add"),
    ]
    inverse = fxinvert.invert(graph)
    assert "_0_to__1_add_inverse" in inverse.graph_module.code
    text = repr(inverse)
    assert "1.add → 0: region, matrix-free" in text
    assert "1.add → 1.mul: add, linear solve" in text


def test_every_cut_has_a_certificate_and_every_segment_its_own_parameters() -> None:
    model = seeded(NETWORKS["attention"][0])
    x = torch.randn(3, 3, 8, dtype=torch.float64)
    graph = fxinvert.trace(model, x)
    plan, rec = fxinvert.partition(graph), fxinvert.invert(graph)(x, torch.tensor([0, 1, 2]))
    assert all(segment.exit in rec.certificates for segment in plan.segments)
    names = [name for segment in plan.segments for name in segment.parameters]
    assert len(set(names)) == len(names)
    assert {"0.attention.in_proj_weight", "0.attention.out_proj.weight", "0.norm.weight", "2.weight"} <= set(
        names
    )


def test_tied_modules_stay_in_one_segment() -> None:
    model = seeded(NETWORKS["twice"][0])
    plan = fxinvert.partition(fxinvert.trace(model, torch.randn(2, 4, dtype=torch.float64)))
    assert [segment.parameters for segment in plan.segments] == [("a.weight", "a.bias")]
    assert plan.segments[0].trained == ("a", "a@2")


# --- several inputs and outputs -----------------------------------------------------------------------------


class Driver(nn.Module):
    """Two inputs by name, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.look, self.feel = nn.Conv1d(1, 2, 3), nn.Linear(3, 4)
        self.turn, self.speed = nn.Linear(16, 3), nn.Linear(16, 1)

    def forward(self, *, view: Tensor, state: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        seen = F.relu(self.look(view)).flatten(1)
        joined = torch.cat([seen, torch.tanh(self.feel(state)) * scale], 1)
        return {"turn": self.turn(joined), "speed": self.speed(joined)}


def driving(count: int = 5) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    make = torch.Generator().manual_seed(2)
    view, state = torch.randn(count, 1, 8, generator=make), torch.randn(count, 3, generator=make)
    return {"view": view, "state": state}, {
        "turn": torch.randint(0, 3, (count,), generator=make),
        "speed": torch.randn(count, 1, generator=make),
    }


def test_several_outputs_are_one_least_squares_problem() -> None:
    torch.manual_seed(0)
    model, (inputs, labels) = Driver(), driving()
    graph = fxinvert.trace(model, inputs, output=("turn", "speed"))
    rec = fxinvert.invert(graph, output_target="nearest", reconstruction="linearized", refine=10)(
        inputs, labels
    )
    assert {"view", "state", "look", "feel", "cat"} <= set(rec.names)
    assert float(rec.consistency("cat").max()) <= 1e-3
    own = torch.split(rec.output_target, [3, 1], 1)
    assert torch.equal(own[1], labels["speed"])
    assert bool((own[0].gather(1, labels["turn"][:, None]) >= own[0].amax(1, keepdim=True) - 1e-6).all())


def test_every_input_gets_a_target_of_its_own() -> None:
    torch.manual_seed(0)
    model, (inputs, labels) = Driver(), driving()
    inverse = fxinvert.invert(
        fxinvert.trace(model, inputs, output="speed"), output_target="regression", refine=10
    )
    rec = inverse(inputs, labels["speed"])
    assert rec.names[:2] == ["view", "state"]
    for name in ("view", "state", "cat"):
        assert float(rec.consistency(name).median()) <= 1e-3


def test_several_outputs_are_trained_together() -> None:
    torch.manual_seed(0)
    model, data = Driver(), [driving(40)]
    result = fxinvert.post_train(
        model, data, output=("turn", "speed"), sweeps=1, confidence=0.5, progress=False
    )
    assert isinstance(result.model, Driver)
    assert result.final.loss < result.baseline.loss
    with pytest.raises(fxinvert.FxInvertError, match=r"'turn', 'speed'; labels are needed for each"):
        fxinvert.post_train(model, [(data[0][0], data[0][1]["speed"])], output=("turn", "speed"))


# --- what follows the input ---------------------------------------------------------------------------------


def test_targets_stop_at_embeddings() -> None:
    torch.manual_seed(0)
    model = Model(
        lambda self, x: self.head(torch.tanh(self.table(x) + self.places(torch.arange(x.shape[1])))),
        table=nn.Embedding(7, 6), places=nn.Embedding(4, 6), head=nn.Linear(6, 7),
    )  # fmt: skip
    tokens = torch.randint(0, 7, (3, 4))
    rec = fxinvert.invert(model, tokens)(tokens, tokens)
    assert rec.names == ["table", "add", "tanh", "head"]


def test_masks_are_constants() -> None:
    model = seeded(lambda: Model(lambda self, x: self.a(x) * (x > 0).to(x.dtype), a=nn.Linear(4, 4)))
    x = torch.randn(3, 4, dtype=torch.float64)
    graph = fxinvert.trace(model, x)
    assert [n.meta["path"] for n in Flow(graph).nodes] == ["x", "a", "mul"]
    assert not Flow(graph).branches


def test_memory_that_runs_out_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(*_: Any, **__: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    model, x = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), torch.randn(4, 6)
    inverse = fxinvert.invert(model, x, output_target="margin", reconstruction="linearized")
    monkeypatch.setattr(torch.autograd, "grad", greedy)
    with pytest.raises(SolveError, match=r"9 bytes.*fewer samples at once"):
        inverse(x, torch.arange(4) % 3)
