"""The Python door: the main job, finished runs, and estimates.

    export, open     ─► Run: loss, speed, curve, compare, to
    estimate         ─► Estimate

Importing this package loads neither torch nor an engine. The stages are functions of values in their own packages:
docs/python.md.
"""

from nbl_export.api.runs import Answers, Estimate, Loss, Point, Run, Speed, estimate, export, open
from nbl_export.errors import NblError

__all__ = ["Answers", "Estimate", "Loss", "NblError", "Point", "Run", "Speed", "estimate", "export", "open"]
