"""What has to be repaired: a starting model, the few data there are, and what the result is measured on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.studies.baselines import Masks, apply_masks
from benchmarks.studies.corruptions import corrupted
from benchmarks.studies.data import NORMALIZE, Pools, pools
from benchmarks.studies.starts import CONVERGED, EARLY, Recipe, start
from fxinvert.errors import DataError
from fxinvert.models.samples import OUTPUT, Samples

#: of the repair data, kept aside to choose by
HELD_OUT = 0.2
#: the class that is missing
MISSING = 3
#: of the weights of convolutions and linear layers, those with the smallest magnitude
PRUNED = 0.7
BITS = 4
#: of the labels of the repair data, wrong ones
WRONG = 0.2
#: test images, at most
TESTED = {"mnist_cnn": 3000, "cifar_cnn": 3000, "resnet20": 1000}
#: of the test images' noise
TEST_SEED = 1_000_003


@dataclass(frozen=True, eq=False)
class Task:
    """A model and data.

    Attributes:
        model: to start from.
        train, held_out: the repair data: to learn from, and to choose by.
        tests: what is reported, by name: "test", and parts of it.
        masks: which parameters' entries must stay zero.
    """

    model: nn.Module
    train: Samples
    held_out: Samples
    tests: dict[str, Samples]
    masks: Masks | None = None


def task(network: str, repair: str, samples: int, seed: int) -> Task:
    """A task by its name.

    Args:
        network: which.
        repair: what is wrong: a key of `REPAIRS`.
        samples: how many there are to repair with; a fifth is kept aside.
        seed: draws them.

    Raises:
        DataError: nothing is called so.
    """
    if repair not in REPAIRS:
        raise DataError(f"no repair is called {repair!r}; there are: {', '.join(REPAIRS)}")
    generator = torch.Generator().manual_seed(seed)
    all_of = pools(network)
    drawn = _drawn(all_of.new.labels[OUTPUT], samples, generator)
    test = all_of.test.select(torch.arange(min(len(all_of.test), TESTED.get(network, len(all_of.test)))))
    made = REPAIRS[repair](network, Pools(all_of.old, all_of.new.select(drawn), test), seed)
    return replace(
        made,
        train=NORMALIZE[network](made.train),
        held_out=NORMALIZE[network](made.held_out),
        tests={name: NORMALIZE[network](part) for name, part in made.tests.items()},
    )


def _drawn(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Rows of `count` samples, equally many of each class as far as there are, in random order."""
    order = torch.randperm(len(labels), generator=generator)
    classes = range(int(labels.max()) + 1)
    each = -(-count // len(classes))
    kept = torch.cat([order[labels[order] == c][:each] for c in classes])
    return kept[torch.randperm(len(kept), generator=generator)][:count]


def _split(samples: Samples) -> tuple[Samples, Samples]:
    rows, held = torch.arange(len(samples)), round(HELD_OUT * len(samples))
    return samples.select(rows[held:]), samples.select(rows[:held])


def _plain(recipes: dict[str, Recipe]) -> Callable[[str, Pools, int], Task]:
    def make(network: str, drawn: Pools, seed: int) -> Task:
        return Task(start(recipes[network]), *_split(drawn.new), {"test": drawn.test})

    return make


def _shifted(kind: str) -> Callable[[str, Pools, int], Task]:
    def make(network: str, drawn: Pools, seed: int) -> Task:
        new = corrupted(drawn.new, kind, network, seed)
        tests = {"test": corrupted(drawn.test, kind, network, TEST_SEED), "unshifted": drawn.test}
        return Task(start(CONVERGED[network]), *_split(new), tests)

    return make


def _missing(network: str, drawn: Pools, seed: int) -> Task:
    """The class was absent from the last training; of published weights, from two epochs that went on."""
    recipe = replace(CONVERGED[network], without=MISSING)
    if recipe.published:
        recipe = replace(recipe, epochs=1)
    there = drawn.test.labels[OUTPUT] == MISSING
    tests = {
        "test": drawn.test,
        "missing": drawn.test.select(there.nonzero()[:, 0]),
        "others": drawn.test.select((~there).nonzero()[:, 0]),
    }
    return Task(start(recipe), *_split(drawn.new), tests)


def _pruned(network: str, drawn: Pools, seed: int) -> Task:
    model = start(CONVERGED[network])
    weights = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    magnitudes = torch.cat([w.detach().abs().flatten() for w in weights.values()])
    threshold = magnitudes.kthvalue(int(PRUNED * len(magnitudes))).values
    masks = {name: (w.detach().abs() > threshold).float() for name, w in weights.items()}
    apply_masks(model, masks)
    return Task(model, *_split(drawn.new), {"test": drawn.test}, masks)


@torch.no_grad()
def _rounded(network: str, drawn: Pools, seed: int) -> Task:
    """Each output channel's weights rounded to a symmetric grid; afterwards all parameters are free."""
    model = start(CONVERGED[network])
    levels = 2 ** (BITS - 1) - 1
    for weight in (p for p in model.parameters() if p.dim() > 1):
        scale = weight.abs().flatten(1).amax(1).reshape(-1, *[1] * (weight.dim() - 1)) / levels
        weight.copy_((weight / scale).round() * scale)
    return Task(model, *_split(drawn.new), {"test": drawn.test})


def _mislabelled(network: str, drawn: Pools, seed: int) -> Task:
    generator = torch.Generator().manual_seed(seed)
    right = drawn.new.labels[OUTPUT]
    wrong = (right + torch.randint(1, 10, right.shape, generator=generator)) % 10
    labels = torch.where(torch.rand(right.shape, generator=generator) < WRONG, wrong, right)
    return Task(
        start(EARLY[network]), *_split(Samples(drawn.new.inputs, {OUTPUT: labels})), {"test": drawn.test}
    )


REPAIRS: dict[str, Callable[[str, Pools, int], Task]] = {
    "under_trained": _plain(EARLY),
    "noise": _shifted("noise"),
    "blur": _shifted("blur"),
    "contrast": _shifted("contrast"),
    "jpeg": _shifted("jpeg"),
    "missing_class": _missing,
    "pruned": _pruned,
    "four_bit": _rounded,
    "label_noise": _mislabelled,
}
