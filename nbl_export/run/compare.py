"""Measures decoders of any directories side by side, outside of a run: `bench A B ... [--against C]`.

    DIR ─► its model/, or DIR itself if it holds a decoder ┐
    C, or the original/ of the first run directory ─► base ┴─► benchmark.run ─► rows, ratios to the base

Nothing is written into the directories. The decoders may be of different models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError
from nbl_export.options.options import JobOptions
from nbl_export.run.deployed import Located, locate
from nbl_export.run.progress import Ui
from nbl_export.targets import owner_of
from nbl_export.targets.base import threads_of

__all__ = ["compare"]


def compare(
    directories: Sequence[Path], against: Path | None, options: JobOptions, ui: Ui, *, force: bool = False
) -> dict[str, Any]:
    """Measure every directory and return bench.json's value with `rows` and `ratios`.

    Args:
        directories: run directories, of which model/ is measured, or deployable directories.
        against: the base of the ratios. None means the original/ of the first run directory, or else the first of
            several directories. One deployable directory alone has no ratios.
        options: depths, prompt lengths, threads and repetitions; other options have no effect.
        force: measure a run directory that failed verification.

    Raises:
        NblError: a directory is of neither kind, or its engine is not available or cannot run the tests.
    """
    from nbl_export.measure.benchmark import BenchSetting, side_by_side
    from nbl_export.measure.rounds import Variant
    from nbl_export.records.paired import figures
    from nbl_export.report.words import test

    decoders, base = _decoders(directories, against, force)
    facts = {name: found.target.facts(found.path) for name, found in decoders.items()}
    engines = {name: decoder.available() for name, decoder in decoders.items()}
    for name, engine in engines.items():
        if options.threads is not None and engine.capabilities.static:
            raise NblError(f"--threads is not for {name}: engine {decoders[name].engine} computes on a GPU")
    first = next(iter(engines.values()))
    provider = ", ".join(dict.fromkeys(found.provider for found in decoders.values()))
    setting = BenchSetting(
        vocab_size=min(f.vocab_size for f in facts.values()),
        context_length=min(f.context_length for f in facts.values()),
        engine=", ".join(dict.fromkeys(found.engine for found in decoders.values())),
        provider=provider,
        base=base,
        threads=options.threads or threads_of(first),
        gpu=provider != "cpu" or first.capabilities.static,
    )
    variants = {n: Variant(found.path, found.open, facts[n].cache_bytes_per_token) for n, found in decoders.items()}
    with ui.task("rounds") as progress:
        value = side_by_side(variants, options, setting, progress, ui.say)
    for left_out in value["skipped"]:
        ui.say(f"  not measured: {test(left_out)}: {left_out['reason']}")
    for name, found in decoders.items():
        value["variants"][name] |= {
            "path": str(found.path),
            "engine": found.engine,
            "provider": found.provider,
            "arithmetic": engines[name].arithmetic(found.path),
            **({"slots": facts[name].context_length} if engines[name].capabilities.static else {}),
        }
    return {**value, **figures(value)}


def _decoders(
    directories: Sequence[Path], against: Path | None, force: bool
) -> tuple[Mapping[str, Located], str | None]:
    """The decoders by name, the base first, and the base's name."""
    found = [(str(path), locate(path, force=force)) for path in directories]
    runs = [path for path in directories if owner_of(path) is None]
    base: str | None = None
    if against is not None:
        base = str(against)
        found.insert(0, (base, locate(against, force=force)))
    elif runs:
        base = f"{runs[0]} (original)"
        found.insert(0, (base, locate(runs[0], "original")))
    elif len(found) > 1:
        base = str(directories[0])
    paths = [located.path.resolve() for _, located in found]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise NblError(f"{twice} is named twice; name each decoder once")
    return dict(found), base
