"""A seeded renderer of a curved road: what a camera sees, how the car moves, and what a good driver would do.

The ground is flat, the camera a pinhole. The car keeps to the right one of two lanes; the lane's centre, seen from the
car, is at ``offset + heading·z + curvature·z²/2`` metres to the right, z metres ahead. Steering follows pure pursuit
(Coulter 1992, CMU-RI-TR-92-01): the arc through the lane's centre at a look-ahead distance that grows with speed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fxinvert.models.samples import Samples

HEIGHT, WIDTH = 16, 24
FOCAL_LENGTH = 20.0  # in pixels
RAYS = 4  # per pixel, in each direction

LANE = 1.6  # half the width of a lane, metres
MARK = 0.15  # half the width of a lane mark
DASH = 3.0  # length of a dash and of the gap after it
SKY, GRASS, ASPHALT, PAINT = 0.75, 0.3, 0.45, 0.95
HAZE = 60.0  # metres after which colours have faded to 1/e

WHEELBASE = 2.7
LATERAL_ACCELERATION = 2.0  # m/s² that passengers find comfortable
SPEED_CHANGE = 3.0  # m/s by which the wanted speed differs from the present one at most

#: what 1 means in the network's inputs and outputs
SPEED_UNIT = 5.0  # m/s
STEERING_UNIT = 0.05  # rad of the front wheels, positive to the right
YAW_RATE_UNIT = 0.2  # rad/s
ACCELERATION_UNIT = 2.0  # m/s²


@dataclass(frozen=True)
class Camera:
    """Where the camera sits and looks: metres above the ground and right of the car's axis, rad down and right."""

    height: float = 1.3
    pitch: float = 0.1
    yaw: float = 0.0
    shift: float = 0.0


@dataclass(frozen=True)
class Light:
    """A factor for the whole image, and how much brighter it gets from its left edge to its right one."""

    gain: float = 1.0
    gradient: float = 0.0


