"""On a CUDA device: the results of the processor, everything kept on the device, no waiting in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import test_capacitance
import test_compiled_rules
import test_elementwise_rules
import test_equilibrated
import test_linear_rules
import test_movement_rules
import test_normalization_rules
import test_pooling_rules
import test_reduction_rules
import test_scalar
import test_simplex_rules
import torch
from linear_problems import relative
from rule_samples import ALL
from runs import KINDS, network
from runs import data as points
from test_every_rule import OTHERS, Called
from test_reference_pipeline import NETWORKS, _target, data_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import fxinvert
import fxinvert.models as zoo
from fxinvert.linalg import Convolution, SolveSettings, SpectralFactor, factorize
from fxinvert.linalg.capacitance import Capacitance
from fxinvert.linalg.choice import choose
from fxinvert.rules import Status
from fxinvert.testing import check_rule

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICE = torch.device("cuda")
F64 = torch.float64


def moved(values: Any, device: torch.device = DEVICE) -> Any:
    """Tensors and modules, in whatever holds them, on a device."""
    return pytree.tree_map(lambda v: v.to(device) if isinstance(v, Tensor | nn.Module) else v, values)


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal up to rounding errors of the whole, since single numbers may cancel."""
    assert found.device.type == DEVICE.type
    assert found.dtype == expected.dtype
    assert relative(found.cpu().double(), expected.double()) <= tolerance


# --- rules --------------------------------------------------------------------------------------------------

#: every op of the tables that rules are tried on: how it is made, and the shape of a batch
OPS: dict[str, tuple[Any, tuple[int, ...]]] = {
    **{str(sample): (sample.make, sample.shape) for sample in ALL},
    **{f"{name}-norm": made for name, made in test_normalization_rules.MAKES.items()},
    **test_linear_rules.OPS,
    **{name: (lambda op=op: op, shape) for name, (op, shape, *_) in test_movement_rules.OPS.items()},
    **{name: (lambda op=op: op, shape) for name, (op, shape) in test_pooling_rules.OPS.items()},
    **{name: (lambda op=op: op, (4, 3, 4, 5)) for name, op in test_reduction_rules.OPS.items()},
    **{name: (lambda op=op: op, shape) for name, (op, shape) in test_simplex_rules.OPS.items()},
    **{name: (lambda call=call: Called(call), shape) for name, (call, shape) in OTHERS.items()},
}
#: it leaves the device
del OPS["cpu"]
#: torch's kernels take a sixth in float32, in float64 too
COARSE = ("hardsigmoid", "hardswish")


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", OPS)
def test_rules_keep_their_promises(name: str, dtype: torch.dtype) -> None:
    if name in COARSE and dtype == F64:
        pytest.skip("its kernel on CUDA has the digits of float32")
    make, shape = OPS[name]
    check_rule(moved(make()), torch.randn(shape, dtype=dtype, device=DEVICE), dtype=dtype)


@test_elementwise_rules.cases
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_elementwise_rules_keep_their_promises(case: test_elementwise_rules.Case, dtype: torch.dtype) -> None:
    if case.key in COARSE and dtype == F64:
        pytest.skip("its kernel on CUDA has the digits of float32")
    report = check_rule(moved(case.op(dtype)), case.batch(dtype=dtype).to(DEVICE))
    assert report.identity == 0


@pytest.mark.parametrize("name", test_scalar.FUNCTIONS)
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["float64", "float32"])
def test_activations_that_are_written_out(name: str, dtype: torch.dtype) -> None:
    module, x = test_scalar.Written(test_scalar.FUNCTIONS[name]), torch.randn(6, 5, dtype=dtype)
    for target in (module(torch.randn_like(x)), torch.randn_like(x)):
        expected, found = (
            fxinvert.invert(module, anchor, output_target="regression", reconstruction="nodewise")(
                anchor, goal
            )
            for anchor, goal in ((x, target), moved((x, target)))
        )
        outputs = module(found.targets["x"]), module(expected.targets["x"])
        assert_close(*outputs, tolerance=1e-6 if dtype == F64 else 1e-3)


