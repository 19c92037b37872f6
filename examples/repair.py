"""Repair an under-trained network: a residual network for digits whose training was stopped early.

python examples/repair.py
"""

from __future__ import annotations

import fxinvert
from fxinvert import models
from fxinvert.training import ClosedForm


def main() -> dict[str, float]:
    """Post-trains, and tells the test accuracy before and after."""
    model = models.load("digits_resnet", "early")
    parts = models.data_of("digits_resnet")

    result = fxinvert.post_train(
        model,
        parts.train.batches(),
        validation_data=parts.held_out.batches(),
        method=ClosedForm(every=256),  # solve again after every 256 samples
        schedule="parallel",  # all segments from one pass over the data
        output_target="cross_entropy",
        sweeps=2,
    )

    before, after = (models.scores(m, parts.test)["output"] for m in (model, result.model))
    print(f"held out: {result.baseline} → {result.final}, in {result.seconds:.1f} s")
    print(f"test: accuracy {before:.1%} → {after:.1%}")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
