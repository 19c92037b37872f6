"""Explain a driving decision: the scene that a network steers most wrongly, what each of its parts should have computed,
and how it steers there after post-training on other scenes.

    python examples/explain_a_driving_decision.py [PICTURE.png]
"""

from __future__ import annotations

import sys

import fxinvert
from fxinvert import models

UNIT = 0.05  # rad of the front wheels, positive to the right: what 1 means in the network's output


def main(picture: str | None = None) -> dict[str, float]:
    """Explains the worst scene, post-trains, and tells the steering angle, asked and answered, in rad."""
    model = models.load("driving", "early")
    parts = models.data_of("driving")

    steering = model(*parts.test.inputs)["steering"].detach()
    wanted = parts.test.labels["steering"]
    worst = int((steering - wanted).abs().argmax())
    scene = parts.test.select(slice(worst, worst + 1))  # type: ignore[arg-type]

    found = fxinvert.explain(model, scene.inputs, scene.labels["steering"], output="steering")
    print(
        f"scene {worst}: steers {UNIT * float(steering[worst]):+.3f} rad, should {UNIT * float(wanted[worst]):+.3f}"
    )
    print(found)
    if picture is not None:
        print(f"picture: {found.save(picture, 0, worst)}")

    result = fxinvert.post_train(
        model,
        parts.train.batches(),
        validation_data=parts.held_out.batches(),
        output=("steering", "speed"),
        sweeps=2,
    )
    after = result.model(*scene.inputs)["steering"].item()
    explained = {
        state: models.scores(network, parts.test)["steering"]
        for state, network in (("before", model), ("after", result.model))
    }
    print(f"post-trained, it steers {UNIT * after:+.3f} rad there")
    print(
        f"steering, share of the variance explained, test: {explained['before']:.1%} → {explained['after']:.1%}"
    )
    return {
        "error before": UNIT * abs(float(steering[worst] - wanted[worst])),
        "error after": UNIT * abs(after - float(wanted[worst])),
        "explained before": explained["before"],
        "explained after": explained["after"],
        "shares": float(found.shares.sum()),
    }


if __name__ == "__main__":
    main(*sys.argv[1:2])
