"""What a user asks for becomes the options of a job. This is the only place that settles an option.

    asked {name: value} ─► known names and kinds ─► over recorded options, if any
      ─► defaults that depend on the engine, the model and other options
      ─► an option without effect is refused, or returns to its default if it was only recorded
      ─► refused: values that contradict each other, or do not fit the engine or the model

The command line, `--config FILE`, a changed run and Python call `settle`. Defaults and effects stand with
the fields (`options`); what is refused, in `rules`.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from nbl_export.errors import UsageError
from nbl_export.options.goals import asked_layers
from nbl_export.options.option import ModelFacts, Option
from nbl_export.options.options import AUTO_EXIT, DEFAULTS, NO_EXIT, OPTIONS, JobOptions, flag_of, renamed
from nbl_export.options.rules import CONTRADICTIONS, OF_DECODER, REFUSED, Case, Refusal
from nbl_export.records.capabilities import Capabilities
from nbl_export.records.destinations import destination_named
from nbl_export.records.from_json import read_record

__all__ = ["hub_id", "judge", "merge_options", "numbers", "read_asked", "settle"]

EngineOf = Callable[[str, str], Capabilities]  # engine, provider -> its capabilities; refuses an unknown engine

_OF_ENGINE = ("engine", "provider")  # settled before all that depends on the engine
_COUNTS = ("layers", "exit_layer", "max_perplexity_increase")  # one of them sets which layers are replaced


def settle(
    asked: Mapping[str, Any], engine_of: EngineOf, model: ModelFacts | None = None, recorded: JobOptions | None = None
) -> JobOptions:
    """The options of a job.

    A recorded value that was a default follows the new defaults. Rules whose facts are unknown are left out: call again
    when the model is read.

    Args:
        asked: by the names of the options; None asks for nothing.
        recorded: the options of a run. If nothing is asked for, the recorded options stay as they are.

    Raises:
        UsageError: a name is unknown, a value is of the wrong kind, or an option has no effect or contradicts another.
        NblError: a value does not fit the model.
    """
    model = model or ModelFacts()
    given = {name: value for name, value in read_asked(asked).items() if value is not None}
    known = {} if recorded is None else _asked_for(recorded, engine_of, model)
    if set(_OF_ENGINE) & given.keys():  # another engine of a run is another destination
        known.pop("destination", None)
    if model.maps_tap:
        known.pop("fit", None)
    elif recorded:  # another goal for a run does not change how its maps are made
        known["fit"] = recorded.fit
    values = merge_options(known, given)
    try:
        options = read_record(JobOptions, {**_defaults(values, engine_of, model), **values})
    except TypeError as error:
        raise UsageError(f"the options cannot be used: {error}") from error
    except ValueError as error:
        raise UsageError(str(error)) from error
    case = Case(options, engine_of(options.engine, options.provider), model)
    _refuse(CONTRADICTIONS, case)
    case = _applying(case, given)
    judge(case)
    return case.options


def merge_options(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Values with the given ones in their place; a given count or goal replaces every other count or goal."""
    if any(given.get(name) not in (None, AUTO_EXIT, NO_EXIT) for name in _COUNTS):
        values = {name: value for name, value in values.items() if name not in _COUNTS}
    return {**values, **given}


def _defaults(values: Mapping[str, Any], engine_of: EngineOf, model: ModelFacts) -> dict[str, Any]:
    found = {**DEFAULTS, **values}
    defaults = {}
    for name, usual in ((name, record.usual) for name, record in OPTIONS.items() if record.usual):
        engine = None if name in _OF_ENGINE else engine_of(str(found["engine"]), str(found["provider"]))
        defaults[name] = usual(found, engine, model)
        found[name] = values.get(name, defaults[name])  # a later default may depend on an earlier one
    return defaults


def _asked_for(options: JobOptions, engine_of: EngineOf, model: ModelFacts) -> dict[str, Any]:
    """The values that are not the defaults of these options, with this model or with a plain checkpoint."""
    values = {name: getattr(options, name) for name in DEFAULTS}
    usual = [{**DEFAULTS, **_defaults(values, engine_of, facts)} for facts in (model, ModelFacts())]
    return {name: value for name, value in values.items() if all(value != of[name] for of in usual)}


