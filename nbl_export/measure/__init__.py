"""Speed and memory of decoders, measured side by side."""
