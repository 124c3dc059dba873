"""The acceptance of an engine: what verification leaves for it, and the run of its steps on the target machine."""
