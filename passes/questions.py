"""Questions: what code asks tensors for in Python, and what a message says of those that stop a capture."""

from __future__ import annotations

from dataclasses import dataclass
from types import CodeType
from typing import Any

from fxinvert.passes.spared import advice


@dataclass(frozen=True)
class Question:
    """One question to a tensor: its name, where it is asked, the answer, and whether data or parameters decide that.

    `spared` has the optional inputs that would have kept the model from asking; `asker` is the function that asks.
    """

    name: str
    place: str | None
    answer: Any
    decided: bool
    spared: tuple[str, ...] = ()
    asker: CodeType | None = None

    def __str__(self) -> str:
        """What a message says of one that data or parameters decide, or that only larger batches ask."""
        where = f" at {self.place}" if self.place else ""
        if not self.decided:
            return (
                f"with more samples it asks for other values{where} ({self.name}), as a loop over samples does: let it "
                f"compute all of them at once{advice(self.spared)}"
            )
        choice = isinstance(self.answer, bool)
        instead = (
            "let it compute both ways and choose with torch.where"
            if choice
            else "let it go on with the tensor, as x[index] does with one of several places, and keep as many rows as there may be"
        )
        return (
            f"it asks for values{where} ({self.name}) that follow its input or parameters, and the answer changes what it "
            f"computes: {instead}, or, if all data give one answer, let forward() make itself what decides it{advice(self.spared)}"
        )
