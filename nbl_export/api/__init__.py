"""The Python door: the main job, finished runs, and the stages as functions of values.

    export, open     ─► Run: loss, speed, curve, compare, to
    estimate         ─► Estimate
    calibrate ─► Calibration ─► plan ─► Planned ─► linearize ─► a model of transformers

Importing this package loads neither torch nor an engine. `import nbl_export` has the names of the first two lines.
"""

from nbl_export.api.runs import Answers, Estimate, Loss, Point, Run, Speed, estimate, export, open
from nbl_export.api.stages import Calibration, Planned, calibrate, linearize, plan
from nbl_export.errors import NblError

__all__ = [
    "Answers",
    "Calibration",
    "Estimate",
    "Loss",
    "NblError",
    "Planned",
    "Point",
    "Run",
    "Speed",
    "calibrate",
    "estimate",
    "export",
    "linearize",
    "open",
    "plan",
]
