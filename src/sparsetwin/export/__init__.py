"""Networks for other engines: ONNX, OpenVINO, ``torch.export``, and 2:4 weights for NVIDIA's sparse tensor cores."""

from sparsetwin.export.onnx_file import export_onnx
from sparsetwin.export.openvino_files import export_openvino
from sparsetwin.export.torch_program import export_program
from sparsetwin.export.two_four import check_two_four, to_two_four

__all__ = ["check_two_four", "export_onnx", "export_openvino", "export_program", "to_two_four"]
