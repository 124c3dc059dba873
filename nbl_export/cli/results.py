"""Commands on finished runs: card, checkpoint, generated text and contents; and the check of engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nbl_export.cli import options as opt
from nbl_export.cli.show import show
from nbl_export.cli.show import ui as make_ui
from nbl_export.trust.terminal import visible

__all__ = ["COMMANDS"]


def card(
    directory: opt.Run,
    base_model: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Hub id of the base model, if the run was made from files.")
    ] = None,
    transformers_js: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="Also copy the model folder to OUT, laid out for transformers.js."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Go on despite a failed verification, and overwrite an edited card.")
    ] = False,
) -> None:
    """Write the model card, README.md of the model folder."""
    from nbl_export.publish.card import write_card
    from nbl_export.publish.transformers_js import lay_out

    print(write_card(directory, base_model, force=force))
    if transformers_js is not None:
        print(lay_out(directory, transformers_js))


def convert(
    directory: opt.Run,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FORM",
            help="transformers, gguf, nemotron-nas or mlx; or the engine: vllm, llama.cpp, ollama, ...",
        ),
    ],
    output: Annotated[Path, typer.Option(metavar="TARGET", help="The new file or directory.")],
    kind: Annotated[
        str | None,
        typer.Option("--type", metavar="TYPE", help="gguf: keep (the original's codes, default), f16, q8_0 or q4_0."),
    ] = None,
    base: Annotated[
        Path | None, typer.Option(metavar="FILE", help="gguf: a GGUF of the original; default: the run's own model.")
    ] = None,
    force: opt.Force = False,
) -> None:
    """Write the NBL model for transformers, llama.cpp, TensorRT-LLM or mlx-lm."""
    from nbl_export.publish.convert import convert as write

    progress = make_ui()
    for result in write(directory, to, output, progress, kind=kind, base=base, force=force):
        progress.say(f"  {result.subject}: {result.metric}: {result.detail}")
    print(output)


def generate(
    directory: opt.Run,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to continue or answer.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N")] = 256,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template.")] = False,
    original: Annotated[bool, typer.Option("--original", help="Use the original decoder instead.")] = False,
    lossless: Annotated[bool, typer.Option("--lossless", help="Use the original with proposed tokens.")] = False,
    force: opt.Force = False,
    trust_engine: opt.TrustEngine = False,
) -> None:
    """Stream an answer from the exported decoder."""
    from nbl_export.run.deployed import open_for_text, trust_engines

    if trust_engine:
        trust_engines([directory])
    if original and lossless:
        raise typer.BadParameter("give one of --original and --lossless", param_hint="--lossless")
    name = "original" if original else "lossless" if lossless else "model"
    with open_for_text(directory, name, force=force) as runner:
        for piece in runner.stream(runner.encode(prompt, chat=not raw), max_new_tokens):
            print(visible(piece), end="", flush=True)
    print()


def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR|FILE.onnx", help="A run directory, or any decoder graph.")],
    as_json: opt.Json = False,
) -> None:
    """Show the contents of a run directory or of an ONNX decoder."""
    from nbl_export.graph.graph_only import has_graph
    from nbl_export.report.console import describe_table, graph_table
    from nbl_export.run.describe import describe

    if has_graph(directory):
        from nbl_export.rewrite.describe import describe_graph

        found = describe_graph(directory)
        return show(found, graph_table(found), as_json)
    facts = describe(directory)
    return show(facts, describe_table(facts), as_json)


def doctor(as_json: opt.Json = False) -> None:
    """List the engines that work on this machine, and why others do not."""
    from nbl_export.report.console import doctor_table
    from nbl_export.run.describe import examine_engines
    from nbl_export.targets.gpu import find_gpu, spoken

    found = examine_engines()
    show(found, doctor_table(found, spoken(find_gpu())), as_json)


COMMANDS = (
    ("card", card, False),
    ("convert", convert, False),
    ("generate", generate, False),
    ("inspect", inspect, False),
    ("doctor", doctor, False),
)  # name, function, hidden from the first page of help
