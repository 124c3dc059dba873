"""Decoders with caches of fixed size, for any engine."""
