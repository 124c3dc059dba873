"""Publishes a run: model card, checkpoint, and layouts for other runtimes."""
