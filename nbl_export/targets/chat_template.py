"""Renders a chat template as transformers does (`apply_chat_template`), in a sandbox and in a process with limits.

A template is a program: it can repeat a text, or loop, for ever. So a process of its own renders it, which may take
half a gigabyte of memory and ten seconds. The values are: messages, add_generation_prompt, the special tokens,
raise_exception and strftime_now.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError
from nbl_export.parallel.child import Child, Write

__all__ = ["applied", "read_settings", "render"]

_MOST_BYTES = 512 << 20  # of memory, beyond what the process takes before it renders
_MOST_CHARACTERS = 16 << 20  # of the text
_SECONDS = 10.0
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def applied(directory: Path, prompt: str) -> str | None:
    """The text of one user's turn in the template of a model directory; None without a template.

    Raises:
        NblError: the template cannot be applied, or a file is damaged.
    """
    settings = read_settings(directory / "tokenizer_config.json")
    path = directory / "chat_template.jinja"
    template = path.read_text(encoding="utf-8") if path.is_file() else settings.get("chat_template")
    if isinstance(template, list):  # of several, by name
        template = next((t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), "")
    if not isinstance(template, str) or not template:
        return None
    found = {name: settings[name] for name in _SPECIAL if settings.get(name) is not None}
    special = {name: str(v["content"]) if isinstance(v, dict) else str(v) for name, v in found.items()}
    return render(template, prompt, special, directory)


def read_settings(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model directory; empty without the file.

    Raises:
        NblError: the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NblError(f"{path} cannot be read ({error}); export again") from error
    return value if isinstance(value, dict) else {}


def render(template: str, prompt: str, special: Mapping[str, str], where: object) -> str:
    """The text of one user's turn.

    Args:
        special: bos_token, eos_token, ...
        where: the model, for the message.

    Raises:
        NblError: the template cannot be applied within the limits.
    """
    reason = f"it needs more than {_MOST_BYTES >> 20} MiB of memory"
    with Child(_render, template, prompt, dict(special), grace=0.0) as child:
        try:
            answer = child.answer(_SECONDS)
        except TimeoutError:
            answer, reason = None, f"it does not end within {_SECONDS:.0f} s"
    kind, text = answer if answer is not None else ("error", reason)
    if kind == "error":
        raise NblError(f"the chat template of {where} cannot be applied ({text}); try without it (--raw)")
    return str(text)


def _render(write: Write, template: str, prompt: str, special: dict[str, str]) -> None:
    """Send the text, or why there is none."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals.update(raise_exception=refuse, strftime_now=lambda form: datetime.now().strftime(form))
    messages = [{"role": "user", "content": prompt}]
    _limit()
    try:
        text = environment.from_string(template).render(messages=messages, add_generation_prompt=True, **special)
        if len(text) > _MOST_CHARACTERS:
            raise ValueError(f"its text has more than {_MOST_CHARACTERS >> 20} Mi characters")
        write(["text", text])
    except MemoryError:
        write(["error", f"it needs more than {_MOST_BYTES >> 20} MiB of memory"])
    except Exception as error:  # a template can raise anything
        write(["error", " ".join(str(error).split())[:500]])


def _limit() -> None:
    """Let this process take `_MOST_BYTES` more address space."""
    import resource

    import psutil

    most, hard = psutil.Process().memory_info().vms + _MOST_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
