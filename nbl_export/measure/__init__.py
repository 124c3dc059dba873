"""Speed, memory and energy of decoders, measured side by side."""
