"""The rendered road: what stands where in the image, and what a good driver makes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxinvert.models.road import (
    LATERAL_ACCELERATION,
    SPEED_UNIT,
    STEERING_UNIT,
    WHEELBASE,
    Camera,
    Light,
    Scenes,
    drives,
)


def scene(**values: float) -> Scenes:
    """One scene: a straight road, the car in the middle of its lane, even light, no noise; but for the values."""
    plain = dict.fromkeys(
        ("offset", "heading", "curvature", "phase", "yaw_rate", "acceleration", "gradient"), 0.0
    )
    numbers = {**plain, "speed": 10.0, "limit": 15.0, "gain": 1.0, **values}
    return Scenes(
        **{key: torch.tensor([value]) for key, value in numbers.items()}, grain=torch.zeros(1, 16, 24)
    )


def edge(image: Tensor, row: int = 12) -> int:
    """Where the white line at the right edge of the lane is in a row of an image (1, 1, 16, 24)."""
    return int(image[0, 0, row, 12:].argmax()) + 12


def test_a_seed_makes_the_same_scenes() -> None:
    one, two, other = drives(4, seed=3), drives(4, seed=3), drives(4, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(one.inputs, two.inputs, strict=True))
    assert not torch.equal(one.inputs[0], other.inputs[0])
    assert [tuple(values.shape) for values in one.inputs] == [(4, 1, 16, 24), (4, 4)]
    assert {key: tuple(values.shape) for key, values in one.labels.items()} == {
        "steering": (4, 1),
        "speed": (4, 1),
    }


@pytest.mark.parametrize(
    ("camera", "light"),
    [
        (Camera(shift=0.5), Light()),
        (Camera(yaw=0.1), Light()),
        (Camera(), Light(0.6)),
        (Camera(), Light(1, 0.5)),
    ],
)
def test_camera_and_light_change_nothing_but_the_image(camera: Camera, light: Light) -> None:
    usual, shifted = drives(8, seed=0), drives(8, seed=0, camera=camera, light=light)
    assert (usual.inputs[0] - shifted.inputs[0]).abs().mean() > 0.02
    assert torch.equal(usual.inputs[1], shifted.inputs[1])
    assert all(torch.equal(usual.labels[key], shifted.labels[key]) for key in usual.labels)


def test_images_lie_between_black_and_white() -> None:
    images = drives(200, seed=0, light=Light(gain=2.0)).inputs[0]
    assert images.min().item() >= 0.0
    assert images.max().item() == 1.0


def test_sky_lies_above_the_road() -> None:
    image = scene().render()[0, 0]
    assert (image[:6] == 0.75).all()  # the horizon is 2 pixels above the middle: focal length times pitch
    assert image[7:].mean() < 0.6
    higher = scene().render(Camera(pitch=0.3))[0, 0]
    assert (higher[:1] == 0.75).all()
    assert (higher[3:] != 0.75).any(1).all()


@pytest.mark.parametrize(
    "camera", [Camera(), Camera(height=1.6), Camera(pitch=0.15), Camera(height=1.0, pitch=0.08)]
)
def test_edge_line_is_where_the_pinhole_puts_it(camera: Camera) -> None:
    """The lane's edge, 1.6 m to the right, projected row by row: by similar triangles along the optical axis."""
    image, missed = scene().render(camera), []
    pitch = torch.tensor(camera.pitch, dtype=torch.float64)
    for row in range(9, 16):
        along = camera.height / ((row + 0.5 - 8) / 20 + pitch.tan()) / pitch.cos()  # depth
        column = 12 + 20 * 1.6 / along.item()
        if column < 23:
            missed.append(edge(image, row) + 0.5 - column)
    assert len(missed) > 2
    assert max(map(abs, missed)) < 1
    assert abs(sum(missed) / len(missed)) < 0.25


@pytest.mark.parametrize(
    ("values", "camera", "direction"),
    [
        ({"offset": 0.5}, Camera(), 1),
        ({"offset": -0.5}, Camera(), -1),
        ({"heading": 0.06}, Camera(), 1),
        ({"curvature": -0.1}, Camera(), -1),
        ({}, Camera(shift=0.5), -1),
        ({}, Camera(yaw=0.1), -1),
        ({}, Camera(yaw=-0.1), 1),
    ],
)
def test_things_move_the_right_way(values: dict[str, float], camera: Camera, direction: int) -> None:
    row = 10
    usual, moved = scene().render(), scene(**values).render(camera)
    assert (edge(moved, row) - edge(usual, row)) * direction > 0


def test_centre_line_is_dashed() -> None:
    dashes = torch.cat([scene(phase=phase).render() for phase in (0.0, 1.5, 3.0, 4.5)])
    assert dashes[:, 0, 8:, :10].std(0).max() > 0.1
    assert dashes[:, 0, 8:, 12:].std(0).max() == 0  # the edge line is not


@given(
    st.floats(-0.8, 0.8), st.floats(-0.06, 0.06), st.floats(-0.03, 0.03), st.floats(4, 20), st.floats(8, 20)
)
def test_driver_follows_the_lane(
    offset: float, heading: float, curvature: float, speed: float, limit: float
) -> None:
    drawn = scene(offset=offset, heading=heading, curvature=curvature, speed=speed, limit=limit)
    driven = drawn.driven()
    # the wheels' angle gives a circle, tangent to the car's axis, through the lane's centre ahead
    ahead = 5 + 0.5 * speed
    angle = torch.tensor(driven["steering"].item() * STEERING_UNIT)
    reached = angle.tan().item() / WHEELBASE / 2 * ahead**2
    assert reached == pytest.approx(offset + heading * ahead + curvature * ahead**2 / 2, abs=1e-4)
    wanted = driven["speed"].item() * SPEED_UNIT
    assert abs(wanted - speed) <= 3 + 1e-4
    assert wanted <= max(limit, speed - 3) + 1e-4
    assert wanted**2 * abs(curvature) <= max(LATERAL_ACCELERATION, (speed - 3) ** 2 * abs(curvature)) + 1e-3


def test_mirrored_roads_are_driven_mirrored() -> None:
    drawn = Scenes.draw(50, seed=0)
    mirrored = replace(drawn, offset=-drawn.offset, heading=-drawn.heading, curvature=-drawn.curvature)
    torch.testing.assert_close(mirrored.driven()["steering"], -drawn.driven()["steering"])
    torch.testing.assert_close(mirrored.driven()["speed"], drawn.driven()["speed"])


def test_ego_state_is_scaled() -> None:
    ego = drives(500, seed=0).inputs[1]
    assert ego.std(0).min() > 0.3
    assert ego.abs().max() < 6
    drawn = scene(speed=10.0, yaw_rate=0.1, acceleration=-1.0, limit=15.0)
    assert torch.allclose(drawn.ego(), torch.tensor([[2.0, 0.5, -0.5, 3.0]]))


def test_scenes_do_not_depend_on_each_other() -> None:
    drawn = Scenes.draw(6, seed=0)
    second = Scenes(**{key: value[1:2] for key, value in vars(drawn).items()})
    assert torch.equal(drawn.render()[1:2], second.render())
