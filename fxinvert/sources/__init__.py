"""Models and data by name: what the command line is given, loaded or refused with a reason.

A model is `package.module:factory`, a `.pt2` file, `timm:NAME`, `torchvision:NAME` or `transformers:DIR`; data is an
`.npz` or `.csv` file, a folder of images, `datasets:DIR`, or `package.module:factory` of a loader.
"""

from __future__ import annotations

from fxinvert.sources.data import Data, load_data
from fxinvert.sources.factory import find_object, import_module, is_factory
from fxinvert.sources.images import ImageFolder
from fxinvert.sources.models import find_device, load_model, open_model
from fxinvert.sources.options import DataOptions
from fxinvert.sources.preprocessing import Preprocessing, no_better_than_chance
from fxinvert.sources.weights import load_weights, read_weights

__all__ = [
    "Data",
    "DataOptions",
    "ImageFolder",
    "Preprocessing",
    "find_device",
    "find_object",
    "import_module",
    "is_factory",
    "load_data",
    "load_model",
    "load_weights",
    "no_better_than_chance",
    "open_model",
    "read_weights",
]
