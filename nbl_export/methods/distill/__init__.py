"""Trains the maps towards the original model's outputs."""