def _applying(case: Case, given: Mapping[str, Any]) -> Case:
    """The case, with recorded options that no longer apply at their defaults; unchanged if nothing is asked for."""
    if not given:
        return case
    recorded = {}
    for name, record in OPTIONS.items():
        belongs = next((rule.belongs for rule in record.applies if not rule.holds(case)), None)
        if belongs and name in given:
            raise UsageError(f"{flag_of(name)} is for {belongs}; leave {flag_of(name)} out")
        if belongs:
            recorded[name] = DEFAULTS[name]
    return dataclasses.replace(case, options=dataclasses.replace(case.options, **recorded))


def _refuse(rows: Iterable[Refusal], case: Case) -> None:
    for error, sentence in rows:
        if said := sentence(case):
            raise error(said)


def judge(case: Case) -> None:
    """Refuse values that do not fit the engine or the model, as far as the model's facts are known.

    Raises:
        UsageError, NblError: the sentence of a row.
    """
    _refuse(REFUSED, case)
    if case.model.decoder is not None:
        if case.options.layers is not None:
            asked_layers(case.options, case.model.decoder)
        _refuse(OF_DECODER, case)


# -- names and values ---------------------------------------------------------------------------------------------


def read_asked(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by the field names of JobOptions, in its types. A name may be that of the field or of the flag.

    Numbers are accepted for texts of numbers (layers = 8), lists for named layers, one text for a list of texts, and
    paths for texts.

    Raises:
        UsageError: a name is no option, or a text holds no numbers.
    """
    flags = {said.flag or name: name for name, said in OPTIONS.items()}
    names = {"model": "model", **{name: name for name in OPTIONS}, **flags}
    found: dict[str, Any] = {}
    for key, value in values.items():
        flag = key.replace("-", "_")
        if flag not in names:
            if sentence := renamed(key):
                raise UsageError(sentence)
            close = difflib.get_close_matches(flag, names, 1)
            raise UsageError(f"{key} is no option" + (f"; did you mean {close[0]}?" if close else ""))
        found[names[flag]] = _value(names[flag], value, OPTIONS.get(names[flag]))
    return found


_HUB_PAGE = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?!datasets/|spaces/)([^\W_][\w.-]*/[^\W_][\w.-]*)(?:[/?#].*)?"
)


def hub_id(model: str) -> str:
    """The hub id of a model's page on the hub, org/name; any other name as it is.

    Raises:
        UsageError: a path here has the name of the page's model, and would be read in its place.
    """
    page = _HUB_PAGE.fullmatch(model)
    if page and os.path.lexists(page[1]):
        raise UsageError(f"{model} is a page of the hub, and {page[1]} is a path here; start in another directory")
    return page[1] if page else model


def _value(name: str, value: Any, said: Option | None) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if said is not None and said.numbers and isinstance(value, (str, int)) and not isinstance(value, bool):
        return numbers(str(value), name)
    takes = () if said is None else said.python
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if "list" in takes and isinstance(value, str):
        return (value,)
    if {"int", "float"} & set(takes) and is_number:
        return str(value)
    if "share" in takes and is_number:
        if value >= 1:
            raise UsageError(f"{flag_of(name)} {value}: write a share below 1 (0.05) or a percentage ('5%')")
        return f"{100 * value:.6g}%"
    if "layers" in takes and isinstance(value, (list, tuple)):
        return ",".join(map(str, value)) + ("," if len(value) == 1 else "")  # "8" alone is a count
    if name == "model" and isinstance(value, str):
        return hub_id(value)
    if name == "precision" and isinstance(value, str):
        return value.lower()
    if name == "destination" and isinstance(value, str):
        return destination_named(value)
    if isinstance(value, (list, tuple)):
        return tuple(os.fspath(item) if isinstance(item, os.PathLike) else item for item in value)
    return value


def numbers(text: str, name: str) -> tuple[int, ...]:
    """The distinct numbers of a comma-separated option, in their order.

    Raises:
        UsageError: a part is not a number, or a number is too small.
    """
    said = OPTIONS[name]
    parts = [part.strip() for part in text.split(",")]
    least = int(said.least or 0)
    if not all(part.isascii() and part.isdigit() and int(part) >= least for part in parts):
        example = f"comma separated ({said.numbers})"
        raise UsageError(f"{flag_of(name)} {text!r}: write numbers of at least {least}, {example}")
    return tuple(dict.fromkeys(int(part) for part in parts))
