"""The stages of a run, in running order."""

from __future__ import annotations

from nbl_export.run.stages import bench, build, calibrate, distill, evaluate, graphs, plan, report, speculative, verify
from nbl_export.run.stages.common import Stage

__all__ = ["STAGES"]

STAGES = (
    Stage("calibrate", "calibrate", calibrate.declare, calibrate.run),
    Stage("plan", "plan", plan.declare, plan.run),
    Stage("sweep", "sweep", plan.declare_sweep, plan.run_sweep),
    Stage("distill", "distill", distill.declare, distill.run),
    Stage("quantize", "activation-aware scales", graphs.declare_quantize, graphs.run_quantize),
    Stage("decoder", "decoder graph", graphs.declare_decoder, graphs.run_decoder),
    Stage("rewrite", "rewrite", graphs.declare_rewrite, graphs.run_rewrite),
    Stage("verify", "verify", verify.declare, verify.run),
    Stage("eval", "evaluate", evaluate.declare, evaluate.run),
    Stage("build", "build", build.declare, build.run),
    Stage("bench", "bench", bench.declare, bench.run),
    Stage("lossless", "speculative decoding", speculative.declare, speculative.run),
    Stage("report", "report", report.declare, report.run),
)
