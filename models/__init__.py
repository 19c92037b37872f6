"""Small reference networks with pretrained weights, and the data they are shown.

>>> model = load("digits_cnn", "early")        # doctest: +SKIP
>>> data = digits()                            # doctest: +SKIP
>>> accuracy(model, data.x_test, data.y_test)  # doctest: +SKIP
"""

from __future__ import annotations

from fxinvert.models.data import ImageData, accuracy, batches, digits
from fxinvert.models.networks import DigitsCNN, DigitsMLP, digits_cnn, digits_mlp
from fxinvert.models.zoo import available, card, load

__all__ = [
    "DigitsCNN",
    "DigitsMLP",
    "ImageData",
    "accuracy",
    "available",
    "batches",
    "card",
    "digits",
    "digits_cnn",
    "digits_mlp",
    "load",
]
