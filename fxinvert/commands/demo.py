"""The demonstration: repair a network that was stopped early, next to back-propagation, and prove the export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import fxinvert
from fxinvert import models
from fxinvert.commands.config import PostTrainConfig
from fxinvert.commands.inputs import EXAMPLE_ROWS
from fxinvert.commands.run import finish, measure, write_plan
from fxinvert.models.data import Batches, stratified_split
from fxinvert.report import Contender, comparison_table, history_table
from fxinvert.result import PostTrainingResult
from fxinvert.scheduling.run_directory import RunDirectory
from fxinvert.training.baseline import AdamWRun, ShuffledBatches, adamw_for
from fxinvert.training.order import SWEEPS

HELD_OUT = 270
LEARNING_RATES = (3e-4, 1e-3, 3e-3)


@dataclass(frozen=True)
class Parts:
    """The digits in three parts: to train on, to judge steps and choose learning rates on, and to report."""

    x: Tensor
    y: Tensor
    held_out: Batches
    test: Batches

    @property
    def train(self) -> Batches:
        return models.batches(self.x, self.y)

    @classmethod
    def of(cls, data: models.ImageData) -> Parts:
        """The parts that the networks' weights were made with: they have not seen the held-out part either."""
        x, y = data.x_train, data.y_train
        kept, held = stratified_split(y, HELD_OUT)
        return cls(
            x[kept], y[kept], models.batches(x[held], y[held]), models.batches(data.x_test, data.y_test)
        )


def demo(name: str, state: str, directory: Path | None, seed: int, console: Console) -> Path:
    """Runs the demonstration; the path of the run directory.

    Args:
        name: of the reference network.
        state: of its weights: "early" or "converged".
        directory: where to write; None: `runs/` and the time.
        seed: of the order in which AdamW sees the samples.
        console: where to tell about it.

    Raises:
        FxInvertError: there is no such network, or the directory cannot be written.
    """
    with one_thread():
        return _demo(name, state, directory, seed, console)


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps torch to one thread: on networks this small more only get in each other's way, AdamW's tenfold."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _demo(name: str, state: str, directory: Path | None, seed: int, console: Console) -> Path:
    model, parts = models.load(name, state), Parts.of(models.digits())
    config = PostTrainConfig.of(
        model=f"fxinvert.models:{name}", data="fxinvert.models:digits", sweeps=SWEEPS, seed=seed
    )
    with RunDirectory.create(directory) as run:
        run.write_json("demo.json", {"model": name, "state": state, "sweeps": SWEEPS, "seed": seed})
        example = parts.x[:EXAMPLE_ROWS]
        _heading(console, f"Post-training {name}, {state}, without back-propagation")
        console.print(
            f"Data: scikit-learn's digits, 8x8 pixels; {len(parts.y):,} samples to train on, {HELD_OUT} held out to judge "
            "steps by, 450 to test on. torch uses one thread.\nThe plan: every segment gets its own target from the inverse graph, and is "
            "trained by one linear solve."
        )
        plan = fxinvert.partition(fxinvert.trace(model, example))
        write_plan(run, plan)
        console.print(plan)
        result = _post_train(model, parts, config, plan)
        console.print(history_table(result.history))
        test = measure(model, parts.test, "test data"), measure(result.model, parts.test, "test data")

        _heading(
            console, f"Side by side with AdamW: same data, {result.seconds:.2f} s for each learning rate"
        )
        rivals = _rivals(model, parts, result.seconds, seed, console)
        contenders = _contenders(result, test, parts, rivals)
        console.print(comparison_table(contenders))
        console.print(
            "AdamW minimizes the cross-entropy by back-propagation; of its learning rates the one with the least held-out "
            "loss is in bold."
        )
        unharmed = None if state == "converged" else _no_harm(name, parts, config, console)

        _heading(console, "The result")
        figures: dict[str, Any] = {"comparison": [_figures(row) for row in contenders]}
        if unharmed is not None:
            figures["converged"] = unharmed
        times = {"comparison": {f"{row.name} {row.remark}".strip(): row.seconds for row in contenders}}
        finish(run, config, result, {"test": test}, (example,), console, figures, times)
    return run.path


def _post_train(
    model: nn.Module, parts: Parts, config: PostTrainConfig, plan: fxinvert.Plan
) -> PostTrainingResult:
    return fxinvert.post_train(
        model,
        parts.train,
        plan=plan,
        method=config.method,
        schedule=config.schedule,
        output_target=config.output_target,
        sweeps=config.sweeps,
        validation_data=parts.held_out,
        damping=config.damping,
        satisfied_weight=config.satisfied_weight,
    )


def _rivals(model: nn.Module, parts: Parts, seconds: float, seed: int, console: Console) -> list[AdamWRun]:
    data, runs = ShuffledBatches(parts.x, parts.y), []
    for rate in LEARNING_RATES:
        with console.status(f"AdamW, learning rate {rate:g}"):
            runs.append(adamw_for(model, data, seconds, rate, seed))
    return runs


def _contenders(
    result: PostTrainingResult, test: tuple[Any, Any], parts: Parts, rivals: list[AdamWRun]
) -> list[Contender]:
    measured = [measure(run.model, parts.held_out, "held-out data") for run in rivals]
    best = min(range(len(rivals)), key=lambda i: measured[i].loss)
    rows = [
        Contender("as given", result.baseline, test[0]),
        Contender("fxinvert", result.final, test[1], result.seconds, f"closed form, {SWEEPS} sweeps", True),
    ]
    for i, run in enumerate(rivals):
        tested = measure(run.model, parts.test, "test data")
        remark = f"learning rate {run.learning_rate:g}, {run.steps} steps"
        rows.append(Contender("AdamW", measured[i], tested, run.seconds, remark, i == best))
    return rows


def _no_harm(name: str, parts: Parts, config: PostTrainConfig, console: Console) -> dict[str, Any]:
    """Post-trains the converged weights too, which must get no worse."""
    _heading(console, "No harm: the same with the converged weights")
    model = models.load(name, "converged")
    result = _post_train(
        model, parts, config, fxinvert.partition(fxinvert.trace(model, parts.x[:EXAMPLE_ROWS]))
    )
    before, after = measure(model, parts.test, "test data"), measure(result.model, parts.test, "test data")
    console.print(
        comparison_table(
            [
                Contender("as given", result.baseline, before),
                Contender("fxinvert", result.final, after, result.seconds),
            ]
        )
    )
    return {
        "held_out": {"before": result.baseline.to_dict(), "after": result.final.to_dict()},
        "test": {"before": before.to_dict(), "after": after.to_dict()},
    }


def _figures(row: Contender) -> dict[str, Any]:
    return {
        "method": row.name,
        "remark": row.remark,
        "held_out": row.held_out.to_dict() if row.held_out else None,
        "test": row.test.to_dict() if row.test else None,
        "chosen": row.winner,
    }


def _heading(console: Console, text: str) -> None:
    console.print(f"\n{text}", style="bold")
