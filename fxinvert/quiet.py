"""Keep the exporter's chatter away from the user's terminal."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

CHATTER = (
    "torch.onnx",
    "torch.export",
    "torch.fx",
    "torch._export",
    "torch._dynamo",
    "onnxscript",
    "onnx_ir",
)


@contextmanager
def quiet() -> Iterator[io.StringIO]:
    """Hold back warnings, log records and printing of the exporter; everything is as before afterwards.

    What the exporter prints is not lost: it is in the text that the context manager gives.

    Yields:
        The text printed meanwhile.
    """
    loggers = [logging.getLogger(name) for name in CHATTER]
    levels = [logger.level for logger in loggers]
    said = io.StringIO()
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings(), redirect_stdout(said), redirect_stderr(said):
            warnings.simplefilter("ignore")
            yield said
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
