"""Real images: MNIST, CIFAR-10 and scikit-learn's digits, each cut into three parts once and for all.

MNIST and CIFAR-10 are read from the folder `$FXINVERT_DATA`, by default `../shared/data` beside the repository:
`mnist.npz` and `cifar10_25k.npz` with the arrays `x_train y_train x_test y_test`, pixels uint8.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fxinvert import models
from fxinvert.errors import DataError
from fxinvert.models.samples import OUTPUT, Samples

DATA = Path(os.environ.get("FXINVERT_DATA", Path(__file__).parents[3] / "shared" / "data"))


@dataclass(frozen=True, eq=False)
class Pools:
    """Images (N, C, H, W) in [0, 1] and classes (N,), in three disjoint parts.

    Attributes:
        old: what the starting models were trained on.
        new: what repairs draw their samples from.
        test: what is reported.
    """

    old: Samples
    new: Samples
    test: Samples


@dataclass(frozen=True)
class Normalize:
    """Per channel: minus the mean, over the standard deviation."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def __call__(self, samples: Samples) -> Samples:
        """The same samples, images normalized."""
        mean, deviation = (torch.tensor(v)[:, None, None] for v in (self.mean, self.deviation))
        return Samples(((samples.inputs[0] - mean) / deviation,), samples.labels)


#: what each network's images are normalized with
NORMALIZE = {
    "digits_cnn": Normalize((0.0,), (1.0,)),
    "digits_resnet": Normalize((0.0,), (1.0,)),
    "mnist_cnn": Normalize((0.1307,), (0.3081,)),
    "cifar_cnn": Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "resnet20": Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def pools(network: str) -> Pools:
    """The images that a network is shown."""
    if network.startswith("digits"):
        return digits()
    return mnist() if network == "mnist_cnn" else cifar()


@cache
def digits() -> Pools:
    """1,077, 270 and 450 images (N, 1, 8, 8): the parts that the reference networks were trained with."""
    parts = models.data_of("digits_cnn")
    both = Samples(
        (torch.cat([parts.train.inputs[0], parts.held_out.inputs[0]]),),
        {OUTPUT: torch.cat([parts.train.labels[OUTPUT], parts.held_out.labels[OUTPUT]])},
    )
    return Pools(parts.train, both, parts.test)


@cache
def mnist() -> Pools:
    """50,000, 10,000 and 5,000 images (N, 1, 28, 28)."""
    return _read("mnist.npz", 50_000, 5_000)


@cache
def cifar() -> Pools:
    """15,000, 5,000 and 4,000 images (N, 3, 32, 32)."""
    return _read("cifar10_25k.npz", 15_000, 4_000)


def _read(name: str, old: int, test: int) -> Pools:
    file = DATA / name
    if not file.is_file():
        raise DataError(f"{file} is missing; put it there, or set FXINVERT_DATA to its folder")
    with np.load(file) as arrays:
        read = {key: torch.from_numpy(arrays[key]) for key in arrays}

    def samples(part: str, first: int, last: int | None) -> Samples:
        return Samples(
            (_images(read[f"x_{part}"][first:last]),), {OUTPUT: read[f"y_{part}"][first:last].long()}
        )

    return Pools(samples("train", 0, old), samples("train", old, None), samples("test", 0, test))


def _images(pixels: Tensor) -> Tensor:
    """uint8 (N, H, W) or (N, H, W, C) -> float32 (N, C, H, W) in [0, 1]."""
    channels = pixels[:, None] if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)
    return channels.float() / 255
