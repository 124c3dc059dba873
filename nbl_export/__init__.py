"""nbl-export: Neural Block Linearization of decoder LLMs, from checkpoint to a verified engine.

Importing this package loads neither torch nor any engine; see `nbl_export.cli` for the command line.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
