"""The paper's protocol (FR-PT, arXiv 2506.07188), and the package's methods from the same starting models.

Everything up to a cut is trained on CE + w·MSE to the reconstructed features, later layers are frozen: AdamW 5e-5, weight
decay 0.05, batch 256, 10 epochs. Targets are reconstructed once, from the starting model in eval mode, towards the nearest
output with the label on top. w follows α as in `fxinvert.training.joint`; α = 0 is fine-tuning of the same layers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxinvert
from benchmarks.studies import baselines, ours, paper_page
from benchmarks.studies.curve import Curve, follow
from benchmarks.studies.data import NORMALIZE, pools
from benchmarks.studies.frame import Run, Study
from benchmarks.studies.paper_page import EPOCHS, WHOLE
from benchmarks.studies.starts import CONVERGED, start
from benchmarks.studies.tasks import TESTED, Task
from fxinvert.models.samples import OUTPUT, Samples
from fxinvert.training import Gradient, Optimizer
from fxinvert.training.joint import Average, target_weight

ALPHAS = (0.0, 0.02, 0.1, 0.3)
BATCH, LEARNING_RATE, WEIGHT_DECAY = 256, 5e-5, 0.05
HELD_OUT = 1500
#: of the package's methods
REVISIONS = ours.REVISIONS | {"gradient": 6}
#: epochs of α = 0 where it is compared with what passes over the data more often than the protocol
LONG = 48


class Protocol(NamedTuple):
    """The protocol of one network and so many samples.

    Attributes:
        name: of its runs.
        network: which.
        samples: of its training data.
        cuts: modules, after whose output everything is frozen.
        own: the package's methods from the same start.
        quick: whether it belongs to the quick form.
    """

    name: str
    network: str
    samples: int
    cuts: tuple[str, ...]
    own: tuple[str, ...] = ("closed_form", "gradient")
    quick: bool = False


PROTOCOLS = [
    Protocol("mnist_cnn", "mnist_cnn", 10_000, ("4", "1"), quick=True),
    Protocol("cifar_cnn", "cifar_cnn", 5_000, ("10", "7")),
    Protocol("cifar_cnn-whole", "cifar_cnn", WHOLE, ("10", "7"), ("closed_form", "gradient", "auto")),
    Protocol("resnet20", "resnet20", 500, ("layer3",), ()),
]


def runs(seeds: int) -> Iterator[Run]:
    """Each α at each cut, and the package's methods."""
    for seed in range(seeds):
        for name, network, samples, cuts, own, quick in PROTOCOLS:
            given: dict[str, Any] = {"network": network, "samples": samples}
            for cut in cuts:
                for alpha in ALPHAS:
                    epochs = LONG if "auto" in own and not alpha else EPOCHS
                    settings = given | {"method": "joint", "cut": cut, "alpha": alpha, "epochs": epochs}
                    yield Run(f"{name}-joint-{cut}-{alpha:g}", settings, seed, quick and cut == cuts[0])
            for method in own:
                settings = given | {"method": method, "revision": REVISIONS[method]}
                yield Run(f"{name}-{method}", settings, seed, quick and method == "closed_form")


def measure(run: Run) -> dict[str, Any]:
    """The starting model, and the curve: of the protocol a point an epoch, of ours a point a sweep.

    Of the automatic method one point, and how many passes over the data it made.
    """
    given = run.settings
    work = task(given["network"], given["samples"], run.seed)
    (begun,) = follow([work.model], work.held_out, work.tests)
    models: Iterable[nn.Module]
    counted = Counted(list(work.train.batches()))
    baselines.warm_up(work.model, work.train)
    ours.warm_up()
    match given["method"]:
        case "joint":
            models = joint(work.model, given["cut"], given["alpha"], work.train, run.seed, given["epochs"])
        case "gradient":
            models = ours.sweeping(work, segment_gradient(run.seed), 1, output_target="cross_entropy")
        case "auto":
            models = auto(work, counted)
        case _:
            models = ours.sweeping(
                work, fxinvert.training.ClosedForm(last_layer=False), 4, schedule="parallel"
            )
    curve: Curve = follow(models, work.held_out, work.tests, every=True)
    found = {"start": {**begun, "seconds": 0.0}, "curve": curve}
    return found | {"passes": counted.passes} if given["method"] == "auto" else found


