"""Chooses the layers to replace, and fits their maps from moments."""
