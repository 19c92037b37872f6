"""Re-make the weights of the reference networks: ``python -m fxinvert.models.train``.

One run of AdamW per network gives both of its files. *early* is the run at the first check at which it gets
84 % of a held-out part of the training split right; *converged* is the same run at its end. A run looks at
the test split only to note its accuracy. On one machine with one version of torch the files come out the
same byte for byte.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.logging import RichHandler
from rich.progress import track
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fxinvert.errors import REPORT, FxInvertError
from fxinvert.models.data import ImageData, accuracy, digits, stratified_split
from fxinvert.models.zoo import CARD_KEY, FOLDER, NETWORKS, file_name

log = logging.getLogger("fxinvert.models.train")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, besides the data."""

    seed: int
    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    held_out: int = 270
    check_every: int = 5
    early_accuracy: float = 0.84


# Seeds and lengths were picked so that the states land at about 84 % and 97 % of the test split (from seed to
# seed, early varies by 2 points): they are starting points, not a claim about how well this training does.
RECIPES = {"digits_cnn": Recipe(seed=0), "digits_mlp": Recipe(seed=1, steps=1500)}


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Seed torch and keep it to one thread inside; afterwards its random state and threads are as before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def training_steps(model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe) -> Iterator[int]:
    """Train `model` on `x` (N, ...) and `y` (N,) in shuffled batches, endlessly; yield each step's number."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    step = 0
    while True:
        for rows in torch.split(torch.randperm(len(x)), recipe.batch_size):
            optimizer.zero_grad()
            torch.autograd.backward(cross_entropy(model(x[rows]), y[rows]))
            optimizer.step()
            yield (step := step + 1)


def train(name: str, recipe: Recipe, data: ImageData) -> dict[str, bytes]:
    """Train the network `name` from scratch; the contents of its weight files by state."""
    kept, held = stratified_split(data.y_train, recipe.held_out)
    x, y, x_held, y_held = data.x_train[kept], data.y_train[kept], data.x_train[held], data.y_train[held]
    files: dict[str, bytes] = {}
    with reproducible(recipe.seed):
        model = NETWORKS[name]()

        def keep(state: str, step: int) -> None:
            card = {
                "network": name,
                "state": state,
                "step": step,
                "held_out_accuracy": round(accuracy(model, x_held, y_held), 4),
                "test_accuracy": round(accuracy(model, data.x_test, data.y_test), 4),
                "recipe": asdict(recipe),
                "torch": torch.__version__,
            }
            files[state] = save(model.state_dict(), {CARD_KEY: json.dumps(card, sort_keys=True)})
            log.info("%s %s: step %d, test accuracy %.4f", name, state, step, card["test_accuracy"])

        steps = islice(training_steps(model, x, y, recipe), recipe.steps)
        for step in track(steps, name, total=recipe.steps):
            due = "early" not in files and step % recipe.check_every == 0
            if due and accuracy(model, x_held, y_held) >= recipe.early_accuracy:
                keep("early", step)
        if "early" not in files:
            raise FxInvertError(
                f"{name} missed {recipe.early_accuracy:.0%} in {recipe.steps} steps. {REPORT}"
            )
        keep("converged", recipe.steps)
    return files


def main(
    into: Annotated[
        Path, typer.Option(help="The folder to write to; by default the one they are loaded from.")
    ] = FOLDER,
) -> None:
    """Re-make the weight files of all reference networks."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    data = digits()
    into.mkdir(parents=True, exist_ok=True)
    for name, recipe in RECIPES.items():
        for state, content in train(name, recipe, data).items():
            (into / file_name(name, state)).write_bytes(content)


if __name__ == "__main__":
    typer.run(main)
