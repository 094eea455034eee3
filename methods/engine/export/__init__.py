"""Compressed networks for other engines: ONNX."""

from .check import Agreement, compare_onnx, onnx_session, openvino_session
from .onnx import Exported, to_onnx

__all__ = ["Agreement", "Exported", "compare_onnx", "onnx_session", "openvino_session", "to_onnx"]
