"""What is asked for becomes a settled job: options, a decoder, and what identifies its model and its text.

asked + files of the model ─► settle_job ─► Settled     a whole job
changes + nbl.json ─────────► settle_run ─► Settled     further stages of a run; its model need not be here
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nbl_export.errors import NblError
from nbl_export.methods.checkpoint.source import Source, resolve
from nbl_export.options.options import JobOptions
from nbl_export.options.public import located
from nbl_export.options.settle import settle
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.inputs import Lazy
from nbl_export.run.destinations import refuse_unfit
from nbl_export.run.facts import capabilities_of, facts_of_model, facts_of_run, identity_of, read_model, require_engine
from nbl_export.run_directory import RunDirectory
from nbl_export.targets import ENGINES
from nbl_export.text.corpus import Text
from nbl_export.text.mixture import identify, read_texts

__all__ = ["Settled", "of_run", "settle_job", "settle_run"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class Settled:
    """Settled options, with the model that they were settled for.

    Attributes:
        options: with places of this machine.
        noted: as the manifest has them.
        fingerprint: of the model.
        source: the model, if it is on this machine.
        codes: a checkpoint whose codes the int4 graphs use, or None.
        sources: what identifies the calibration text, see `text.mixture.identify`.
        documents: the calibration text; without documents if the model samples it.
        facts: what the manifest will say of all this.
    """

    options: JobOptions
    noted: JobOptions
    decoder: DecoderSpec
    fingerprint: str
    source: Lazy[Source]
    codes: Lazy[Source | None]
    sources: list[Any]
    documents: Lazy[Text]
    facts: Mapping[str, Any]


def settle_job(asked: Mapping[str, Any], recorded: JobOptions | None, manifest: Mapping[str, Any], say: Say) -> Settled:
    """A whole job.

    Args:
        recorded: the options of another run, which those asked for change.
        manifest: of the run that goes on; empty for a new one.

    Raises:
        NblError: the model cannot be used, or an option does not fit it.
    """
    source, decoder = read_model(str(asked.get("model") or (recorded.model if recorded else "")), manifest)
    options = settle(asked, capabilities_of, facts_of_model(source, decoder), recorded)
    refuse_unfit(options, source)
    sources = identify(options.calibration)
    codes, noted = _codes(options, decoder)
    facts = {**identity_of(options, source, decoder), "sources": sources, "options": options.to_json(), **noted}
    return Settled(
        options=options,
        noted=options,
        decoder=decoder,
        fingerprint=source.fingerprint,
        source=Lazy(source.fingerprint, lambda: source),
        codes=codes,
        sources=sources,
        documents=_documents(options, sources, say),
        facts=facts,
    )


def settle_run(run: RunDirectory, changes: Mapping[str, Any], say: Say) -> Settled:
    """Further stages of a run, with changed options if any.

    Raises:
        NblError: a changed option does not fit the run, or the changed engine is not available here.
    """
    recorded = run.options
    if "engine" in changes:
        _refuse_other_graphs(run, recorded, changes["engine"])
    options = settle(changes, capabilities_of, facts_of_run(run.manifest), recorded)
    if "engine" in changes:
        require_engine(options)
    return of_run(run, options, say)


def of_run(run: RunDirectory, options: JobOptions, say: Say) -> Settled:
    """A run with settled options. Its text and its model stay those that it was made from."""
    manifest = run.manifest
    here = located(options, run.manifest)
    decoder = run.decoder
    fingerprint = str(manifest["model"]["fingerprint"])
    facts: dict[str, Any] = {"options": options.to_json()}
    if options.quantized_model == run.options.quantized_model:
        identity = manifest["quantized"]["fingerprint"] if options.quantized_model else None
        codes = Lazy(identity, lambda: _find_codes(here, decoder))
    else:
        codes, noted = _codes(here, decoder)
        facts |= noted
    return Settled(
        options=here,
        noted=options,
        decoder=decoder,
        fingerprint=fingerprint,
        source=Lazy(fingerprint, lambda: resolve(here.model)),
        codes=codes,
        sources=manifest["sources"],
        documents=_documents(here, manifest["sources"], say),
        facts=facts,
    )


def _refuse_other_graphs(run: RunDirectory, recorded: JobOptions, engine: str) -> None:
    """Refuse an engine that does not take the graphs of the run."""
    source = capabilities_of(engine).source
    if source == capabilities_of(recorded.engine).source:
        return
    same = [name for name in ENGINES if capabilities_of(name).source == source]
    raise NblError(
        f"{run.path} is a run for --engine {recorded.engine}, whose graphs {engine} does not take; make another run "
        f"with --engine {' or '.join(same)}"
    )


# -- files that options name -----------------------------------------------------------------------------------


def _find_codes(options: JobOptions, decoder: DecoderSpec) -> Source | None:
    from nbl_export.methods.checkpoint import quantized

    return None if options.quantized_model is None else quantized.find(options.quantized_model, decoder)


def _codes(options: JobOptions, decoder: DecoderSpec) -> tuple[Lazy[Source | None], dict[str, Any]]:
    """The quantised checkpoint of options, and what the manifest says of it."""
    from nbl_export.methods.checkpoint import quantized

    found = _find_codes(options, decoder)
    if found is None:
        return Lazy(None, lambda: None), {}
    about = quantized.describe(found)
    return Lazy(about["fingerprint"], lambda: found), {"quantized": {"name": options.quantized_model, **about}}


def _documents(options: JobOptions, sources: list[Any], say: Say) -> Lazy[Text]:
    def read() -> Text:
        if identify(options.calibration) != sources:
            raise NblError("the calibration text has changed since this run; restore it")
        return read_texts(options.calibration, say)

    return Lazy(None, read)
