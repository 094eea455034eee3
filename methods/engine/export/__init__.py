"""Compressed networks for other engines: ONNX."""

from .check import Agreement, compare_onnx
from .onnx import Exported, to_onnx

__all__ = ["Agreement", "Exported", "compare_onnx", "to_onnx"]
