"""Compressed networks for other engines: ONNX, and C."""

from .check import Agreement, compare_onnx, onnx_session, openvino_session
from .header import to_c_header
from .onnx import Exported, to_onnx

__all__ = ["Agreement", "Exported", "compare_onnx", "onnx_session", "openvino_session", "to_c_header", "to_onnx"]
