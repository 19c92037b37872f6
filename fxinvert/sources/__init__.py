"""Models and data by name: what the command line is given, loaded or refused with a reason.

A model is `package.module:factory`; data is an `.npz` file, a folder of class folders of images, or
`package.module:factory` of a loader.
"""

from __future__ import annotations

from fxinvert.sources.data import Data, load_data
from fxinvert.sources.factory import find_object, import_module, is_factory
from fxinvert.sources.images import ImageFolder
from fxinvert.sources.models import find_device, load_model
from fxinvert.sources.options import DataOptions
from fxinvert.sources.weights import load_weights, read_weights

__all__ = [
    "Data",
    "DataOptions",
    "ImageFolder",
    "find_device",
    "find_object",
    "import_module",
    "is_factory",
    "load_data",
    "load_model",
    "load_weights",
    "read_weights",
]