@dataclass(frozen=True, eq=False)
class Scenes:
    """Everything that differs from scene to scene, float32 (N,), in metres, seconds and rad.

    Attributes:
        offset, heading, curvature: of the lane's centre, as seen from the car; positive to the right.
        phase: how far ahead the first dash of the centre line begins.
        speed, yaw_rate, acceleration: of the car. The yaw rate is measured, with noise.
        limit: the speed limit.
        gain, gradient: of the light.
        grain: the sensor's noise (N, 16, 24).
    """

    offset: Tensor
    heading: Tensor
    curvature: Tensor
    phase: Tensor
    speed: Tensor
    yaw_rate: Tensor
    acceleration: Tensor
    limit: Tensor
    gain: Tensor
    gradient: Tensor
    grain: Tensor

    @classmethod
    def draw(cls, count: int, seed: int) -> Scenes:
        """`count` random scenes, the same ones for the same seed; torch's own generator is left alone."""
        generator = torch.Generator().manual_seed(seed)

        def between(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(count, generator=generator)

        curvature, speed = between(-0.03, 0.03), between(4.0, 20.0)
        return cls(
            offset=between(-0.8, 0.8),
            heading=between(-0.06, 0.06),
            curvature=curvature,
            phase=between(0.0, 2 * DASH),
            speed=speed,
            yaw_rate=speed * curvature + 0.1 * torch.randn(count, generator=generator),
            acceleration=between(-2.0, 2.0),
            limit=between(8.0, 20.0),
            gain=between(0.7, 1.1),
            gradient=between(-0.3, 0.3),
            grain=0.02 * torch.randn(count, HEIGHT, WIDTH, generator=generator),
        )

    def centre(self, distance: Tensor) -> Tensor:
        """How far to the right the lane's centre is at a distance ahead: (N, …) -> (N, …)."""
        offset, heading, curvature = (
            value.reshape(-1, *[1] * (distance.dim() - 1))
            for value in (self.offset, self.heading, self.curvature)
        )
        return offset + heading * distance + curvature / 2 * distance.square()

    def ego(self) -> Tensor:
        """The ego state (N, 4): speed, yaw rate, acceleration and the speed limit, in the units above."""
        return torch.stack(
            [
                self.speed / SPEED_UNIT,
                self.yaw_rate / YAW_RATE_UNIT,
                self.acceleration / ACCELERATION_UNIT,
                self.limit / SPEED_UNIT,
            ],
            1,
        )

    def driven(self) -> dict[str, Tensor]:
        """What a good driver does: {"steering": (N, 1), "speed": (N, 1)}, in the units above."""
        ahead = 5 + 0.5 * self.speed
        steering = torch.atan(2 * WHEELBASE * self.centre(ahead) / ahead.square())
        wanted = torch.minimum(self.limit, (LATERAL_ACCELERATION / self.curvature.abs()).sqrt())
        speed = self.speed + (wanted - self.speed).clamp(-SPEED_CHANGE, SPEED_CHANGE)
        return {"steering": steering[:, None] / STEERING_UNIT, "speed": speed[:, None] / SPEED_UNIT}

    def render(self, camera: Camera = Camera(), light: Light = Light()) -> Tensor:
        """What the camera sees: (N, 1, 16, 24) in [0, 1], each pixel the mean over several rays."""
        right, ahead, hits = _ground(camera)
        beside = right - self.centre(ahead.expand(len(self.offset), -1, -1))
        dashed = torch.remainder(ahead - self.phase[:, None, None], 2 * DASH) < DASH
        paint = (beside - LANE).abs() < MARK
        paint |= (beside + 3 * LANE).abs() < MARK
        paint |= ((beside + LANE).abs() < MARK) & dashed
        asphalt = (beside < LANE + 2 * MARK) & (beside > -3 * LANE - 2 * MARK)
        ground = torch.where(paint, PAINT, torch.where(asphalt, ASPHALT, GRASS))
        colour = torch.where(hits, SKY + (ground - SKY) * torch.exp(-ahead / HAZE), SKY)
        pixels = F.avg_pool2d(colour[:, None], RAYS)[:, 0]
        slope = torch.linspace(-0.5, 0.5, WIDTH) * (self.gradient + light.gradient)[:, None, None]
        lit = pixels * (self.gain * light.gain)[:, None, None] * (1 + slope) + self.grain
        return lit.clamp(0, 1)[:, None]


def drives(count: int, seed: int, camera: Camera = Camera(), light: Light = Light()) -> Samples:
    """Random scenes with what a good driver does: inputs (N, 1, 16, 24) and (N, 4), labels "steering" and "speed".

    The same seed gives the same scenes, whatever the camera and the light.
    """
    scenes = Scenes.draw(count, seed)
    return Samples((scenes.render(camera, light), scenes.ego()), scenes.driven())


def _ground(camera: Camera) -> tuple[Tensor, Tensor, Tensor]:
    """Where the rays meet the ground: metres to the right and ahead, and whether they do at all; (1, H, W) each."""
    rows = ((torch.arange(HEIGHT * RAYS) + 0.5) / RAYS - HEIGHT / 2) / FOCAL_LENGTH
    columns = ((torch.arange(WIDTH * RAYS) + 0.5) / RAYS - WIDTH / 2) / FOCAL_LENGTH
    down, across = torch.meshgrid(rows, columns, indexing="ij")
    pitch, yaw = torch.tensor(camera.pitch), torch.tensor(camera.yaw)
    forward = pitch.cos() - down * pitch.sin()
    down = down * pitch.cos() + pitch.sin()
    across, forward = across * yaw.cos() + forward * yaw.sin(), forward * yaw.cos() - across * yaw.sin()
    hits = (down > 1e-3) & (forward > 0)
    length = camera.height / torch.where(hits, down, 1.0)
    return (camera.shift + length * across)[None], (length * forward)[None], hits[None]
