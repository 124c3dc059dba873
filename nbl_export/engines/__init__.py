"""Engines: what runs a decoder graph. Differences between them are data (`engines.base.Capabilities`)."""
