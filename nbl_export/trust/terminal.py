"""Shows text of files and models on a terminal, without letting the text control the terminal.

Names of layers, tensors and files, messages of libraries and model output may hold escape sequences, marks that turn
the direction of text, or rich's markup. `visible` shows a character that a terminal would act on as \\x1b. `Console`
does this with all output, and disables markup. The package prints through this module only.
"""

from __future__ import annotations

import logging
import re
from typing import IO, Any

import rich.console
from rich.text import Text

__all__ = ["Console", "Formatter", "visible"]

# C0 and C1 controls except tab and newline, marks and overrides of direction, line separators, lone surrogates.
_ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with the characters that a terminal would act on written out; newline and tab stay.

    Each character is replaced separately, so a sequence that comes in pieces is harmless too.
    """
    return _ACTING.sub(lambda found: _written(ord(found[0])), text)


def _written(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class Console(rich.console.Console):
    """Rich's console for untrusted text: no markup, no emoji codes, no character that a terminal acts on."""

    def __init__(self, file: IO[str] | None = None, **options: Any) -> None:
        super().__init__(file=file, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Convert a string of a table, its title or a line."""
        return super().render_str(visible(text), **options)


class Formatter(logging.Formatter):
    """Formats lines of a log with `visible`."""

    def format(self, record: logging.LogRecord) -> str:
        """Format one record."""
        return visible(super().format(record))
