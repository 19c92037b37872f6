"""Ops that move entries: against the pseudo-inverse of their dense Jacobian, in every spelling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rule_samples import Inverted, WithBuffer, assert_is_dense_answer
from torch import Tensor, nn
from torch.nn import functional as F

from fxinvert.errors import NoRuleError
from fxinvert.rules import Op, Status
from fxinvert.rules.movement import invert_movement
from fxinvert.testing import check_rule

Made = nn.Module | Callable[[Tensor], Tensor]
F64, F32 = torch.float64, torch.float32
SEQUENCE, MAP, VOLUME = (3, 4, 6), (3, 4, 6, 4), (3, 2, 3, 3, 3)
INDEX, MASK = torch.tensor([0, 2, 2]), torch.tensor([True, False, True, True])
PASSED, NEAREST, EXACT = Status.PASSED_THROUGH, Status.NEAREST, Status.EXACT


def held(function: Callable[[Tensor, Tensor], Tensor], constant: Tensor) -> Made:
    return WithBuffer(function, constant)


#: key and note, the op, the shape of a batch, the status of a target that can be reached
OPS: dict[str, tuple[Made, tuple[int, ...], Status]] = {
    "permute": (lambda x: x.permute(0, 2, 3, 1), MAP, PASSED),
    "permute-negative": (lambda x: torch.permute(x, (0, -1, 1, -2)), MAP, PASSED),
    "transpose": (lambda x: x.transpose(1, -1), MAP, PASSED),
    "transpose-swapaxes": (lambda x: x.swapaxes(1, 2), MAP, PASSED),
    "movedim": (lambda x: x.movedim(1, -1), MAP, PASSED),
    "moveaxis": (lambda x: torch.moveaxis(x, 1, -1), MAP, PASSED),
    "adjoint": (lambda x: x.adjoint(), MAP, PASSED),
    "getattr": (lambda x: x.mT, MAP, PASSED),
    "flip": (lambda x: x.flip(1, 3), MAP, PASSED),
    "fliplr": (torch.fliplr, MAP, PASSED),
    "roll": (lambda x: torch.roll(x, (1, 2), (2, 3)), MAP, PASSED),
    "rot90": (lambda x: torch.rot90(x, 1, (2, 3)), MAP, PASSED),
    "pixel_shuffle": (nn.PixelShuffle(2), MAP, PASSED),
    "pixel_unshuffle": (nn.PixelUnshuffle(2), MAP, PASSED),
    "channel_shuffle": (nn.ChannelShuffle(2), MAP, PASSED),
    "getitem-select": (lambda x: x[:, 0], MAP, NEAREST),
    "getitem-slices": (lambda x: x[:, ::2, 1:], MAP, NEAREST),
    "getitem-ellipsis": (lambda x: x[..., 0], MAP, NEAREST),
    "getitem-axis": (lambda x: x[:, None], MAP, PASSED),
    "getitem-list": (lambda x: x[:, [0, 2]], MAP, NEAREST),
    "getitem-index": (held(lambda x, i: x[:, i], INDEX), MAP, NEAREST),
    "getitem-mask": (held(lambda x, m: x[:, m], MASK), MAP, NEAREST),
    "slice": (lambda x: torch.ops.aten.slice(x, 1, 1, 3), MAP, NEAREST),
    "index": (held(lambda x, i: torch.ops.aten.index(x, [None, i]), INDEX), MAP, NEAREST),
    "select": (lambda x: x.select(1, 2), MAP, NEAREST),
    "narrow": (lambda x: x.narrow(1, 1, 2), MAP, NEAREST),
    "index_select": (held(lambda x, i: x.index_select(1, i), INDEX), MAP, NEAREST),
    "take_along_dim": (
        held(lambda x, i: torch.take_along_dim(x, i, 1), INDEX.reshape(1, 3, 1, 1)),
        MAP,
        NEAREST,
    ),
    "diagonal": (lambda x: torch.diagonal(x, 0, 2, 3), MAP, NEAREST),
    "tril": (lambda x: x.tril(), MAP, NEAREST),
    "triu": (lambda x: torch.triu(x, 1), MAP, NEAREST),
    "masked_fill": (held(lambda x, m: x.masked_fill(m, -1e9), MASK), MAP, NEAREST),
    "where": (held(lambda x, m: torch.where(m, x, 2.0), MASK), MAP, NEAREST),
    "where-other": (held(lambda x, m: torch.where(m, 2.0, x), MASK), MAP, NEAREST),
    "expand": (lambda x: x.expand(-1, 4, -1), (3, 1, 5), EXACT),
    "repeat": (lambda x: x.repeat(1, 2, 1), SEQUENCE, EXACT),
    "repeat_interleave": (lambda x: x.repeat_interleave(3, dim=1), SEQUENCE, EXACT),
    "repeat_interleave-uneven": (
        held(lambda x, n: x.repeat_interleave(n, dim=1), torch.tensor([1, 3, 1, 0])),
        SEQUENCE,
        NEAREST,
    ),
    "tile": (lambda x: x.tile(2, 1), SEQUENCE, EXACT),
    "diag_embed": (torch.diag_embed, (3, 4), EXACT),
    "pad": (lambda x: F.pad(x, (1, 2), value=3.0), MAP, EXACT),
    "pad-cropped": (lambda x: F.pad(x, (1, 2, -1, 1)), MAP, NEAREST),
    "pad-reflect": (nn.ReflectionPad2d((1, 2, 2, 1)), MAP, EXACT),
    "pad-replicate": (nn.ReplicationPad3d(1), VOLUME, EXACT),
    "pad-circular": (nn.CircularPad1d((2, 1)), SEQUENCE, EXACT),
    "unfold": (nn.Unfold(3, padding=1, stride=2), MAP, EXACT),
    "unfold-method": (lambda x: x.unfold(2, 3, 1), MAP, EXACT),
    "im2col": (lambda x: torch.ops.aten.im2col(x, [2, 2], [1, 1], [0, 0], [1, 1]), MAP, EXACT),
    "fold": (nn.Fold((4, 5), 2), (3, 8, 12), NEAREST),
    "fold-gaps": (nn.Fold((5, 5), 2, stride=3), (3, 8, 4), EXACT),
    "col2im": (
        lambda x: torch.ops.aten.col2im(x, [4, 5], [2, 2], [1, 1], [0, 0], [1, 1]),
        (3, 8, 12),
        NEAREST,
    ),
    "interpolate-nearest": (nn.Upsample(scale_factor=3), SEQUENCE, EXACT),
    "interpolate-uneven": (lambda x: F.interpolate(x, size=(3, 5)), MAP, NEAREST),
    "interpolate-exact": (lambda x: F.interpolate(x, size=(9, 9), mode="nearest-exact"), MAP, EXACT),
    "upsample_nearest2d": (lambda x: torch.ops.aten.upsample_nearest2d(x, None, [2.0, 2.0]), MAP, EXACT),
    "to": (lambda x: x.to(torch.float64), SEQUENCE, PASSED),
    "double": (lambda x: x.double(), SEQUENCE, PASSED),
    "cpu": (lambda x: x.cpu(), SEQUENCE, PASSED),
    "type_as": (held(lambda x, c: x.type_as(c), torch.zeros(1)), SEQUENCE, PASSED),
}
EACH = pytest.mark.parametrize("name", OPS)


@EACH
@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16], ids=["float64", "float32", "bfloat16"])
def test_promises(name: str, dtype: torch.dtype) -> None:
    op, shape, _ = OPS[name]
    if dtype == torch.bfloat16 and name == "masked_fill":
        pytest.skip("next to fillings of -1e9 the rest of a target is nothing in bfloat16")
    report = check_rule(op, torch.randn(shape, dtype=dtype), dtype=dtype)
    assert report.op == name.split("-")[0]
    assert report.identity == 0


@EACH
@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
def test_the_answer_is_that_of_the_pseudo_inverse(name: str, dtype: torch.dtype) -> None:
    op, shape, status = OPS[name]
    op = op.to(dtype) if isinstance(op, nn.Module) else op
    x = torch.randn(shape, dtype=dtype)
    inverted = Inverted(op, x)
    reachable = inverted.op(torch.randn_like(x))
    assert_is_dense_answer(inverted, x, reachable)
    assert_is_dense_answer(inverted, x, torch.randn_like(reachable))
    value, certificate = inverted(x, reachable)
    assert certificate.status is status
    assert float(certificate.residual.max()) <= (1e-8 if dtype == F64 else 1e-4)
    assert torch.equal(inverted(x, inverted.op(x))[0], x)
    if status is PASSED:
        assert torch.equal(inverted.op(value), reachable)


@EACH
def test_no_samples_and_one_sample(name: str) -> None:
    op, shape, _ = OPS[name]
    x = torch.randn(shape)
    inverted = Inverted(op, x)
    target = inverted.op(torch.randn(shape))
    expected, _ = inverted(x, target)
    torch.testing.assert_close(inverted(x[:1], target[:1])[0], expected[:1])
    try:
        runs = inverted.op(x[:0]).shape == target[:0].shape
    except RuntimeError:
        runs = False
    if not runs:
        return  # torch does not do all of these on no samples
    nothing, certificate = inverted(x[:0], target[:0])
    assert nothing.shape == (0, *shape[1:])
    assert certificate.residual.shape == (0,)


@pytest.mark.parametrize("copies", [3, 5, 6, 7, 11, 49])
def test_many_copies_of_an_anchor_are_that_anchor(copies: int) -> None:
    x = torch.randn(50, 7) * 10
    inverted = Inverted(lambda x: x.repeat(1, copies), x)
    assert torch.equal(inverted(x, inverted.op(x))[0], x)


@pytest.mark.parametrize("name", ["permute", "transpose", "getitem-axis", "roll"])
def test_a_target_whose_entries_only_change_places_is_moved_and_nothing_else(name: str) -> None:
    made, shape, _ = OPS[name]
    x = torch.randn(2, *shape[1:])
    inverted = Inverted(made, x)
    target = inverted.op(torch.randn_like(x))
    value, _ = inverted(x, target)
    assert torch.equal(inverted.op(value), target)
    views = inverted.op(x).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert (value.untyped_storage().data_ptr() == target.untyped_storage().data_ptr()) == views


def test_what_is_filled_with_infinities_keeps_its_anchor() -> None:
    x = torch.randn(2, 4)
    op = Op(
        "masked_fill",
        "mask",
        {"self": x},
        x.masked_fill(~MASK, -torch.inf),
        {"mask": ~MASK},
        {},
        lambda x: x.masked_fill(~MASK, -torch.inf),
    )
    target = torch.randn(2, 4).masked_fill(~MASK, -torch.inf)
    value, certificate = invert_movement(op, target)
    assert torch.equal(value, torch.where(MASK, target, x))
    assert not certificate.residual.any()


def test_a_dtype_with_fewer_digits_keeps_the_anchors_that_round_to_their_target() -> None:
    x = torch.randn(4, 50, dtype=F64)
    inverted = Inverted(lambda x: x.bfloat16(), x)
    target = torch.where(torch.rand(4, 50) < 0.5, x.bfloat16(), torch.randn(4, 50).bfloat16())
    value, certificate = inverted(x, target)
    assert torch.equal(value.bfloat16(), target)
    assert torch.equal(value, torch.where(x.bfloat16() == target, x, target.double()))
    assert not certificate.residual.any()


@pytest.mark.parametrize(
    "function", [lambda x: x.flip(0), lambda x: x.roll(1, 0), lambda x: torch.tril(x), lambda x: x.flip(0, 1)]
)
def test_moves_between_samples_are_refused_or_own(function: Any) -> None:
    x = torch.randn(5, 5)
    op = Op("moved", "node", {"self": x}, function(x), {}, {}, function)
    if torch.equal(function(x), x.tril()):  # each sample keeps its own
        assert torch.equal(invert_movement(op, op.output)[0], x)
        return
    with pytest.raises(NoRuleError, match="'node', moved: it moves entries from one sample"):
        invert_movement(op, op.output)
