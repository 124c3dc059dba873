"""An ONNX decoder: names, files, checks, caches, anatomy, facts, sizes."""
