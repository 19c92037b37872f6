"""Regions: a residual block against the reference code's solver, and how the cost grows with batch and depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

import fxinvert
from benchmarks.measure import Ratio, ratio, seconds
from fxinvert.inversion import InverseGraph
from fxinvert.inversion.inverse_graph import Reconstructed
from fxinvert.linalg.memory import LEDGER, human
from fxinvert.models.residual import BasicBlock
from fxinvert.rules.certificate import relative

#: of the reference code: steps of Adam, and their size
STEPS, RATE = 20, 0.01
NOISE = 0.05
#: a quarter of what a machine has
MEMORY = 2**31


def reference(block: nn.Module, x: Tensor, target: Tensor, steps: int = STEPS) -> Tensor:
    """The block's input as the paper's code finds it: Adam on the squared error, from the anchor."""
    value = x.clone().requires_grad_()
    optimizer = torch.optim.Adam([value], lr=RATE)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(block(value), target, reduction="sum").backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return value.detach()


def residual_block(calibrated: bool) -> tuple[nn.Module, Tensor]:
    """A block of 64 channels with weights as torch starts with, in eval mode, and a batch for it.

    As it starts with, batch normalization leaves the residual branch small; calibrated to the batch it makes it as
    large as the input, and the block far from the identity.
    """
    block, x = BasicBlock(64, 64), torch.randn(64, 64, 8, 8).relu()
    if calibrated:
        block.bn1.momentum = block.bn2.momentum = 1.0
        with torch.no_grad():
            block.train()(x)
    return block.eval(), x


class CifarResNet(nn.Module):
    """6n + 2 layers, random weights (He et al. 2015, §4.2): (N, 3, 32, 32) → (N, 10)."""

    def __init__(self, layers: int, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        blocks, inputs = [], width
        for stage in range(3):
            for index in range((layers - 2) // 6):
                outputs = width * 2**stage
                blocks.append(BasicBlock(inputs, outputs, 2 if stage and not index else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(inputs, 10)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, 32, 32) → (N, 10)."""
        logits: Tensor = self.head(self.pool(self.blocks(self.stem(images))).flatten(1))
        return logits


def run() -> Iterator[Ratio]:
    """All of them."""
    yield from blocks()
    yield from batches()
    yield from depths()
    yield from rounds()


def once(
    what: str,
    function: Callable[[], object],
    compared_with: str,
    reference: Callable[[], object],
    aim: float | None = None,
    note: str = "",
) -> Ratio:
    """As `ratio`, for what takes long: one call of each, after one that factorizes."""
    times = []
    for timed in (function, reference):
        timed()
        times.append(seconds(timed, warm=False))
    return Ratio(what, compared_with, times[0] / times[1], aim, note)


def blocks() -> Iterator[Ratio]:
    """A block's input found from its output, over the time of the reference's solver."""
    for calibrated in (False, True):
        torch.manual_seed(0)
        block, x = residual_block(calibrated)
        with torch.no_grad():
            y = block(x)
            reachable = block(x + 0.15 * x.std() * torch.randn_like(x))
            noisy = y + NOISE * y.square().mean().sqrt() * torch.randn_like(y)
        inverse = fxinvert.invert(block, x[:2], output_target=lambda outputs, labels: labels)
        for kind, target in (("reachable", reachable), ("5 % noise", noisy)):

            def ours(inverse: InverseGraph = inverse, x: Tensor = x, target: Tensor = target) -> Tensor:
                values = inverse.forward(x)
                (source,) = inverse.graph.graph.find_nodes(op="placeholder")
                return inverse.targets(values, target, [source])[source]

            def theirs(block: nn.Module = block, x: Tensor = x, target: Tensor = target) -> Tensor:
                return reference(block, x, target)

            with torch.no_grad():
                errors = [float(relative(block(v) - target, target).mean()) for v in (x, ours())]
            answer = theirs()
            with torch.no_grad():
                errors.append(float(relative(block(answer) - target, target).mean()))
            name = "residual block, batch norm calibrated" if calibrated else "residual block"
            yield ratio(
                f"{name}: {kind}",
                ours,
                f"{STEPS} steps of Adam",
                theirs,
                aim=1.0,
                note="error {:.3f} → {:.1e}; theirs {:.1e}".format(*errors),
            )