NORMS: dict[str, Any] = {
    "group": lambda: test_compiled_rules.group_norm(0.5),
    "layer": lambda: nn.LayerNorm(50),
    "instance": lambda: nn.InstanceNorm1d(4, affine=True),
}
COMPILED = test_compiled_rules.MODULES | NORMS


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_rules_answer_as_others_do(name: str) -> None:
    """By Triton."""
    module, x = COMPILED[name]().to(DEVICE), 3 * torch.randn(6, 4 if name in NORMS else 3, 50, device=DEVICE)
    compiled, plain = test_compiled_rules.inverses(module, x)
    for target in (module(torch.randn_like(x)).detach(), 5 * torch.randn_like(x)):
        found, expected = (
            inverse(x, target).certificates["input"].measured() for inverse in (compiled, plain)
        )
        torch.testing.assert_close(found.residual, expected.residual, rtol=1e-3, atol=1e-4)
        assert found.status is expected.status
    for rows in (1, 2, 4):
        some = x[:rows]
        assert torch.equal(compiled(some, module(some).detach()).targets["input"], some)


# --- solvers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 1e-2])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_solvers_of_convolutions(dtype: torch.dtype, damping: float) -> None:
    weight = torch.randn(6, 4, 3, 3, dtype=F64)
    r = torch.randn(5, 6, 9, 9, dtype=F64)
    expected = (
        SpectralFactor(Convolution(weight, (4, 9, 9), (1, 1), (1, 1), (1, 1), 1)).solve(r, damping).correction
    )
    a = Convolution(weight.to(DEVICE, dtype), (4, 9, 9), (1, 1), (1, 1), (1, 1), 1)
    tried = [c for c in choose(a, SolveSettings(max_iterations=500)).candidates if not c.why_not]
    assert len(tried) >= 3
    for candidate in tried:
        found = candidate.make().solve(r.to(DEVICE, dtype), damping).correction
        assert_close(found, expected.to(dtype), 1e-6 if dtype == F64 else 1e-3)


@pytest.mark.parametrize("method", ["capacitance", "banded", "cholesky", None])
@pytest.mark.parametrize(("c_out", "padding", "dtype"), [(3, 1, torch.float32), (2, 0, F64), (4, 2, F64)])
def test_ill_conditioned_convolutions(method: Any, c_out: int, padding: int, dtype: torch.dtype) -> None:
    weight = test_equilibrated.ill_conditioned(c_out, 3, outputs=c_out <= 3).to(dtype)
    a = Convolution(weight, test_equilibrated.SHAPE, (1, 1), (padding, padding), (1, 1), 1)
    r = torch.randn(3, *a.out_shape, dtype=dtype)
    expected = SpectralFactor(a.to(F64)).solve(r.double(), 0.0).correction
    factor = factorize(
        Convolution(weight.to(DEVICE), test_equilibrated.SHAPE, (1, 1), (padding, padding), (1, 1), 1),
        SolveSettings(method=method),
    )
    assert_close(
        factor.solve(r.to(DEVICE), 0.0).correction, expected.to(dtype), 1e-8 if dtype == F64 else 1e-5
    )


@pytest.mark.parametrize("outputs", [3, 4])
def test_a_torus_that_is_raised(outputs: int) -> None:
    a = test_capacitance.annulling(outputs, (3, 2))
    value = torch.randn(4, *a.in_shape, dtype=F64)
    expected = Capacitance(a, outputs=outputs == 3, shift=0.0).solve(value)
    there = Convolution(a.weight.to(DEVICE), a.in_shape, (1, 1), (1, 1), (1, 1), 1)
    assert_close(Capacitance(there, outputs=outputs == 3, shift=0.0).solve(value.to(DEVICE)), expected, 1e-8)


# --- whole networks -----------------------------------------------------------------------------------------


