"""Graph formats: each checks its own files; the checks on logits are the same for all."""

from __future__ import annotations

from nbl_export.verify.forms.form import Form, Material, Setting, measured_cache

__all__ = ["Form", "Material", "form_of", "measured_cache"]


def form_of(setting: Setting) -> Form:
    """The checks of the format of an engine's graphs."""
    if setting.engine.capabilities.graphs == "ir":
        from nbl_export.verify.forms.ir import IrForm

        return IrForm()
    from nbl_export.verify.forms.onnx import OnnxForm

    return OnnxForm()
