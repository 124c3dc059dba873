"""Renders a chat template as transformers does (`apply_chat_template`), in a sandbox.

The values are: messages, add_generation_prompt, the special tokens, raise_exception and strftime_now.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from nbl_export.errors import NblError

__all__ = ["render"]


def render(template: str, prompt: str, special: Mapping[str, str], where: object) -> str:
    """The text of one user's turn.

    Args:
        special: bos_token, eos_token, ...
        where: the model, for the message.

    Raises:
        NblError: the template cannot be applied.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals.update(raise_exception=refuse, strftime_now=lambda form: datetime.now().strftime(form))
    messages = [{"role": "user", "content": prompt}]
    try:
        return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **special)
    except Exception as error:  # a template can raise anything
        raise NblError(f"the chat template of {where} cannot be applied ({error}); try without it (--raw)") from error
