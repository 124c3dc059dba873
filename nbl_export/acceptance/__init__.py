"""Judges an engine on the GPU that will run it: values to compare with, and steps that tell one cause from the next."""
