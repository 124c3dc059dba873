"""Size on disk by kind of file. The child process that loads a decoder: `test_bench`."""

from __future__ import annotations

from pathlib import Path

from nbl_export.measure.footprint import disk_bytes


def test_every_file_has_one_kind_and_none_is_forgotten(tmp_path: Path) -> None:
    files = {
        "model.onnx": "graph", "all_logits.onnx": "graph", "model.onnx.data": "weights", "decoder.engine": "engine",
        "kernels.cache": "kernels",
        "tokenizer.json": "tokenizer", "tokenizer_config.json": "tokenizer", "chat_template.jinja": "tokenizer",
        "vocab.json": "tokenizer", "merges.txt": "tokenizer", "genai_config.json": "settings", "nbl.json": "settings",
        "LICENSE": "other", "sub/notes.txt": "other",
    }  # fmt: skip
    (tmp_path / "sub").mkdir()
    expected: dict[str, int] = {}
    for size, (name, kind) in enumerate(files.items(), start=1):
        (tmp_path / name).write_bytes(b"x" * size)
        expected[kind] = expected.get(kind, 0) + size
    assert disk_bytes(tmp_path) == expected
    assert disk_bytes(tmp_path / "sub") == {"other": len(files)}
