"""Files of NBL models for other engines: GGUF, and checkpoints of the Nemotron-NAS form."""
