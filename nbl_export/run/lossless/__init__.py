"""Lossless decoding of a run: the stage, its drafts and figures, and `bench --lossless`."""
