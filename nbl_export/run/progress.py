"""Progress of long stages on stderr: a live bar with remaining time on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from nbl_export.trust.terminal import Console, visible

__all__ = ["Ui"]

_PLAIN_INTERVAL_SECONDS = 15.0


class Ui:
    """Shows messages and progress of a run. `quiet` suppresses both."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self.quiet = quiet

    def say(self, line: str) -> None:
        """Print one line for the user."""
        if not self.quiet:
            self.console.print(line)

    @contextlib.contextmanager
    def task(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Show a running task; call the yielded function with (done, total)."""
        if self.quiet:
            yield lambda _done, _total: None
        elif self.console.is_terminal:
            with Progress(
                TextColumn("  {task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            ) as bar:
                task = bar.add_task(visible(name), total=None)
                yield lambda done, total: bar.update(task, completed=done, total=total)
        else:
            yield self._plain(name)

    def _plain(self, name: str) -> Callable[[int, int], None]:
        started = last = time.monotonic()

        def update(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if done and now - last >= _PLAIN_INTERVAL_SECONDS:
                last = now
                left = (now - started) * (total - done) / done
                self.say(f"  {name}: {100 * done // max(1, total)}%, about {left:.0f} s left")

        return update
