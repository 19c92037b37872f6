"""What training all segments from one snapshot loses against one after the other, after twice the sweeps."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

import fxinvert
from benchmarks.measure import Ratio
from fxinvert import PostTrainingResult, models

NETWORKS = ("digits_mlp", "digits_cnn", "digits_mixer", "digits_vit", "digits_mbconv", "digits_resnet")
#: sweeps one after the other, and from snapshots
SWEEPS, TWICE = 2, 4
#: of the accuracy, that may be lost
AIM = 0.01


def run() -> Iterator[Ratio]:
    """The under-trained reference networks of digits, by held-out accuracy."""
    torch.set_num_threads(1)
    digits = models.digits()
    batches = models.batches(digits.x_train, digits.y_train)

    def trained(name: str, schedule: str, sweeps: int) -> tuple[PostTrainingResult, float]:
        began = time.process_time()
        result = fxinvert.post_train(models.load(name, "early"), batches, schedule=schedule, sweeps=sweeps)
        return result, time.process_time() - began

    for name in NETWORKS:
        (one_by_one, long), (together, short) = (
            trained(name, schedule, sweeps)
            for schedule, sweeps in (("sequential", SWEEPS), ("parallel", TWICE))
        )
        before, after, other = (
            100 * (metrics.accuracy or 0.0)
            for metrics in (together.baseline, together.final, one_by_one.final)
        )
        yield Ratio(
            f"{name}: held-out accuracy lost, parallel, {TWICE} sweeps",
            f"sequential, {SWEEPS} sweeps",
            (other - after) / 100,
            AIM,
            f"{before:.2f} → {after:.2f} % in {short:.1f} s of the processor; sequential {other:.2f} % in {long:.1f} s",
        )
