"""A document -> one HTML page without script, which fetches nothing. report.html.jinja has its style and its tags."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping

import jinja2
from markupsafe import Markup

from nbl_export.report.blocks import Document

__all__ = ["document"]


def document(page: Document, drawings: Mapping[str, str]) -> str:
    """The page; text of the document is inert in it.

    Args:
        page: what to write.
        drawings: <svg> elements by the names of `Figure`.
    """
    source = importlib.resources.files("nbl_export.report").joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["kind"] = lambda block: type(block).__name__
    trusted = {name: Markup(svg) for name, svg in drawings.items()}
    return environment.from_string(source).render(page=page, drawings=trusted)
