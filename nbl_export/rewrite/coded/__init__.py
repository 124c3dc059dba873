"""Puts matrices in codes of a few bits into a graph."""
