"""The description of the package on an index: README.md, in which only whole addresses are links.

A link to a file of the repository leads nowhere on an index, so its text stands alone there, and pictures leave.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup


def described(readme: str) -> str:
    """The text without links to files."""
    readme = re.sub(r"^!\[[^\]]*\]\((?!https?:)[^)]*\)\n+", "", readme, flags=re.MULTILINE)
    return re.sub(r"(?<!!)\[([^\]]*)\]\((?!https?:|#)[^)]*\)", r"\1", readme)


if __name__ == "__main__":
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    setup(long_description=described(text), long_description_content_type="text/markdown")
