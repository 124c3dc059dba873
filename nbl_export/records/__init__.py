"""Frozen values that packages hand to each other."""
