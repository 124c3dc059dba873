"""Commands about machines: what works on this one, what a model would reach on another one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nbl_export import cli_options as opt
from nbl_export.cli_exit import show

__all__ = ["doctor", "project"]


def doctor(as_json: opt.Json = False) -> None:
    """Say which engines work on this machine, and why the others do not."""
    from nbl_export.inspection import doctor_table, examine_engines

    found = examine_engines()
    show(found, doctor_table(found), as_json)


def project(
    shape: Annotated[
        str, typer.Argument(metavar="DIR|SHAPE", help="A run directory, Llama-3.1-8B or Mistral-7B-v0.3.")
    ],
    tflops: Annotated[float, typer.Option(help="10^12 operations a second of products at that precision.")],
    bandwidth: Annotated[float, typer.Option(help="Memory that is read, in 10^9 bytes a second.")],
    layers: Annotated[
        str | None, typer.Option(help='The layers that are replaced, from 0: "24-31" (default: those of the run).')
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="Of the weights: fp32, fp16, bf16, int8, int4 (default: the run's, or fp16).")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prefill.")] = 512,
    depth: Annotated[str, typer.Option(help="Tokens already in the cache, comma separated.")] = "0,2048",
    like: Annotated[
        Path | None, typer.Option(metavar="DIR", help="As near to its limits as this run's benchmark was to its own.")
    ] = None,
    as_json: opt.Json = False,
) -> None:
    """Work out what a run, or another model, could reach on another machine: by the cost model, no measurement."""
    from nbl_export import projection

    depths = opt.given_options(depth=depth)["depths"]
    rows = projection.rows(projection.Request(shape, tflops, bandwidth, layers, precision, prompt_tokens, depths, like))
    show(rows, projection.table(rows), as_json)