def batches() -> Iterator[Ratio]:
    """The block for four times as many samples, by sample."""
    torch.manual_seed(0)
    block, x = residual_block(calibrated=False)
    inverse = fxinvert.invert(block, x[:2], output_target=lambda outputs, labels: labels)
    with torch.no_grad():
        target = block(x + 0.15 * x.std() * torch.randn_like(x))
    inverse(x, target)
    measured = ratio(
        "residual block: 64 samples", lambda: inverse(x, target), "16", lambda: inverse(x[:16], target[:16])
    )
    yield replace(measured, ratio=measured.ratio / 4, aim=1.3, note="per sample")


def depths(batch: int = 2) -> Iterator[Ratio]:
    """The reconstruction of a network of 110 layers over one of 20, every node's target."""
    methods: tuple[Reconstructed, ...] = ("linearized", "nodewise")
    torch.manual_seed(0)
    x, y = torch.randn(batch, 3, 32, 32), torch.arange(batch) % 10
    for method in methods:
        deep, shallow = (
            fxinvert.invert(CifarResNet(n).eval(), x[:2], output_target="margin", reconstruction=method)
            for n in (110, 20)
        )
        yield once(
            f"110 layers, {method}",
            lambda i=deep: i(x, y),  # type: ignore[misc]
            "20 layers",
            lambda i=shallow: i(x, y),  # type: ignore[misc]
            aim=6.0,
        )
    yield from shortly(x, y)


def shortly(x: Tensor, y: Tensor) -> Iterator[Ratio]:
    """The same node by node, with the memory that a machine of 8 GiB gives by default: the first batch, and the same again."""
    times = []
    for layers in (110, 20):
        torch.manual_seed(0)
        model = CifarResNet(layers).eval()
        inverse = fxinvert.invert(
            model, x[:2], output_target="margin", reconstruction="nodewise", memory_limit=MEMORY
        )
        times.append([seconds(lambda: inverse(x, y), warm=False) for _ in range(3)])  # noqa: B023
    (cold, *warm), (shallow_cold, *shallow_warm) = times
    what = f"110 layers, nodewise, memory_limit {human(MEMORY)}"
    yield Ratio(f"{what}, first batch", "20 layers", cold / shallow_cold, 6.0)
    yield Ratio(f"{what}, the same again", "20 layers", min(warm) / min(shallow_warm), 6.0)


def rounds(layers: int = 14, batch: int = 2) -> Iterator[Ratio]:
    """The same batch again, node by node, where memory holds a part of the factors only; over the first time."""
    torch.manual_seed(0)
    model = CifarResNet(layers).eval()
    x, y = torch.randn(batch, 3, 32, 32), torch.arange(batch) % 10
    before = LEDGER.limit
    try:
        LEDGER.limit = None
        inverse = fxinvert.invert(model, x[:2], output_target="margin", reconstruction="nodewise")
        inverse(x, y)
        total = LEDGER.held
        for share in (1.0, 0.5):
            del inverse
            inverse = fxinvert.invert(model, x[:2], output_target="margin", reconstruction="nodewise")
            LEDGER.limit = int(share * total)
            cold, _, warm = (seconds(lambda: inverse(x, y), warm=False) for _ in range(3))  # noqa: B023
            yield Ratio(
                f"{layers} layers, node by node, memory for {share:.0%} of the factors",
                "the first batch",
                warm / cold,
                1.0,
                f"{human(total)} of factors",
            )
    finally:
        LEDGER.limit = before
