"""The plan stage: scores of all layers, the order of replacement, and the maps of replaced layers.

moments ─► scores ─► order (`--select`) ─► its first m layers, or the named layers ─► maps
                       └─► curve of quality against speed
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from nbl_export.mixers.base import Mixer
from nbl_export.options.goals import goal_of
from nbl_export.options.options import GIVEN_FIT
from nbl_export.plan.choose import a_quarter, choose
from nbl_export.records.plan import Plan
from nbl_export.report.quality import spoken_curve
from nbl_export.run.job import Job
from nbl_export.run.stages.goal import count_for_goal
from nbl_export.run.stages.selection import Selection
from nbl_export.run_directory import MAPS_FILE, START_FILE

__all__ = ["run"]


def run(job: Job, out: Path) -> dict[str, Any]:
    from nbl_export.model.checkpoint import nbl
    from nbl_export.plan.maps_file import save_maps

    given = job.options.fit == GIVEN_FIT
    facts: dict[str, Any] = {"ranks": {}, "goal": None, "curve": None}
    if given:
        plan, maps = nbl.load(job.source, job.spec.num_layers)
    else:
        plan, maps, facts = _make_plan(job)
    distilled = job.options.fit == "distilled" and plan.replaced
    save_maps(maps, out / (START_FILE if distilled else MAPS_FILE), plan.tap)
    return {
        "fit": {"kind": "independent" if distilled else job.options.fit},
        "replaced_layers": list(plan.replaced),
        "kinds": list(plan.kinds),
        "tap": plan.tap,
        "select": plan.select,
        "scores": [dataclasses.asdict(s) for s in plan.scores],
        **facts,
    }


def _make_plan(job: Job) -> tuple[Plan, dict[int, Mixer], dict[str, Any]]:
    """The plan, the maps of its layers, and further facts for the manifest.

    Raises:
        NblError: the job's goal cannot be met.
    """
    selection = Selection(job)
    request, goal = job.request, None
    if request is None:
        if goal_of(job.options) is None and (job.graph is not None or job.shortage):
            request = a_quarter(job.spec.num_layers)
        else:
            request, goal = count_for_goal(job, selection)
    order = selection.order(request) if isinstance(request, int) else None
    if order and selection.judges:
        selection.outlook(len(order))
    select = selection.select if order is not None else "given"
    plan = choose(selection.scores, request, job.options.tap, select, order, job.options.kind)
    facts = selection.facts()
    if facts["curve"]:
        job.ui.say(f"  {spoken_curve(facts['curve'])}")
    maps = selection.maps_of(plan.replaced)
    ranks = {str(i): m.rank for i, m in maps.items() if m.rank is not None}
    return plan, maps, {**facts, "ranks": ranks, "goal": goal}
