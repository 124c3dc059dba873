"""Collects moments of every layer from a checkpoint and text."""
