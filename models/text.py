"""A short, simple text, written for this package, as numbers: what the character transformer reads."""

from __future__ import annotations

import torch
from torch import Tensor

_PARAGRAPHS = """
the road goes to the town. the car is on the road. the car is red. the driver is in the car.
the sun is in the sky. the sky is blue. the day is warm. the road is dry and the car is fast.

the road goes to the hill. the car goes up the hill. the car is slow on the hill. then the car
goes down the hill, and the car is fast. the driver is happy when the car is fast.

the rain comes in the night. the road is wet in the night. the car is slow when the road is wet.
the driver looks at the road. the lamp of the car is bright, and the road is dark.

a man is on the road. the driver looks at the man. the car stops. the man goes over the road.
then the car goes on. the man looks at the car, and the driver looks at the road.

a dog is on the road. the driver looks at the dog. the car stops. the dog goes over the road.
then the car goes on. the dog looks at the car, and the driver looks at the dog.

the light is red. the car stops when the light is red. then the light is green. the car goes on
when the light is green. the driver looks at the light, and then the driver looks at the road.

the road turns to the left. the car turns to the left. then the road turns to the right, and the
car turns to the right. the car is slow when the road turns. the car is fast when the road is long.

the bus is on the road. the bus is big and slow. the car is behind the bus. the car is slow when
the bus is slow. the bus stops in the town. then the car goes on, and the car is fast.

the snow comes in the winter. the road is white in the winter. the car is slow when the road is
white. the driver looks at the snow. the hill is white, the town is white and the sky is white.

the car goes over the bridge. the river is under the bridge. a boat is on the river. the boat is
slow and the car is fast. the driver looks at the boat, and the man in the boat looks at the car.

the car comes to the town. the car is slow in the town. a man is on the road in the town. the
driver looks at the man. the car stops. the man goes over the road. then the car goes on.

the car goes to the sea. the road to the sea is long. the sea is blue and the sky is blue. the car
stops at the sea. the driver looks at the sea. a boat is on the sea. the boat is white.

the day goes and the night comes. the sky is dark and the road is dark. the lamp of the car is
bright. the driver looks at the road. the car goes to the town, and the town is bright.

the light is red. the bus stops when the light is red, and the car stops behind the bus. then the
light is green. the bus goes on when the light is green, and the car goes on behind the bus.

the road goes up the hill and the road goes down the hill. the car goes up the hill and the car
goes down the hill. the car is slow when the road goes up, and fast when the road goes down.

the river is wet and the rain is wet. the road is wet when the rain comes. the driver looks at the
rain. the car is slow in the rain. then the sun comes, and the road is dry, and the car is fast.

a dog is in the car. the dog looks at the hill and the dog looks at the sea. the dog is happy when
the car is fast. the driver looks at the road. the driver is happy when the dog is happy.

the road turns to the right. a man is on the road. the car is slow when the road turns. the driver
looks at the man. the car stops. the man goes over the road. then the car turns to the right.

the bridge is long and the river is dark. the car is on the bridge in the night. the bus is on the
bridge. the lamp of the bus is bright. the car stops behind the bus. then the bus goes on.

the winter goes and the snow goes. the hill is green. the sun is in the sky and the day is warm.
the car goes to the sea. the driver is happy, the dog is happy, and the road is dry.

the car comes to the light. the light is green. the car goes on when the light is green. a man
looks at the light. then the light is red, and the car stops. the man goes over the road.

the road goes over the river. the boat goes under the bridge. the man in the boat looks at the
bridge. the car goes over the bridge, and the bus is behind the car. the river goes to the sea.

the town is dark in the night. the light in the town is red. the car stops when the light is red.
the driver looks at the light. then the light is green, and the car goes down the road.

the car is red and the bus is blue. the bus goes to the hill and the car goes to the town. the
driver of the bus looks at the car. the driver of the car looks at the road. the day is long.
"""

#: one paragraph a line
TEXT = "\n".join(" ".join(paragraph.split()) for paragraph in _PARAGRAPHS.split("\n\n"))

#: every character that occurs, in the order of its number
ALPHABET = "".join(sorted(set(TEXT)))


def encode(text: str) -> Tensor:
    """The numbers of the characters: int64 (length,)."""
    return torch.tensor([ALPHABET.index(character) for character in text])


def decode(numbers: Tensor) -> str:
    """The characters with these numbers (length,)."""
    return "".join(ALPHABET[number] for number in numbers.tolist())


def windows(text: str, length: int, every: int) -> tuple[Tensor, Tensor]:
    """All pieces of a text that begin at each `every`-th character, and the same moved on by one: (N, length) twice."""
    pieces = encode(text).unfold(0, length + 1, every)
    return pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous()
