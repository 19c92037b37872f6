"""Exported programs, `.pt2` files: read without running any code of theirs."""

from __future__ import annotations

import logging
import os
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.export.pt2_archive.constants import CUSTOM_OBJ_FILENAME_PREFIX, OPAQUE_OBJ_FILENAME_PREFIX

from fxinvert.errors import DataError

#: with this, torch takes from pickles what it takes with `weights_only=True`, whatever its exporter asks for
SAFE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def load_exported(path: Path) -> nn.Module:
    """The module of an exported program.

    Args:
        path: of a file that `torch.export.save` has written.

    Raises:
        DataError: it is not there, damaged, or holds Python objects besides tensors.
    """
    if not path.is_file():
        raise DataError(f"the model {path} is not there" if not path.exists() else f"{path} is no file")
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.rpartition("/")[2] for name in archive.namelist()]
        objects = (CUSTOM_OBJ_FILENAME_PREFIX, OPAQUE_OBJ_FILENAME_PREFIX)
        strange = next((name for name in names if name.startswith(objects)), None)
        if strange is not None:
            raise DataError(
                f"{path} holds {strange}, a Python object, which is not loaded as it could run code"
            )
        with _tensors_only(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(path).module()
    except DataError:
        raise
    except Exception as error:  # a damaged archive can raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{path} is damaged, no exported program, or holds more than tensors, which is not loaded as it could run "
            f"code ({reason}); torch.export.save writes such files"
        ) from error


@contextmanager
def _tensors_only() -> Iterator[None]:
    before, logger = os.environ.get(SAFE), logging.getLogger("torch.export")
    level = logger.level
    os.environ[SAFE] = "1"
    logger.setLevel(logging.CRITICAL)  # it logs the traceback of what is raised anyway
    try:
        yield
    finally:
        logger.setLevel(level)
        if before is None:
            del os.environ[SAFE]
        else:
            os.environ[SAFE] = before
