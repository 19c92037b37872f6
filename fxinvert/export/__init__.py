"""ONNX out, with the proof that the file computes what the model computes.

`export_onnx` writes a file only after it was checked and run; `verify_onnx` is that proof alone, for a file that is
already there. Nothing here imports onnx or onnxruntime until one of the two is called.
"""

from __future__ import annotations

from fxinvert.export.inverse import export_inverse
from fxinvert.export.onnx_file import export_onnx
from fxinvert.export.proof import verify_onnx
from fxinvert.export.summary import ExportReport, OutputDifference
from fxinvert.export.update import update_onnx

__all__ = ["ExportReport", "OutputDifference", "export_inverse", "export_onnx", "update_onnx", "verify_onnx"]
