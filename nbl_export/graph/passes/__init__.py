"""Passes on an ONNX graph that no method owns: caches dropped and numbered, maps quantised, the tail pruned."""
