"""Pooling and interpolation: averages are affine, maxima have a closed form. One line per op."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from fxinvert.linalg import Function
from fxinvert.rules.affine import channels, invert_affine
from fxinvert.rules.certificate import Inverse, Status, certified, row_norms
from fxinvert.rules.movement import invert_movement
from fxinvert.rules.op import Op
from fxinvert.rules.rule import Kind, Rule
from fxinvert.rules.windows import Sliding, each, sliding


def channelwise(op: Op, target: Tensor, spatial: int) -> Inverse:
    """One linear system over the last `spatial` axes, the same for every channel."""
    anchor = op.anchor
    one_channel = (1, *anchor.shape[anchor.dim() - spatial :])
    # the op has no parameters: it works in any dtype, and half precisions have too few digits
    like = anchor.new_zeros((), dtype=torch.promote_types(anchor.dtype, torch.float32))
    return invert_affine(op, target, lambda: Function(op.evaluate, one_channel, like), channels(spatial))


def average(key: str, spatial: int) -> Rule:
    """A rule for averages, over windows or with the weights of an interpolation."""

    def invert(op: Op, target: Tensor) -> Inverse:
        """One linear system, the same for every channel."""
        return channelwise(op, target, spatial)

    return Rule(key, invert, Kind.AFFINE)


def interpolate(op: Op, target: Tensor) -> Inverse:
    """Nearest neighbours are copies; every other mode is a linear system for every channel."""
    if op.attributes["mode"].startswith("nearest"):
        return invert_movement(op, target)
    return channelwise(op, target, op.anchor.dim() - 2)


def maximum(key: str, spatial: int) -> Rule:
    """A rule for maxima over windows."""

    def invert(op: Op, target: Tensor) -> Inverse:
        return invert_maximum(op, target, sliding(each(op.attributes["kernel_size"], spatial), op.attributes))

    return Rule(key, invert, Kind.CLOSED_FORM)


def invert_maximum(op: Op, target: Tensor, window: Sliding) -> Inverse:
    """Nearest input whose maxima over sliding windows are the target."""
    n = len(window.kernel)
    size, out = op.anchor.shape[-n:], target.shape[-n:]
    if window.tiles and all(m * k <= s for m, k, s in zip(out, window.kernel, size, strict=True)):
        return _invert_tile_maxima(op, target, window.kernel)
    index = sliding_index(window, size, out).to(op.anchor.device)
    return invert_window_maxima(op, target, index, n, disjoint=window.disjoint)


def tile_maxima(value: Tensor, kernel: Sequence[int]) -> Tensor:
    """The maxima over tiles of the last axes; what no whole tile covers is left out."""
    for axis, size in enumerate(kernel, value.dim() - len(kernel)):
        whole = value.narrow(axis, 0, value.shape[axis] // size * size)
        value = reduce(torch.maximum, torch.unflatten(whole, axis, (-1, size)).unbind(axis + 1))
    return value


def _invert_tile_maxima(op: Op, target: Tensor, kernel: tuple[int, ...]) -> Inverse:
    """The same for windows that are tiles: entries above the target come down to it, and the first largest becomes it."""
    anchor, n = op.anchor, len(kernel)
    x, t, largest = (v.reshape(-1, *v.shape[v.dim() - n :]) for v in (anchor, target, op.output))
    value, missing = x.clone(), torch.ones_like(t, dtype=torch.bool)
    # what is at the same place in every tile, at once
    for place in itertools.product(*map(range, kernel)):
        own = (slice(None), *(slice(i, k * m, k) for i, k, m in zip(place, kernel, t.shape[1:], strict=True)))
        entries = x[own]
        found = (entries == largest) & missing
        value[own] = torch.where(found, t, torch.minimum(entries, t))
        missing ^= found
    value = value.reshape(anchor.shape)
    return certified(op, target, value, lambda found: {"status": Status.NEAREST})


def invert_window_maxima(op: Op, target: Tensor, index: Tensor, spatial: int, *, disjoint: bool) -> Inverse:
    """Nearest input whose window maxima are the target.

    No entry may exceed the targets of the windows that it lies in (its cap), and every window needs one entry that is
    its target. So entries above their cap come down to it, and every window still without its maximum raises one
    entry whose cap is its target: the one that is cheapest for the number of windows that it serves. Of these, what
    others make superfluous stays down. For disjoint windows that is the nearest point. For overlapping ones the target
    is reached wherever it can be; choosing best is a set cover, and the certificate says nearest where the choice costs
    no more than the bound that linear programming duality sets (Chvátal, Math. Oper. Res. 4, 1979), else exact. A window whose every entry is capped below its
    target by a neighbour gets the largest value it can have; a map that this brings no closer to its target than it
    was stays as it was.

    Args:
        op: the op.
        target: `(B, C, *positions)`.
        index: `(positions, entries)`, the flat index of every input in every window, −1 for none.
        spatial: number of spatial dimensions.
        disjoint: whether no input lies in two windows.
    """
    anchor = op.anchor
    size, out = anchor.shape[-spatial:], target.shape[-spatial:]
    x, t = anchor.reshape(-1, size.numel()), target.reshape(-1, out.numel())
    inside = index >= 0
    index = index.clamp(min=0)

    def spread(values: Tensor, reduce: str, start: float) -> Tensor:
        """Combines values of window entries `(rows, positions, entries)` into those of the inputs."""
        result = torch.full_like(x, start)
        flat = torch.where(inside, values, start).flatten(1)
        return result.scatter_reduce(1, index.flatten().expand(len(x), -1), flat, reduce)

    def entries(values: Tensor) -> Tensor:
        return values[:, index]

    ceiling = spread(t[..., None].expand(*t.shape, index.shape[1]), "amin", torch.inf)
    lowered = torch.minimum(x, ceiling)
    attained = torch.where(inside, entries(lowered), -torch.inf).amax(-1, keepdim=True)
    reachable = torch.where(inside, entries(ceiling), -torch.inf).amax(-1, keepdim=True)
    goal = torch.minimum(t[..., None], reachable)
    lacking = (attained < goal) & inside
    eligible = lacking & (entries(ceiling) == goal)
    served = spread(eligible.to(x.dtype), "sum", 0.0)
    price = (ceiling - lowered).square()
    share = torch.where(eligible, entries(price / served.clamp(min=1)), torch.inf)
    least, choice = share.min(-1, keepdim=True)
    chosen = torch.zeros_like(eligible).scatter(-1, choice, True) & eligible
    raised = spread(chosen.to(x.dtype), "amax", 0.0) > 0
    while not disjoint:
        # dearest first: what every window that it serves can spare
        serving = (eligible & entries(raised)).sum(-1, keepdim=True).expand_as(eligible)
        spare = raised & (
            spread(torch.where(eligible, serving, torch.inf).to(x.dtype), "amin", torch.inf) > 1
        )
        dear = entries(torch.where(spare, price, -1)).masked_fill(~eligible, -1)
        top = torch.zeros_like(eligible).scatter(-1, dear.argmax(-1, keepdim=True), True)
        spare &= spread(torch.where(eligible, top, True).to(x.dtype), "amin", 1.0) > 0
        if not bool(spare.any()):
            break
        raised &= ~spare
    value = torch.where(raised, ceiling, lowered)
    # in any choice, what an entry costs is paid by the windows that it serves: none pays less than its least share
    bound = torch.where(eligible.any(-1), least[..., 0], 0).sum(1)
    spent = torch.where(raised, price, 0).sum(1)
    proven = disjoint or bool((spent <= bound * (1 + torch.finfo(x.dtype).eps ** 0.5)).all())
    unattained = (goal < t[..., None]).flatten(1)
    if bool(unattained.any()):
        reached = op(value.reshape(anchor.shape)).reshape(t.shape)
        farther = row_norms(reached - t) > row_norms(op.output.reshape(t.shape) - t)
        value = torch.where(farther[:, None], x, value)
    value = value.reshape(anchor.shape)
    missed = int(unattained.sum())
    best = Status.NEAREST if proven else Status.EXACT
    facts = {"status": Status.PROJECTED if missed else best, "projected": missed}
    return certified(op, target, value, lambda found: facts)


def adaptive_maximum(key: str, spatial: int) -> Rule:
    """A rule for maxima over the windows of an adaptive pooling, which differ in size."""

    def invert(op: Op, target: Tensor) -> Inverse:
        """Nearest input whose window maxima are the target, as for `invert_maximum`."""
        size, out = op.anchor.shape[-spatial:], target.shape[-spatial:]
        index = adaptive_index(size, out).to(op.anchor.device)
        disjoint = all(n % m == 0 for n, m in zip(size, out, strict=True))
        return invert_window_maxima(op, target, index, spatial, disjoint=disjoint)

    return Rule(key, invert, Kind.CLOSED_FORM)


def adaptive_index(size: Sequence[int], out: Sequence[int]) -> Tensor:
    """The inputs in each window of an adaptive pooling, ⌊i n / m⌋ to ⌈(i + 1) n / m⌉: `(positions, entries)`, −1 for none."""
    index = torch.zeros(1, 1, dtype=torch.long)
    for n, m in zip(size, out, strict=True):
        start = torch.arange(m) * n // m
        end = -(-(torch.arange(m) + 1) * n // m)
        widest = int((end - start).max()) if m else 0
        own = start[:, None] + torch.arange(widest)
        own = torch.where(own < end[:, None], own, -1)
        outer, inner = index[:, None, :, None], own[None, :, None, :]
        joined = torch.where((outer < 0) | (inner < 0), -1, outer * n + inner)
        index = joined.reshape(len(index) * m, -1)
    return index


def sliding_index(window: Sliding, size: Sequence[int], out: Sequence[int]) -> Tensor:
    """The inputs in each sliding window, by their flat places: `(positions, entries)`, −1 for padding."""
    index = torch.arange(math.prod(size)).reshape(1, 1, *size)
    return window.unfold(index, out, fill=-1).reshape(math.prod(out), -1)


def maximum_index(op: Op) -> Tensor:
    """The same for an op of `MAXIMA`."""
    spatial = int(op.key[-2])
    size, out = op.anchor.shape[-spatial:], op.output.shape[-spatial:]
    if "kernel_size" not in op.attributes:
        return adaptive_index(size, out)
    return sliding_index(sliding(each(op.attributes["kernel_size"], spatial), op.attributes), size, out)


#: maxima over windows
MAXIMA = tuple(f"{kind}max_pool{spatial}d" for kind in ("", "adaptive_") for spatial in (1, 2, 3))


def rules() -> list[Rule]:
    return [
        average("avg_pool1d", 1),
        average("avg_pool2d", 2),
        average("avg_pool3d", 3),
        average("adaptive_avg_pool1d", 1),
        average("adaptive_avg_pool2d", 2),
        average("adaptive_avg_pool3d", 3),
        average("upsample_linear1d", 1),
        average("upsample_bilinear2d", 2),
        average("upsample_bicubic2d", 2),
        average("upsample_trilinear3d", 3),
        Rule("interpolate", interpolate, Kind.AFFINE),
        maximum("max_pool1d", 1),
        maximum("max_pool2d", 2),
        maximum("max_pool3d", 3),
        adaptive_maximum("adaptive_max_pool1d", 1),
        adaptive_maximum("adaptive_max_pool2d", 2),
        adaptive_maximum("adaptive_max_pool3d", 3),
    ]
