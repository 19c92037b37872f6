"""Regions: pieces of the graph with one entry and one exit, inverted as a whole."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import own_output
from torch import Tensor, nn

import fxinvert
from fxinvert.inversion import replay
from fxinvert.linalg import SolveSettings
from fxinvert.linalg.descent import RATE
from fxinvert.linalg.fixed_point import fixed_point
from fxinvert.linalg.held import held_convolution
from fxinvert.linalg.jacobian import Jacobian, acts_on_values
from fxinvert.models.residual import BasicBlock
from fxinvert.passes import folded
from fxinvert.passes.folded import CONVOLUTIONS
from fxinvert.passes.region import Region
from fxinvert.rules import Inverse, Op, Status
from fxinvert.rules.certificate import relative, row_norms
from fxinvert.rules.fallback import invert_matrix_free
from fxinvert.rules.region import PRODUCTS, REGION, invert_region

Function = Callable[[Tensor], Tensor]
WIDTH = 12


def answer(function: Function, x: Tensor, target: Tensor) -> Inverse:
    """As `InverseOp` asks for it."""
    with torch.no_grad():
        return invert_region(Op(REGION, "region", {"x": x}, function(x), {}, {}, function), target)


def residual_function(scale: float) -> Function:
    """x + F(x), F two affine maps with a ReLU between; in float64."""
    first, second = nn.Linear(WIDTH, 20).double(), nn.Linear(20, WIDTH).double()
    return lambda x: x + scale * second(first(x).relu())


def count(function: Function) -> tuple[Function, list[int]]:
    """The function, and how often it was called."""
    calls = [0]

    def counted(x: Tensor) -> Tensor:
        calls[0] += 1
        return function(x)

    return counted, calls


# --- the fixed-point iteration ------------------------------------------------------------------------------


@given(st.integers(0, 2**31), st.floats(0, 0.9))
def test_affine_functions_near_the_identity_are_solved(seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    matrix = torch.eye(WIDTH, dtype=torch.float64) + size * matrix / torch.linalg.matrix_norm(matrix, 2)
    x, target = torch.randn(2, 4, WIDTH, generator=generator, dtype=torch.float64)
    found = fixed_point(lambda v: v @ matrix.T, x, x @ matrix.T, target, 1e-9 * row_norms(target))
    assert bool((found.error <= 1e-9 * row_norms(target)).all())
    torch.testing.assert_close(found.value, torch.linalg.solve(matrix, target.T).T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("factors", "most"), [([3.0, 2.0, 1.5], 4), ([3.0, -1.0, 0.5], 5)])
def test_acceleration_solves_what_the_plain_iteration_does_not(factors: list[float], most: int) -> None:
    """By GMRES, or by CGLS after a step in vain: both end after as many steps as J has eigenvalues."""
    diagonal = torch.tensor(factors).double().repeat(WIDTH // 3)
    x, target = torch.randn(5, WIDTH).double(), torch.randn(5, WIDTH).double()
    found = fixed_point(lambda v: diagonal * v, x, diagonal * x, target, torch.full((5,), 1e-9).double())
    torch.testing.assert_close(found.value, target / diagonal, rtol=1e-6, atol=1e-6)
    assert int(found.evaluations.max()) <= most


def test_what_does_not_converge_is_given_up_soon_at_its_best_point() -> None:
    function, calls = count(lambda x: x.square() + 1)
    x, target = torch.randn(6, WIDTH).double(), -torch.ones(6, WIDTH).double()
    start = row_norms(target - function(x))
    found = fixed_point(function, x, function(x), target, torch.zeros(6).double())
    assert bool((found.error <= start).all())
    torch.testing.assert_close(found.error, row_norms(target - function(found.value)))
    assert calls[0] <= 2 * (WIDTH + RATE)


@pytest.mark.parametrize(("inputs", "outputs"), [(WIDTH, WIDTH), (20, WIDTH), (WIDTH, 20)])
def test_gradients_reach_what_values_alone_do_not(inputs: int, outputs: int) -> None:
    """An affine f far from the identity: no more steps than the rank of J, as in the method of conjugate gradients."""
    matrix = torch.randn(outputs, inputs).double()
    x, aim = torch.randn(2, 5, inputs).double()
    function, calls = count(lambda v: v @ matrix.T)
    found = fixed_point(function, x, x @ matrix.T, aim @ matrix.T, 1e-9 * row_norms(aim @ matrix.T))
    torch.testing.assert_close(found.value @ matrix.T, aim @ matrix.T, rtol=1e-6, atol=1e-6)
    assert calls[0] <= 3 * WIDTH
    if inputs != outputs:  # by gradients alone: the correction has no part in the null space of J
        nearest = x + (aim - x) @ (torch.linalg.pinv(matrix) @ matrix).T
        torch.testing.assert_close(found.value, nearest, rtol=1e-5, atol=1e-5)


def test_where_many_inputs_reach_the_target_gradients_lead_to_the_nearest() -> None:
    """A square f that is far from the identity and loses four directions: none of the correction is along these."""
    matrix = torch.randn(WIDTH, WIDTH - 4).double() @ torch.randn(WIDTH - 4, WIDTH).double()
    x, aim = torch.randn(2, 5, WIDTH).double()
    goal = 1e-9 * row_norms(aim @ matrix.T)
    found = fixed_point(lambda v: v @ matrix.T, x, x @ matrix.T, aim @ matrix.T, goal)
    nearest = x + (aim - x) @ (torch.linalg.pinv(matrix) @ matrix).T
    torch.testing.assert_close(found.value, nearest, rtol=1e-5, atol=1e-5)


def test_the_closest_output_is_found_where_none_is_the_target() -> None:
    matrix = torch.randn(20, WIDTH).double()
    x, target = torch.randn(5, WIDTH).double(), torch.randn(5, 20).double()
    found = fixed_point(
        lambda v: v @ matrix.T, x, x @ matrix.T, target, torch.zeros(5).double(), closest=True
    )
    least = row_norms(target - target @ torch.linalg.pinv(matrix).T @ matrix.T)
    assert bool((found.error <= 1.02 * least).all())


# --- the rule -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "goal"), [(torch.float32, 1e-5), (torch.float64, 1e-8)])
def test_regions_near_the_identity_are_reached_by_values_alone(dtype: torch.dtype, goal: float) -> None:
    block = BasicBlock(6, 6).eval().to(dtype)
    inside, calls = count(lambda x: x + block.bn2(block.conv2(block.bn1(block.conv1(x)).relu())))
    x = torch.randn(8, 6, 5, 5, dtype=dtype)
    block.requires_grad_(False)
    target = inside(x + 0.2 * torch.randn_like(x))
    calls[0] = 0
    inverse = answer(inside, x, target)
    assert float(relative(inside(inverse.target) - target, target).max()) <= goal
    assert inverse.certificate.status is Status.EXACT, "that it is the nearest is not shown"
    assert calls[0] <= 20, "a pair of products with the Jacobian would cost more than one of these"
    torch.testing.assert_close(inverse.certificate.distance, row_norms(inverse.target - x))


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_a_target_that_is_the_output_gives_the_anchor(scale: float) -> None:
    function, x = residual_function(scale), torch.randn(4, WIDTH).double()
    inverse = answer(function, x, function(x).detach())
    assert torch.equal(inverse.target, x)
    assert inverse.certificate.iterations == 0


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_samples_are_independent(scale: float) -> None:
    function, x = residual_function(scale), torch.randn(6, WIDTH).double()
    sizes = torch.tensor([0, 0.01, 0.1, 0.5, 2, 100])[:, None].double()
    with torch.no_grad():
        target = function(x + sizes * torch.randn_like(x))
    together = answer(function, x, target)
    assert torch.equal(together.target[0], x[0])
    for i in range(6):
        alone = answer(function, x[i : i + 1], target[i : i + 1])
        torch.testing.assert_close(together.target[i : i + 1], alone.target, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(
            together.certificate.residual[i : i + 1], alone.certificate.residual, rtol=1e-3, atol=1e-7
        )


def test_what_the_iteration_leaves_goes_to_gauss_newton() -> None:
    """x ↦ x + F(x) without a solution by fixed points in some samples; every sample does as well as by either."""
    function, x = residual_function(30.0), torch.randn(16, WIDTH).double()
    with torch.no_grad():
        target = function(x + 0.1 * torch.linspace(0.01, 1, 16)[:, None].double() * torch.randn_like(x))
        output = function(x)
        iterated = fixed_point(function, x, output, target, 1e-8 * row_norms(target)).error
        settings = SolveSettings(max_iterations=PRODUCTS)
        op = Op(REGION, "region", {"x": x}, output, {}, {}, function, settings=settings)
        plain = invert_matrix_free(op, target)
    inverse = answer(function, x, target)
    reached = inverse.certificate.residual <= 1e-8
    assert bool((iterated > 1e-6 * row_norms(target)).any()), "the example must need it"
    assert int(reached.sum()) >= int((plain.certificate.residual <= 1e-8).sum())
    assert int(reached.sum()) > int((iterated <= 1e-8 * row_norms(target)).sum())


def test_unattainable_targets_end_soon_and_say_so() -> None:
    """A region that loses a direction: the least-squares solution, or a damped one, within the bound on products."""
    matrix = torch.randn(WIDTH, WIDTH).double()
    matrix[:, 0] = -torch.eye(WIDTH)[:, 0]
    function, calls = count(lambda x: x + x @ matrix.T)
    x = torch.randn(5, WIDTH).double()
    target = function(x) + torch.randn_like(x)
    calls[0] = 0
    value, certificate = answer(function, x, target)
    assert certificate.status in (Status.LEAST_SQUARES, Status.DAMPED)
    assert float(certificate.residual.min()) > 1e-3
    assert certificate.iterations <= PRODUCTS + 2
    inverse = torch.linalg.pinv(torch.eye(WIDTH, dtype=torch.float64) + matrix)
    expected = x + (target - function(x)) @ inverse.T
    best = relative(function(expected) - target, target)
    assert bool((certificate.residual <= 1.01 * best).all())
    torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-3)


def test_what_is_not_finite_fails_alone() -> None:
    function, x = residual_function(0.3), torch.randn(4, WIDTH).double()
    target = function(x + 0.1 * torch.randn_like(x)).detach()
    expected = answer(function, x, target).target
    broken = target.clone()
    broken[2, 3] = torch.nan
    inverse = answer(function, x, broken)
    assert inverse.certificate.failed.tolist() == [False, False, True, False]
    assert inverse.certificate.status is Status.FAILED
    kept = [0, 1, 3]
    torch.testing.assert_close(inverse.target[kept], expected[kept], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_reached_to_half_of_its_digits(dtype: torch.dtype) -> None:
    function = residual_function(0.3)
    x = torch.randn(4, WIDTH).to(dtype)

    def rounded(v: Tensor) -> Tensor:
        return function(v.double()).to(v.dtype)

    with torch.no_grad():
        target = rounded(x + 0.2 * torch.randn_like(x))
    value, certificate = answer(rounded, x, target)
    assert value.dtype == dtype
    assert float(certificate.residual.max()) <= torch.finfo(dtype).eps ** 0.5


# --- in the graph -------------------------------------------------------------------------------------------


def test_a_residual_block_is_inverted_through_its_region() -> None:
    block, x = BasicBlock(6, 6).eval(), torch.randn(8, 6, 5, 5).relu()
    with torch.no_grad():
        target = block(x + 0.2 * torch.randn_like(x))
    inverse = fxinvert.invert(block, x[:2], output_target=lambda outputs, labels: labels)
    rec = inverse(x, target)
    assert float(rec.consistency("x").max()) <= 1e-4
    assert rec.certificates["x"].iterations <= 12
    same = fxinvert.invert(inverse.graph, output_target=own_output)(x, target)
    assert all(torch.equal(same.targets[name], same.anchors[name]) for name in same.names)


def test_what_a_relu_cuts_off_does_not_bind_the_region_before_it() -> None:
    """Batch normalization calibrated to the batch: the branch is as large as the input, and many units are off."""
    torch.manual_seed(0)
    block, x = BasicBlock(8, 8), torch.randn(6, 8, 6, 6).relu()
    block.bn1.momentum = block.bn2.momentum = 1.0
    with torch.no_grad():
        block.train()(x)
        target = block.eval()(x + 0.15 * x.std() * torch.randn_like(x))
    errors = []
    for hinged in (False, True):
        inverse = fxinvert.invert(block, x, output_target="regression")
        regions = [m for m in inverse.graph_module.modules() if hasattr(m, "hinged")]
        assert any(m.hinged for m in regions)
        for module in regions:
            vars(module)["hinged"] &= hinged
        rec = inverse(x, target)
        errors.append(float(rec.consistency("x").mean()))
        same = inverse(x, rec.anchors[rec.names[-1]])
        assert torch.equal(same.targets["x"], x)
    assert errors[1] < 0.3 * errors[0]


def test_before_a_relu_a_target_out_of_reach_is_approached_as_the_relu_sees_it() -> None:
    """Noise asks many units that are off to be slightly on; to bring them there would cost the others their targets."""
    torch.manual_seed(0)
    block, x = BasicBlock(8, 8), torch.randn(6, 8, 6, 6).relu()
    block.bn1.momentum = block.bn2.momentum = 1.0
    with torch.no_grad():
        block.train()(x)
        output = block.eval()(x)
        target = output + 0.05 * output.square().mean().sqrt() * torch.randn_like(output)
    rec = fxinvert.invert(block, x, output_target="regression")(x, target)
    with torch.no_grad():
        before, after = (
            relative(value - target.relu(), target.relu()) for value in (output, block(rec.targets["x"]))
        )
    assert bool((after < 0.75 * before).all())


def test_nested_regions_are_made_when_they_are_called_and_saved_with_what_is_in_them() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).tanh()
            z = y + 0.1 * self.b(y)
            result: Tensor = x + 0.1 * self.c(z + 0.1 * z.sin())
            return result

    model, x, target = Nested().eval(), torch.randn(3, 4), torch.randn(3, 4)
    inverse = fxinvert.invert(model, x, output_target="regression")
    regions = {n: m for n, m in inverse.graph_module.named_modules() if isinstance(m, Region)}
    assert len(regions) == 3
    assert all(region._interior is None for region in regions.values())
    saved = pickle.loads(pickle.dumps(inverse.graph_module))
    outer = saved.get_submodule("x_to_add_2_inverse.function").interior
    assert {torch.ops.aten.tanh.default, torch.ops.aten.sin.default} < {n.target for n in outer.graph.nodes}
    found = inverse(x, target).targets
    anchors = inverse.synthesis.walk.anchors(inverse.forward(x))
    with torch.no_grad():
        again, _ = saved(target, *anchors)
    assert all(torch.equal(found[name], again[name]) for name in again)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_normalizations_inside_a_region_are_folded_into_convolutions(bias: bool, affine: bool) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=bias), nn.BatchNorm2d(4, affine=affine)
            self.read_twice, self.other = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.read_twice(x)
            result: Tensor = x + self.norm(self.conv(x)).tanh() + y * self.other(y)
            return result

    model, x = Block().double(), torch.randn(8, 4, 5, 5).double()
    model(x)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    inverse = fxinvert.invert(model.eval(), x, output_target=own_output)
    regions = [m for m in inverse.graph_module.modules() if isinstance(m, Region)]
    region = max(regions, key=lambda r: len(r.interior.graph.nodes))
    norms = {torch.ops.aten.batch_norm.default, folded.scaled}
    left = [(n.name, n.target) for n in region.interior.graph.nodes if n.target in norms]
    assert left == [("other", folded.scaled)]
    held = dict(inverse.graph.named_parameters()) | dict(inverse.graph.named_buffers())
    kernels = [node for node in region.interior.graph.nodes if node.target is held_convolution]
    assert len(kernels) == 2
    assert not any(node.target in CONVOLUTIONS for node in region.interior.graph.nodes)
    names = [n.name for n in region.interior.graph.find_nodes(op="placeholder")]
    values = {n.name: held[str(n.target)] for n in inverse.graph.graph.find_nodes(op="get_attr")}
    torch.testing.assert_close(region(*(x if name == "x" else values[name] for name in names)), model(x))


def test_normalizations_that_are_not_folded_are_differentiated_as_products_and_sums() -> None:
    graph = fxinvert.trace(
        nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)).eval(), torch.randn(2, 2, 4, 4)
    )
    (norm,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.batch_norm.default)
    assert folded.differentiated(norm, {norm.args[0]}) is folded.scaled


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3, 2)], ids=["features", "maps"])
@pytest.mark.parametrize("affine", [False, True])
def test_a_scaled_normalization_is_torchs_up_to_its_second_derivatives(
    dtype: torch.dtype, shape: tuple[int, ...], affine: bool
) -> None:
    mean, *others = torch.randn(3, 4).to(torch.promote_types(dtype, torch.float32))
    gain, shift = others if affine else (None, None)
    options = (gain, shift, mean, mean.square() + 0.5, False, 0.1, 1e-3, False)
    x, u = torch.randn(2, *shape).to(dtype)

    def pulled(function: Callable[..., Tensor]) -> list[Tensor]:
        leaf, dual = x.clone().requires_grad_(), u.clone().requires_grad_()
        y = function(leaf, *options)
        (back,) = torch.autograd.grad(y, leaf, dual, create_graph=True)
        return [y, back, *torch.autograd.grad(back, dual, x)]

    for found, expected in zip(pulled(folded.scaled), pulled(torch.ops.aten.batch_norm.default), strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reconstruction", ["nodewise", "linearized"])
def test_what_torch_differentiates_once_is_put_together_from_what_it_differentiates_twice(
    reconstruction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gate = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x).tanh()
            gated: Tensor = y * nn.functional.hardsigmoid(3 * self.gate(y.mean((2, 3), keepdim=True)))
            return gated

    torch.manual_seed(0)
    model, x = Gated().double(), torch.randn(3, 4, 5, 5).double()
    labels = model(x).detach() + 0.01 * torch.randn(3, 6, 5, 5).double()

    def targets() -> dict[str, Tensor]:
        inverse = fxinvert.invert(model, x, output_target="regression", reconstruction=reconstruction)  # type: ignore[arg-type]
        return dict(inverse(x, labels).targets)

    def unused(*_: object) -> Tensor:
        raise AssertionError("forward mode evaluates the function anew")

    with monkeypatch.context() as patch:
        patch.setattr(Jacobian, "_forward_mode", unused)
        found = targets()
    with monkeypatch.context() as patch:
        patch.setattr(folded, "differentiated", lambda node, following: node.target)
        patch.setattr(replay, "differentiated", lambda node, following: node.target)
        for name, target in targets().items():
            torch.testing.assert_close(found[name], target, rtol=1e-6, atol=1e-8)


def test_a_region_keeps_its_rule_when_it_is_saved() -> None:
    inverse = fxinvert.invert(BasicBlock(4, 4).eval(), torch.randn(2, 4, 5, 5))
    (rule,) = (
        module.rule
        for module in inverse.graph_module.modules()
        if getattr(getattr(module, "rule", None), "key", None) == REGION
    )
    assert pickle.loads(pickle.dumps(rule)).invert is invert_region


def test_a_wide_function_near_the_identity_does_not_pass_for_one_of_single_values() -> None:
    matrix = 0.01 * torch.randn(4096, 4096) / 64
    x = torch.randn(2, 4096)
    assert not bool(acts_on_values(Jacobian(lambda v: v + v @ matrix.T, x)).any())
    assert bool(acts_on_values(Jacobian(lambda v: v + v.tanh(), x)).all())
