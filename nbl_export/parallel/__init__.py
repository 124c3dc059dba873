"""Processes of torchrun that work together."""
