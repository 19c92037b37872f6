"""Peak memory of a closed-form sweep, for few samples and for many, each in a process of its own."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

import fxinvert
from benchmarks.measure import Ratio
from benchmarks.studies.networks import cifar_cnn

FEW, MANY, BATCH = 2048, 20480, 256


class Made:
    """Batches of random images that are made when asked for, so that the data takes no memory."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(self.samples // BATCH):
            generator = torch.Generator().manual_seed(i)
            yield (
                torch.rand(BATCH, 3, 32, 32, generator=generator),
                torch.randint(0, 10, (BATCH,), generator=generator),
            )


def sweep(samples: int) -> None:
    """One parallel sweep over the CIFAR network."""
    torch.manual_seed(0)
    fxinvert.post_train(
        cifar_cnn(),
        Made(samples),
        validation_data=Made(BATCH),
        schedule="parallel",
        sweeps=1,
        output_target="cross_entropy",
    )


def peak(samples: int) -> int:
    """KiB that a process takes at most for a sweep."""
    command = [sys.executable, "-m", "benchmarks.memory", str(samples)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def run() -> Iterator[Ratio]:
    """Peak memory of the process at 20k samples over that at 2k."""
    few, many = peak(FEW), peak(MANY)
    yield Ratio(
        f"peak memory of a sweep over {MANY} samples",
        f"over {FEW}",
        many / few,
        aim=1.1,
        note=f"{many / 1024:.0f} MiB against {few / 1024:.0f} MiB, the libraries included",
    )


if __name__ == "__main__":
    sweep(int(sys.argv[1]))
    sys.stdout.write(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}\n")
