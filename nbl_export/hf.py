"""NBL models for transformers, by the name that users import.

import nbl_export.hf                                              # registers the classes; no remote code
model = AutoModelForCausalLM.from_pretrained(DIRECTORY)
"""

from __future__ import annotations

from nbl_export.methods.checkpoint.hf_classes import CLASSES, restored, save_linearized

__all__ = ["CLASSES", "restored", "save_linearized"]
