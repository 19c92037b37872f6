"""On a CUDA device: rules against the evaluation of their ops, sweeps against AdamW there and against the processor."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import nn

from benchmarks import rules, sweep
from benchmarks.measure import Ratio, ratio

MODULES = (
    nn.ReLU(),
    nn.Sigmoid(),
    nn.GELU(),
    nn.SiLU(),
    nn.LayerNorm(32),
    nn.LayerNorm((16, 32, 32)),
    nn.GroupNorm(4, 16),
)


def run(rows: int = 2048) -> Iterator[Ratio]:
    """Inverse over forward, for `rows` samples of 16×32×32 values, enough to fill the device; then sweeps."""
    yield from _sweeps()
    torch.manual_seed(0)
    x, other = torch.randn(2, rows, 16, 32, 32, device="cuda")
    for module in MODULES:
        on_device = module.to("cuda").eval()
        target, forward = on_device(other).detach(), functools.partial(on_device, x)
        for compiled in (False, True):
            inverted = rules.inversion(on_device, x, target, compiled=compiled)
            what = f"{rules.name_of(module)}: invert{', compiled' if compiled else ''}"
            with torch.no_grad():
                yield ratio(what, inverted, "forward", forward)


def _sweeps(samples: int = 4096, batch: int = 512) -> Iterator[Ratio]:
    for name, model, shape in sweep.networks():
        epoch, sweeps = sweep.passes(model, shape, samples, batch, "cuda")
        _, others = sweep.passes(model, shape, samples, batch)
        here, there = sweeps["parallel"], others["parallel"]
        yield ratio(f"{name}: closed-form sweep", here, "AdamW epoch", epoch)
        yield ratio(f"{name}: closed-form sweep", here, "on the processor, one thread", there)
    epoch, sweeps = sweep.passes(sweep.wide(), (3, 32, 32), samples, batch, "cuda")
    yield ratio("2,048 wide: closed-form sweep", sweeps["parallel"], "AdamW epoch", epoch)
