"""Joint training (FR-PT, arXiv 2506.07188): everything up to a cut, on the task's loss and the distance to the target.

The loss is CE + w·MSE with w = α·EMA(CE) / (EMA(MSE) + 1e-8), kept between 1e-5 and 10; the averages decay by 0.9 per
step, and no gradient goes through w. Layers after the cut are frozen. The network is in training mode: batch-norm
statistics move. α = 0 is plain fine-tuning.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxinvert.errors import DataError
from fxinvert.heads import Heads
from fxinvert.output_target import OutputTarget, regression
from fxinvert.passes.capture import attribute, evaluating
from fxinvert.passes.plan import Segment
from fxinvert.training.batch import Batch
from fxinvert.training.context import Context
from fxinvert.training.gradient import Optimizer
from fxinvert.training.metrics import flat_classes, is_classification
from fxinvert.training.replay import batch_norms, leaves_of, replay, statistics_of
from fxinvert.training.variants import given_by
from fxinvert.training.work import Proposal, Update, Work

DECAY = 0.9
LEAST, MOST = 1e-5, 10.0


@dataclass(frozen=True)
class Joint:
    """Everything up to a segment's exit at once, by back-propagation: the paper's method.

    Attributes:
        alpha: α, the weight of the distance to the target relative to the task's loss; 0: plain fine-tuning.
        optimizer: what moves the parameters.
    """

    alpha: float = 0.1
    optimizer: Optimizer = field(
        default_factory=lambda: Optimizer(learning_rate=5e-5, options={"weight_decay": 0.05})
    )
    name: str = "joint"

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise DataError(f"alpha={self.alpha}; it is a weight, at least 0")

    def train(self, work: Work, segments: Sequence[Segment]) -> Iterator[list[Proposal]]:
        """Yields the update of everything up to the segment's exit.

        Raises:
            DataError: there are several segments, whose trained parts would contain one another.
        """
        if len(segments) > 1:
            raise DataError(
                "joint training changes everything up to a cut, so that segments cannot be trained at the same time; "
                "use schedule='single' or 'sequential'"
            )
        arguments = {
            "output_target": work.output_target,
            "exit_path": segments[0].exit,
            "alpha": self.alpha,
            "optimizer": self.optimizer,
        }
        (changes,) = work.each(fit_jointly, [arguments])
        yield [[Update(segments[0].name, changes)]]


class Average:
    """An exponential moving average, which begins with its first value."""

    def __init__(self, decay: float = DECAY) -> None:
        self.decay, self.value = decay, 0.0
        self._empty = True

    def add(self, value: float) -> float:
        """Takes in a value; the average now."""
        self.value = value if self._empty else self.decay * self.value + (1 - self.decay) * value
        self._empty = False
        return self.value


def target_weight(alpha: float, task: float, distance: float) -> float:
    """w for averages of the task's loss and of the squared distance; 0 for α = 0."""
    return min(max(alpha * task / (distance + 1e-8), LEAST), MOST) if alpha else 0.0


def fit_jointly(
    context: Context,
    batches: Iterable[Batch],
    *,
    output_target: OutputTarget,
    exit_path: str,
    alpha: float,
    optimizer: Optimizer,
) -> dict[str, Tensor]:
    """Trains everything up to a cut; targets are those of the model as it was given.

    Args:
        context: the model.
        batches: the data, iterable more than once.
        output_target: what the output should have been.
        exit_path: of the value at the cut.
        alpha: α.
        optimizer: what moves the parameters.

    Returns:
        The changes of parameters and batch-norm statistics, by name.
    """
    inverse, cut = context.inverse(output_target), context.nodes[exit_path]
    leaves = leaves_of(context, parameters_before(context, cut))
    moving = {name for node in batch_norms(context) for name in statistics_of(context, node)}
    buffers = {name: context.tensors[name].detach().clone() for name in sorted(moving)}
    given, optimize = given_by(context, {**leaves, **buffers}), optimizer.over(leaves.values())
    task_average, distance_average, heads = Average(), Average(), Heads.of(context.graph)
    with evaluating(context.graph):
        for batch in optimizer.steps(batches):
            with torch.no_grad():
                values = inverse.forward(batch.inputs)
                target = inverse.targets(values, batch.labels, [cut])[cut] if alpha else values[cut]
            with torch.enable_grad():
                reached = replay(context, values, given, inverse.output_node, training=len(batch) > 1)
                pairs = heads.pairs(reached[inverse.output_node], batch.labels)
                task = torch.stack([task_loss(*pair) for pair in pairs]).sum()
                distance = F.mse_loss(reached[cut], target)
                averages = task_average.add(task.item()), distance_average.add(distance.item())
                loss = task + target_weight(alpha, *averages) * distance
            optimize.zero_grad()
            torch.autograd.backward(loss)
            optimize.step()
    moved = {**leaves, **buffers}
    return {name: value.detach() - context.tensors[name].detach() for name, value in moved.items()}


def task_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy for class numbers, mean squared error for numbers.

    Raises:
        DataError: the labels do not fit the outputs.
    """
    if is_classification(labels):
        return F.cross_entropy(*flat_classes(outputs, labels))
    return F.mse_loss(outputs, regression(outputs, labels))


def parameters_before(context: Context, cut: fx.Node) -> list[str]:
    """The names of the parameters that a value depends on and that are not frozen.

    A model that is frozen throughout was only loaded for inference: all of its parameters count.
    """
    needed = {cut}
    for node in reversed(context.graph.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    read = {id(attribute(context.graph, str(n.target))) for n in needed if n.op == "get_attr"}
    some_open = any(p.requires_grad for p in context.graph.parameters())
    return [
        name
        for name, value in context.tensors.items()
        if isinstance(value, nn.Parameter) and id(value) in read and (value.requires_grad or not some_open)
    ]
