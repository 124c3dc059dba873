"""Sphinx: Markdown pages by MyST, in the theme Furo. `make docs` builds them; a warning is an error."""

import re
from pathlib import Path
from typing import Any

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

_VERSION = re.compile(r'^__version__ = "(.+)"$', re.MULTILINE)
_FILE = Path(__file__).parent.parent / "nbl_export" / "version.py"

project = "nbl-export"
release = _VERSION.findall(_FILE.read_text(encoding="utf-8"))[0]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # links such as page.md#heading
highlight_language = "bash"

html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"nbl-export {release}"
html_copy_source = False
html_extra_path = ["example-report.html"]  # of `make demo`
html_show_copyright = False

# Types in signatures of the Python page have no pages of their own.
nitpick_ignore_regex = [("py:.*", ".*")]


def _writer(display: str) -> Any:
    def write(page: Any, node: Any) -> None:
        page.body.append(convert(node.astext(), display=display))
        raise SkipNode

    return write, None


def setup(app: Any) -> None:
    """Write formulas as MathML, which browsers draw by themselves: a page needs no network."""
    app.add_html_math_renderer("mathml", _writer("inline"), _writer("block"))
