"""Shifted domains: what a worse camera or a slower line makes of images (N, C, H, W) in [0, 1]."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fxinvert.errors import DataError
from fxinvert.models.samples import Samples

#: standard deviation of Gaussian noise, by network: what costs each of them a part of its accuracy
NOISE = {"digits_cnn": 0.35, "digits_resnet": 0.35, "mnist_cnn": 0.5, "cifar_cnn": 0.15, "resnet20": 0.06}
BLUR = 1.0  # standard deviation in pixels
CONTRAST = 0.3  # what is left of it
QUALITY = 15  # of JPEG


def corrupted(samples: Samples, kind: str, network: str, seed: int) -> Samples:
    """The same samples, their images changed: "noise", "blur", "contrast" or "jpeg".

    Raises:
        DataError: no change is called so.
    """
    (images,) = samples.inputs
    match kind:
        case "noise":
            noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
            changed = (images + NOISE[network] * noise).clamp(0, 1)
        case "blur":
            changed = blurred(images)
        case "contrast":
            mean = images.mean((1, 2, 3), keepdim=True)
            changed = mean + CONTRAST * (images - mean)
        case "jpeg":
            changed = torch.stack([_jpeg(image) for image in images])
        case _:
            raise DataError(f"no shift is called {kind!r}; there are noise, blur, contrast and jpeg")
    return Samples((changed,), samples.labels)


def blurred(images: Tensor) -> Tensor:
    """A Gaussian blur over 5 × 5 pixels."""
    at = torch.arange(5) - 2.0
    line = torch.exp(-(at**2) / (2 * BLUR**2))
    kernel = torch.outer(line, line)
    channels = images.shape[1]
    kernel = (kernel / kernel.sum()).expand(channels, 1, 5, 5)
    return F.conv2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), kernel, groups=channels)


def _jpeg(image: Tensor) -> Tensor:
    pixels = (255 * image).byte().permute(1, 2, 0).numpy()
    file = BytesIO()
    Image.fromarray(pixels.squeeze()).save(file, "JPEG", quality=QUALITY)
    read = np.asarray(Image.open(file)).reshape(pixels.shape).copy()
    return torch.from_numpy(read).permute(2, 0, 1).float() / 255
