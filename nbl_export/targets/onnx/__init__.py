"""ONNX Runtime, with GenAI and without."""
