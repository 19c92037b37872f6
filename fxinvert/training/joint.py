"""Joint training (FR-PT, arXiv 2506.07188): everything up to a cut, on the task's loss and the distance to the target.

The loss is CE + w·MSE with w = α·EMA(CE) / (EMA(MSE) + 1e-8), kept between 1e-5 and 10; the averages decay by 0.9 per
step, and no gradient goes through w. Layers after the cut are frozen. The network is in training mode: batch-norm
statistics move. α = 0 is plain fine-tuning.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.func import functional_call
from torch.nn import functional as F

from fxinvert.errors import DataError
from fxinvert.heads import Heads
from fxinvert.output_target import OutputTarget
from fxinvert.passes.capture import attribute, evaluating
from fxinvert.passes.computed import is_open, steps_to
from fxinvert.passes.plan import Segment
from fxinvert.settings import check_numbers
from fxinvert.training.batch import Batch
from fxinvert.training.context import Context
from fxinvert.training.costs import Probe, Stage, size_of
from fxinvert.training.gradient import PASSES, Optimizer, step_memory, stepped
from fxinvert.training.metrics import task_loss
from fxinvert.training.replay import batch_norms, leaves_of, replay, statistics_of, training_graph
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
    schedule: str = "sequential"
    follows_gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_numbers("a weight of at least 0", lambda a: a >= 0, alpha=self.alpha)

    def train(self, work: Work, segments: Sequence[Segment]) -> Iterator[list[Proposal]]:
        """Yields the update of everything up to the segment's exit.

        Raises:
            DataError: there are several segments, whose trained parts would contain one another.
        """
        segment, arguments = self._arguments(work.context, work.output_target, segments)
        ((snapshots, _),) = work.each(fit_jointly, [arguments])
        yield [[Update(segment.name, snapshots[-1])]]

    def stages(self, probe: Probe, segments: Sequence[Segment]) -> Iterator[Stage]:
        """Yields the one task.

        Raises:
            DataError: as `train` does.
        """
        segment, arguments = self._arguments(probe.context, probe.output_target, segments)
        yield course_stage(probe, f"train everything up to {segment.exit}", arguments)

    def _arguments(
        self, context: Context, output_target: OutputTarget, segments: Sequence[Segment]
    ) -> tuple[Segment, dict[str, Any]]:
        if len(segments) > 1:
            raise DataError(
                "joint training changes everything up to a cut, so that segments cannot be trained at the same time; "
                "use schedule='single' or 'sequential'"
            )
        (segment,) = segments
        return segment, {
            "output_target": output_target,
            "exit_path": segment.exit,
            "names": parameters_before(context, context.nodes[segment.exit]),
            "alpha": self.alpha,
            "optimizer": self.optimizer,
        }


def course_stage(probe: Probe, name: str, arguments: dict[str, Any], steps: int = 0) -> Stage:
    """A run of `fit_jointly` with some arguments, of so many steps at least."""
    optimizer: Optimizer = arguments["optimizer"]
    few = arguments | {"optimizer": replace(optimizer, epochs=PASSES)}
    cost, found = probe.measured(fit_jointly, few, optimizer.batch_size)
    per_pass = -(-probe.samples // min(optimizer.batch_size, probe.batch_size))
    size = size_of(found)
    return Stage(
        tasks=((name, cost),),
        by_chunk=False,
        samples=probe.samples,
        memory=step_memory(probe, optimizer) + 2 * size,
        sent=size,
        passes=max(optimizer.epochs, -(-steps // per_pass)),
    )


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


@dataclass
class Course:
    """Where a gradient run has come to, so that it can go on.

    Attributes:
        tensors: parameters and batch-norm statistics, by name.
        averages: their moving averages.
        optimizer: its state; empty before the first step.
        steps: done so far.
    """

    tensors: dict[str, Tensor]
    averages: dict[str, Tensor]
    optimizer: dict[str, Any]
    steps: int


def fit_jointly(
    context: Context,
    batches: Iterable[Batch],
    *,
    output_target: OutputTarget,
    exit_path: str,
    names: Sequence[str],
    alpha: float,
    optimizer: Optimizer,
    normalize_by_batch: bool = True,
    average: float = 0.0,
    steps: int = 0,
    course: Course | None = None,
) -> tuple[list[dict[str, Tensor]], Course]:
    """Trains some parameters, on the task's loss and the distance to a target; targets are those of the model as given.

    Args:
        context: the model.
        batches: the data, iterable more than once.
        output_target: what the output should have been.
        exit_path: of the value at the cut.
        names: of the parameters.
        alpha: α.
        optimizer: what moves the parameters.
        normalize_by_batch: whether batch norm uses the statistics of the batch, and moves its running ones; else it uses
            these, and they stay.
        average: how much of the moving average of parameters and statistics (Polyak & Juditsky 1992) is kept in a step;
            the k-th step keeps (1 + k) / (10 + k) at most, so that the beginning is forgotten, and nothing if it is 0.
        steps: at least, in more passes than the optimizer's if need be.
        course: of an earlier run, which goes on; None: from the parameters as they are.

    Returns:
        The averages' changes after 1, 2, 4, … passes and after all of them, by name; and how the run can go on.
    """
    inverse, cut = context.inverse(output_target), context.nodes[exit_path]
    leaves = leaves_of(context, names)
    normalized = batch_norms(context) if normalize_by_batch else []
    moving = sorted({name for node in normalized for name in statistics_of(context, node)})
    moved = {**leaves, **{name: context.tensors[name].detach().clone() for name in moving}}
    optimize, heads = optimizer.over(leaves.values()), Heads.of(context.graph)
    averages, done = {name: value.detach().clone() for name, value in moved.items()}, 0
    if course is not None:
        with torch.no_grad():
            for name, value in moved.items():
                value.copy_(course.tensors[name])
                averages[name].copy_(course.averages[name])
        if course.optimizer:
            optimize.load_state_dict(copy.deepcopy(course.optimizer))
        done = course.steps
    given, graph = given_by(context, moved), training_graph(context) if moving else context.graph
    task_average, distance_average = Average(), Average()
    snapshots: list[dict[str, Tensor]] = []

    def loss_of(batch: Batch) -> Tensor:
        if not alpha:
            outputs = functional_call(graph, moved, tuple(context.graph.meta["inputs"].tensors(batch.inputs)))
            return torch.stack([task_loss(*pair) for pair in heads.pairs(outputs, batch.labels)]).sum()
        with torch.no_grad():
            values = inverse.forward(batch.inputs)
            target = inverse.targets(values, batch.labels, [cut])[cut]
        reached = replay(context, values, given, inverse.output_node, training=normalize_by_batch)
        pairs = heads.pairs(reached[inverse.output_node], batch.labels)
        task = torch.stack([task_loss(*pair) for pair in pairs]).sum()
        distance = F.mse_loss(reached[cut], target)
        weight = target_weight(alpha, task_average.add(task.item()), distance_average.add(distance.item()))
        return task + weight * distance

    last = done + steps
    with evaluating(context.graph):
        for number, batches_of_steps in enumerate(optimizer.passes(batches), 1):
            before = done
            for batch in batches_of_steps:
                done += 1  # whether or not one is taken: runs side by side go through the data equally often
                if len(batch) == 1 and moving:  # has no variance
                    continue
                stepped(optimize, partial(loss_of, batch))
                context.keep_zeros(leaves)
                kept = min(average, (1 + done) / (10 + done))
                with torch.no_grad():
                    torch._foreach_lerp_(
                        list(averages.values()), [t.detach() for t in moved.values()], 1 - kept
                    )
            ended = number >= optimizer.epochs and (done >= last or done == before)
            if ended or number & (number - 1) == 0:
                snapshots.append(
                    {name: value - context.tensors[name].detach() for name, value in averages.items()}
                )
            if ended:
                break
    now = {name: value.detach() for name, value in moved.items()}
    return snapshots, Course(now, averages, optimize.state_dict(), done)


def parameters_before(context: Context, cut: fx.Node) -> list[str]:
    """The names of the parameters that a value depends on and that are not frozen."""
    needed = {cut}
    for node in reversed(context.graph.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    return parameters_of(context, [node.meta["path"] for node in needed])


def parameters_of(context: Context, paths: Iterable[str]) -> list[str]:
    """The names of the parameters that some ops read, or are given what is computed from them, and that are not frozen."""
    nodes = [context.nodes[path] for path in paths]
    given = steps_to([*nodes, *(n for node in nodes for n in node.all_input_nodes)])
    reads = [n for n in given if n.op == "get_attr"]
    read = {id(attribute(context.graph, str(n.target))) for n in reads}
    found = [name for name, value in context.tensors.items() if id(value) in read]
    return [name for name in found if is_open(context.graph, name)]
