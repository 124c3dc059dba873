"""Passes on an ONNX graph that no method owns: caches, skip norms, quantised maps, the tail."""
