"""Prepares a model's matrices for rounding to few bits."""
