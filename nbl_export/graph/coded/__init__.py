"""Matrices that an ONNX graph stores in a few bits."""
