"""Exporters of decoder graphs that several targets use, and what every exported directory gets."""
