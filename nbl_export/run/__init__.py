"""Runs stages on a run directory: which stages run, on which inputs, and which results are reused."""
