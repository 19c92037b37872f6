"""Small reference networks with pretrained weights, and the data they are shown.

>>> model = load("digits_cnn", "early")        # doctest: +SKIP
>>> data = digits()                            # doctest: +SKIP
>>> accuracy(model, data.x_test, data.y_test)  # doctest: +SKIP

Any of them, whatever its inputs and outputs:

>>> model = load("driving", "early")           # doctest: +SKIP
>>> parts = data_of("driving")                 # doctest: +SKIP
>>> scores(model, parts.test)                  # doctest: +SKIP
>>> parts.train.batches("steering")            # doctest: +SKIP
"""

from __future__ import annotations

from fxinvert.models.attention import CharTransformer, DigitsViT
from fxinvert.models.data import ImageData, accuracy, batches, digits
from fxinvert.models.dense import DigitsDenseNet
from fxinvert.models.driving import DrivingNet
from fxinvert.models.heads import DigitsTwoHead
from fxinvert.models.mixer import DigitsMixer
from fxinvert.models.mobile import DigitsMBConv
from fxinvert.models.networks import DigitsCNN, DigitsMLP, digits_cnn, digits_mlp
from fxinvert.models.recurrent import DigitsLSTM
from fxinvert.models.residual import DigitsResNet
from fxinvert.models.samples import Parts, Samples, scores
from fxinvert.models.unet import DigitsUNet
from fxinvert.models.zoo import available, card, create, data_of, load

__all__ = [
    "CharTransformer",
    "DigitsCNN",
    "DigitsDenseNet",
    "DigitsLSTM",
    "DigitsMBConv",
    "DigitsMLP",
    "DigitsMixer",
    "DigitsResNet",
    "DigitsTwoHead",
    "DigitsUNet",
    "DigitsViT",
    "DrivingNet",
    "ImageData",
    "Parts",
    "Samples",
    "accuracy",
    "available",
    "batches",
    "card",
    "create",
    "data_of",
    "digits",
    "digits_cnn",
    "digits_mlp",
    "load",
    "scores",
]
