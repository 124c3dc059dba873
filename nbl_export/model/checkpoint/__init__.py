"""Finds, describes and loads a checkpoint on disk."""
