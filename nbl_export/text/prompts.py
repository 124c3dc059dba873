"""Prompts of four kinds that every machine has: what lossless decoding is checked and timed on.

    prose     a passage of Python's documentation, to go on with
    code      the beginning of a module of Python's standard library, to go on with
    chat      a question
    summary   a passage of Python's documentation, to be put in fewer words

How many proposed tokens are accepted depends on the kind. A summary repeats its prompt, and code repeats itself.
"""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MOST_EACH", "Prompt", "prompts"]

_PROSE_CHARS, _CODE_CHARS, _SUMMARY_CHARS = 400, 1200, 1500
_LEAST_CHARS = 1200  # of the paragraphs of a topic
_LEAST_PARAGRAPH = 120
_MODULES = (
    "argparse", "bisect", "calendar", "configparser", "csv", "dataclasses", "fractions", "functools", "heapq",
    "inspect", "pathlib", "random", "statistics", "string", "textwrap", "zipfile",
)  # fmt: skip
_QUESTIONS = (
    "How do I bake bread at home?",
    "Why is the sky blue?",
    "What should I pack for a week in the mountains?",
    "Explain how a bicycle stays upright.",
    "Give me five ideas for a birthday party in a garden.",
    "What is the difference between weather and climate?",
    "How can I learn to play the guitar as an adult?",
    "Write a short letter that thanks a teacher.",
    "How does a refrigerator work?",
    "What are the advantages of public libraries?",
    "Describe a quiet morning by the sea.",
    "How do I change a flat tyre?",
    "What should I ask before I rent a flat?",
    "Explain compound interest with an example.",
    "Why do leaves change colour in autumn?",
    "Plan a simple dinner for four people.",
)


MOST_EACH = len(_QUESTIONS)


@dataclass(frozen=True)
class Prompt:
    """A prompt of one of `KINDS`; chat: whether the chat template is put around the text."""

    kind: str
    text: str
    chat: bool


def prompts(each: int) -> list[Prompt]:
    """The first `each` prompts of every kind, at most `MOST_EACH` of each."""
    topics = _passages()
    found = [Prompt("prose", text[:_PROSE_CHARS], False) for text in topics[:each]]
    found += [Prompt("code", text[:_CODE_CHARS], False) for text in _modules()[:each]]
    found += [Prompt("chat", text, True) for text in _QUESTIONS[:each]]
    asked = "Summarise this text in a few sentences.\n\n"
    found += [Prompt("summary", asked + text[:_SUMMARY_CHARS], True) for text in topics[-each:]]
    return found


def _passages() -> list[str]:
    """Topics of the documentation without headings, grammar and examples."""
    from pydoc_data.topics import topics

    found = []
    for _, text in sorted(topics.items()):
        paragraphs = [p for p in text.split("\n\n") if len(p) >= _LEAST_PARAGRAPH and p[0].isalpha() and "::" not in p]
        passage = "\n\n".join(" ".join(p.split()) for p in paragraphs)
        if len(passage) >= _LEAST_CHARS:
            found.append(passage)
    return found


def _modules() -> list[str]:
    directory = Path(sysconfig.get_paths()["stdlib"])
    files = [directory / f"{name}.py" for name in _MODULES]
    return [file.read_text(encoding="utf-8") for file in files if file.is_file()]
