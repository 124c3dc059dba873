"""The version, which nbl.json and other records state. Every module may import it."""

__all__ = ["__version__"]

__version__ = "0.1.0"
