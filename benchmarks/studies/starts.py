"""The models that studies start from: trained once from a recipe, and kept in a cache outside the repository."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.studies.data import DATA, NORMALIZE, pools
from benchmarks.studies.networks import ResNet20, cifar_cnn, mnist_cnn
from fxinvert import models
from fxinvert.models.samples import OUTPUT
from fxinvert.models.train import reproducible
from fxinvert.scheduling.keys import content_key

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fxinvert" / "studies"

FRESH: dict[str, Callable[[], nn.Module]] = {
    "digits_cnn": lambda: models.create("digits_cnn"),
    "digits_resnet": lambda: models.create("digits_resnet"),
    "mnist_cnn": mnist_cnn,
    "cifar_cnn": cifar_cnn,
    "resnet20": ResNet20,
}


@dataclass(frozen=True)
class Recipe:
    """How a starting model is trained, by AdamW on cross-entropy.

    Attributes:
        network: which.
        epochs: passes over the old data; a share of one stops there.
        learning_rate: at the beginning; it falls to 0 along a cosine.
        smoothing: of the labels.
        augment: whether images are moved by up to 4 pixels, and mirrored.
        without: a class that is left out.
        published: whether training goes on from published weights.
        batch_size: samples per step.
        seed: of initial weights and order.
    """

    network: str
    epochs: float
    learning_rate: float = 1e-3
    smoothing: float = 0.0
    augment: bool = False
    without: int | None = None
    published: bool = False
    batch_size: int = 256
    seed: int = 0


#: fully trained, and stopped early
CONVERGED = {
    "digits_cnn": Recipe("digits_cnn", 60, batch_size=64),
    "digits_resnet": Recipe("digits_resnet", 60, batch_size=64),
    "mnist_cnn": Recipe("mnist_cnn", 10, learning_rate=1e-2),
    "cifar_cnn": Recipe("cifar_cnn", 12, learning_rate=3e-3, smoothing=0.1, augment=True, batch_size=128),
    "resnet20": Recipe("resnet20", 0, published=True),
}
EARLY = {
    "digits_cnn": Recipe("digits_cnn", 8, batch_size=64),
    "digits_resnet": Recipe("digits_resnet", 4, batch_size=64),
    "mnist_cnn": Recipe("mnist_cnn", 1),
    "cifar_cnn": Recipe("cifar_cnn", 5),
}


def start(recipe: Recipe) -> nn.Module:
    """The model that a recipe makes, in eval mode; read from the cache if it was made before."""
    file = CACHE / f"{recipe.network}-{content_key(recipe)[:16]}.safetensors"
    model = FRESH[recipe.network]()
    if recipe.published:
        model.load_state_dict(load_file(DATA / "cifar_resnet20.safetensors"))
        if not recipe.epochs:
            return model.eval()
    if not file.exists():
        with reproducible(recipe.seed):
            if not recipe.published:
                model = FRESH[recipe.network]()
            _train(model, recipe)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        save_file(model.state_dict(), partial)
        partial.replace(file)
    model.load_state_dict(load_file(file))
    return model.eval()


def _train(model: nn.Module, recipe: Recipe) -> None:
    samples = NORMALIZE[recipe.network](pools(recipe.network).old)
    if recipe.without is not None:
        samples = samples.select((samples.labels[OUTPUT] != recipe.without).nonzero()[:, 0])
    (x,), y = samples.inputs, samples.labels[OUTPUT]
    steps = int(recipe.epochs * (len(x) // recipe.batch_size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.empty(0, dtype=torch.int64)
    model.train()
    for _ in range(steps):
        if len(order) < recipe.batch_size:
            order = torch.randperm(len(x))
        rows, order = order[: recipe.batch_size], order[recipe.batch_size :]
        images = _augmented(x[rows]) if recipe.augment else x[rows]
        loss = F.cross_entropy(model(images), y[rows], label_smoothing=recipe.smoothing)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        falling.step()


def _augmented(x: Tensor) -> Tensor:
    """The batch (N, C, H, W) moved by up to 4 pixels together, half of its images mirrored."""
    down, right = (int(v) for v in torch.randint(0, 9, (2,)))
    height, width = x.shape[2:]
    moved = F.pad(x, (4, 4, 4, 4))[:, :, down : down + height, right : right + width]
    return torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, moved, moved.flip(3))
