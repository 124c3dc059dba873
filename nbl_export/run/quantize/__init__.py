"""Activation-aware scales: the stage that chooses them, and the rescaled model that graphs are made from."""
