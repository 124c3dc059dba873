"""The step that holds this machine's clock, as the benchmark reads it, against the GPU's own events."""

from __future__ import annotations

from nbl_export.acceptance.parts import Opened, Target
from nbl_export.acceptance.verdict import Failed, Notes
from nbl_export.targets.tensorrt.static.host import StaticRunner

__all__ = ["clock_against_events"]

_STEPS, _WARM_UP = 32, 8
_PROMPT = 3
_LEAST = 0.95  # of the device's seconds, that the host must see: events and clock tick apart by less


def clock_against_events(target: Target, notes: Notes) -> None:
    """Seconds of decode steps and of a prefill by the host's clock are not less than by events on the stream."""
    with target.opened(notes, graphs=True) as sessions:
        for opened in sessions:
            slots = opened.decoder.slots
            steps = min(_STEPS, max(1, slots - _PROMPT - _WARM_UP))
            ids = (target.material.texts.ids[-1] * 3)[: _PROMPT + _WARM_UP + steps]
            runner = StaticRunner(opened.session, target.directory)
            runner.begin(len(ids))
            notes.doing(f"warming up {opened.subject}")
            runner.append(ids[:_PROMPT])
            for token in ids[_PROMPT:-steps]:
                runner.append([token])
            _compare(opened, runner, target, [[t] for t in ids[-steps:]], "decode steps", notes)
            runner.rewind(0)
            _compare(opened, runner, target, [list(ids)], "prefill", notes)


def _compare(
    opened: Opened, runner: StaticRunner, target: Target, chunks: list[list[int]], name: str, notes: Notes
) -> None:
    notes.doing(f"timing {name} of {opened.subject}")
    timer, clock = target.parts.timer(opened.session._device), target.parts.clock
    seen = [0.0, 0.0]  # by the host, by the device
    for chunk in chunks:
        timer.start()
        before = clock()
        runner.append(chunk)
        seen[0] += clock() - before
        seen[1] += timer.stop()
    host, device = seen
    what = f"{opened.subject}, {len(chunks)} {name}"
    notes.see(f"{what}, milliseconds by the clock", 1000 * host)
    notes.see(f"{what}, milliseconds by events", 1000 * device)
    if host < _LEAST * device:
        raise Failed(f"{what}: the clock sees {1000 * host:.3g} ms, events on the GPU {1000 * device:.3g} ms")
