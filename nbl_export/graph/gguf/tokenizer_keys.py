"""The tokenizer of a checkpoint as GGUF keys (`tokenizer.*`), from its tokenizer.json.

llama.cpp splits text by a named rule. The name follows from the splitting in tokenizer.json; a rule without a name here
is refused, because other tokens would come out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError
from nbl_export.graph.gguf.content import Key
from nbl_export.trust.model_settings import read_object

__all__ = ["tokenizer_keys"]

_BYTES = 1 << 28
# llama.cpp's name of a rule -> what is characteristic of its pre_tokenizer (llama.cpp, src/llama-vocab.cpp).
_RULES = {
    "smollm": ("Digits", "ByteLevel"),
    "llama-bpe": ("Split (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+"
                  "[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+", "ByteLevel"),
    "qwen2": ("Split (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
              "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+", "ByteLevel"),
    "gpt-2": ("ByteLevel",),
}  # fmt: skip
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # token types of GGUF
_SPECIAL = ("bos", "eos", "unk", "pad")


def tokenizer_keys(directory: Path, vocab_size: int) -> dict[str, Key]:
    """Keys of the tokenizer, the special tokens and the chat template.

    Raises:
        NblError: there is no tokenizer.json of byte-pair encoding, or llama.cpp has no name for its splitting.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise NblError(f"{directory} has no tokenizer.json, from which GGUF's tokenizer is made")
    said = read_object(path, _BYTES)
    model = said["model"]
    if model.get("type") != "BPE":
        raise NblError(f"{path} is a tokenizer of type {model.get('type')!r}; GGUF files are made of BPE ones")
    added = {int(t["id"]): t for t in said.get("added_tokens", ())}
    tokens, types = _tokens(model["vocab"], added, vocab_size)
    keys = {
        **_rule(said, model, path),
        "tokenizer.ggml.tokens": Key.texts(tokens),
        "tokenizer.ggml.token_type": Key.numbers(types),
        "tokenizer.ggml.merges": Key.texts([m if isinstance(m, str) else " ".join(m) for m in model["merges"]]),
    }
    return {**keys, **_special(directory, {t: i for i, t in enumerate(tokens)}, said)}


def _rule(said: Mapping[str, Any], model: Mapping[str, Any], path: Path) -> dict[str, Key]:
    if model.get("byte_fallback"):
        raise NblError(
            f"{path} comes from SentencePiece, whose scores it no longer has; convert the original with llama.cpp and "
            "give the file with --base"
        )
    parts = tuple(_parts(said.get("pre_tokenizer") or {}))
    found = next((name for name, rule in _RULES.items() if rule == parts), None)
    if found is None:
        raise NblError(
            f"{path} splits text in a way that has no name in llama.cpp's list here; convert the original with "
            "llama.cpp and give the file with --base"
        )
    return {"tokenizer.ggml.model": Key.text("gpt2"), "tokenizer.ggml.pre": Key.text(found)}


def _parts(splitter: Mapping[str, Any]) -> Iterator[str]:
    """Each step of a pre_tokenizer: its type, and the pattern of a split."""
    for part in splitter.get("pretokenizers", [splitter]):
        pattern = part.get("pattern", {}).get("Regex")
        yield f"{part.get('type')} {pattern}" if pattern else str(part.get("type"))


def _tokens(
    vocab: Mapping[str, int], added: Mapping[int, Mapping[str, Any]], vocab_size: int
) -> tuple[list[str], list[int]]:
    """Text and type of every row of the embedding; rows without a token are unused."""
    names = {index: token for token, index in vocab.items()}
    tokens, types = [], []
    for index in range(vocab_size):
        if index in added:
            tokens.append(added[index]["content"])
            types.append(_CONTROL if added[index].get("special") else _USER_DEFINED)
        elif index in names:
            tokens.append(names[index])
            types.append(_NORMAL)
        else:
            tokens.append(f"[PAD{index}]")
            types.append(_UNUSED)
    return tokens, types


def _special(directory: Path, ids: Mapping[str, int], said: Mapping[str, Any]) -> dict[str, Key]:
    settings = _object(directory / "tokenizer_config.json")
    keys = {}
    for name in _SPECIAL:
        token = settings.get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and text in ids:
            word = {"unk": "unknown", "pad": "padding"}.get(name, name)
            keys[f"tokenizer.ggml.{word}_token_id"] = Key.number(ids[text])
    processor = json.dumps(said.get("post_processor") or {})
    first = keys.get("tokenizer.ggml.bos_token_id")
    begins = first is not None and "TemplateProcessing" in processor and f'"ids": [{first.value}]' in processor
    keys["tokenizer.ggml.add_bos_token"] = Key.flag(begins)
    template = directory / "chat_template.jinja"
    text = template.read_text(encoding="utf-8") if template.is_file() else settings.get("chat_template")
    if isinstance(text, str):
        keys["tokenizer.chat_template"] = Key.text(text)
    return keys


def _object(path: Path) -> dict[str, Any]:
    return read_object(path, _BYTES) if path.is_file() else {}