#: a region's steps end when they are near enough
TOLERANCES = {"nodewise": 1e-3, "linearized": 1e-6}
#: nodes that a maximum is taken of, among zeros: of equal ones each device takes another
TIED = {"digits_unet": ("down1.5", "down2.5")}
REACHED = (Status.PASSED_THROUGH, Status.EXACT, Status.NEAREST)


@pytest.mark.parametrize("reconstruction", TOLERANCES)
@pytest.mark.parametrize("name", NETWORKS)
def test_targets_are_those_of_the_processor(name: str, reconstruction: Any) -> None:
    ((inputs, labels),), _, output = data_of(name, 4)
    inputs, labels = (
        pytree.tree_map(lambda v: v.double() if v.is_floating_point() else v, g) for g in (inputs, labels)
    )

    def run(device: torch.device) -> fxinvert.Reconstruction:
        model = zoo.load(name, "converged").double().to(device)
        graph = fxinvert.trace(model, moved(inputs, device), output=output)
        inverse = fxinvert.invert(graph, output_target=_target(labels), reconstruction=reconstruction)
        return inverse(moved(inputs, device), moved(labels, device))

    expected, found = run(torch.device("cpu")), run(DEVICE)
    assert set(found.targets) == set(expected.targets)
    compared = 0
    for node in reversed(expected.names):
        certificate = expected.certificates[node]
        # where a step misses, the last digit of what it began with decides on where it ends
        if reconstruction == "nodewise" and certificate.status not in REACHED:
            break
        if node in TIED.get(name, ()):
            continue
        assert_close(found.targets[node], expected.targets[node], TOLERANCES[reconstruction])
        residual = found.certificates[node].residual.cpu()
        torch.testing.assert_close(residual, certificate.residual, rtol=1e-3, atol=1e-6)
        compared += 1
    assert compared


def reachable(outputs: Tensor, labels: Tensor) -> Tensor:
    return outputs + 0.1 * F.one_hot(labels, outputs.shape[1])


def test_a_warm_inversion_never_waits_for_the_device() -> None:
    model = zoo.load("digits_cnn", "early").to(DEVICE)
    ((inputs, labels),), _, _ = moved(data_of("digits_cnn", 256))
    # the built-in output targets look whether labels are classes, and wait for that
    inverse = fxinvert.invert(fxinvert.trace(model, inputs[:2]), output_target=reachable)
    inverse(inputs, labels)  # factorizes
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = inverse(inputs, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(target.device.type == "cuda" for target in found.targets.values())


@pytest.mark.parametrize("kind", KINDS)
def test_runs_of_every_kind(kind: str) -> None:
    settings = {"output_target": "cross_entropy", "chunk": 4, **KINDS[kind]}
    result = fxinvert.post_train(network().to(DEVICE), moved(points()), **settings)
    assert all(p.device.type == "cuda" for p in result.model.parameters())
    assert result.final.loss < result.baseline.loss
    expected = fxinvert.post_train(network(), points(), **settings)
    assert result.final.loss == pytest.approx(expected.final.loss, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_sweep_over_a_reference_network(name: str) -> None:
    train, held_out, output = moved(data_of(name, 64))
    result = fxinvert.post_train(
        zoo.load(name, "early").to(DEVICE), train, validation_data=held_out, output=output, sweeps=1, progress=False
    )  # fmt: skip
    assert result.final.no_worse_than(result.baseline)
    assert all(p.device.type == "cuda" for p in result.model.parameters())


def test_what_was_trained_is_exported(tmp_path: Path) -> None:
    train, held_out, _ = moved(data_of("digits_cnn", 128))
    model = zoo.load("digits_cnn", "early").to(DEVICE)
    result = fxinvert.post_train(model, train, validation_data=held_out, sweeps=1)
    report = fxinvert.export_onnx(result, train[0][0][:2], tmp_path / "model.onnx")
    assert report.max_abs <= 1e-4
