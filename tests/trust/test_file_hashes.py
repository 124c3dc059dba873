"""What identifies a model: every byte of every file that a loader may read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from nbl_export.methods.checkpoint import source as checkpoints

from ..damage import flip

READ = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "vocab.json",
        "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja",
        "additional_chat_templates/tools.jinja", "tekken.json", "more.safetensors",
        "model.safetensors.index.json")  # fmt: skip


def test_every_byte_that_a_loader_may_read_identifies_the_model(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(checkpoint("llama"), tmp_path / "m"))
    for name in READ:
        file = copy / name
        file.parent.mkdir(exist_ok=True)
        if name == "model.safetensors.index.json":
            file.write_text('{"weight_map": {"of.no.use": "model.safetensors"}} ', encoding="utf-8")
        elif not file.exists():
            file.write_bytes((copy / "model.safetensors").read_bytes() if name.endswith("rs") else b"{} ")
    first = checkpoints.resolve(str(copy)).fingerprint
    for name in READ:
        kept = (copy / name).read_bytes()
        if name.endswith("rs"):
            flip(copy / name)  # a byte in the middle
        else:
            (copy / name).write_bytes(kept + b" ")
        assert checkpoints.resolve(str(copy)).fingerprint != first, name
        (copy / name).write_bytes(kept)
        assert checkpoints.resolve(str(copy)).fingerprint == first, name
