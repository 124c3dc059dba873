"""File formats that are not ours: GGUF."""