class Counted:
    """Batches that count how often they are passed over."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches, self.read = batches, 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.read += 1
            yield batch

    @property
    def passes(self) -> float:
        """Over all batches; the first only looks at what there is, and does not count."""
        return self.read / len(self.batches) - 1


def auto(work: Task, counted: Counted) -> Iterator[nn.Module]:
    """What the package chooses by itself, in one sweep."""
    result = fxinvert.post_train(
        work.model,
        counted,
        validation_data=work.held_out.batches(),
        method="auto",
        sweeps=1,
        progress=False,
    )
    yield result.model


def segment_gradient(seed: int) -> Gradient:
    """Every segment alone, towards its own target."""
    return Gradient(Optimizer(learning_rate=1e-4, epochs=3, batch_size=BATCH, seed=seed))


def task(network: str, samples: int, seed: int) -> Task:
    """A converged model, samples of its own training data drawn by the seed, and others to choose by."""
    all_of = pools(network)
    drawn = torch.randperm(len(all_of.old), generator=torch.Generator().manual_seed(seed))[:samples]
    parts = [
        all_of.old.select(drawn),
        all_of.new.select(torch.arange(HELD_OUT)),
        all_of.test.select(torch.arange(TESTED[network])),
    ]
    train, held_out, test = (NORMALIZE[network](part) for part in parts)
    return Task(start(CONVERGED[network]), train, held_out, {"test": test})


def joint(
    model: nn.Module, cut: str, alpha: float, train: Samples, seed: int, epochs: int = EPOCHS
) -> Iterator[nn.Module]:
    """The protocol: the model after every epoch.

    Args:
        model: left as it is.
        cut: the module whose output is the cut.
        alpha: α.
        train: images and classes.
        seed: of the order.
        epochs: passes over them.
    """
    trained = copy.deepcopy(model)
    (images,), labels = train.inputs, train.labels[OUTPUT]
    targets = reconstructed(model.eval(), cut, images, labels) if alpha else None
    seen: list[Tensor] = []
    trained.get_submodule(cut).register_forward_hook(lambda module, inputs, output: seen.append(output))
    trainable = _up_to_the_cut(trained, images[:2], seen)
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    generator, task_average, distance_average = torch.Generator().manual_seed(seed), Average(), Average()
    for _ in range(epochs):
        trained.train()
        for rows in torch.split(torch.randperm(len(images), generator=generator), BATCH):
            seen.clear()
            loss = F.cross_entropy(trained(images[rows]), labels[rows])
            if targets is not None:
                distance = F.mse_loss(seen[0], targets[rows])
                averages = task_average.add(loss.item()), distance_average.add(distance.item())
                loss = loss + target_weight(alpha, *averages) * distance
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        seen.clear()
        yield trained


def reconstructed(model: nn.Module, cut: str, images: Tensor, labels: Tensor) -> Tensor:
    """The targets at a cut: `(N, …)`."""
    inverse = fxinvert.invert(model, images[:2], output_target="nearest")
    paths = {node: node.meta["path"] for node in inverse.graph.graph.nodes if node.op == "call_function"}
    node = [node for node, path in paths.items() if f"{path}.".startswith(f"{cut}.")][-1]
    with torch.no_grad():
        return torch.cat(
            [
                inverse.targets(inverse.forward(part), own, [node])[node]
                for part, own in zip(torch.split(images, BATCH), torch.split(labels, BATCH), strict=True)
            ]
        )


def _up_to_the_cut(model: nn.Module, example: Tensor, seen: list[Tensor]) -> list[nn.Parameter]:
    """The parameters that the value at the cut depends on; the others are frozen."""
    model(example)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(seen[0].sum(), parameters, allow_unused=True)
    seen.clear()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)
    return [parameter for parameter in parameters if parameter.requires_grad]


STUDY = Study("paper", 1, runs, measure, paper_page.section, paper_page.pictures)
