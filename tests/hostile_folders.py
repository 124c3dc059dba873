"""Folders that a stranger may hand over: what asks for code, links, and runs that were edited.

damage_genai         genai_config.json: libraries, files elsewhere, profiles
damage_settings      config.json, tokenizer_config.json, generation_config.json: code that lies beside them
damage_links         a file of the folder becomes a link, a pipe or a device
plant_links          more entries that are links, under names that libraries read, hidden or deep
damage_run           a file of a run directory, and its recorded hash with it
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from random import Random
from typing import Any

from .hostile import damage_bytes, damage_json, damage_onnx, damage_safetensors

__all__ = ["damage_genai", "damage_links", "damage_run", "damage_settings", "plant_links", "rehash"]


def _outside(path: Path, depth: int = 0) -> Path:
    """`outside/secret` beside the victim's directory, which is the folder's parent."""
    return path.parents[depth] / "outside" / "secret"


# -- what asks for code ------------------------------------------------------------------------------------------


def damage_genai(random: Random, path: Path) -> None:
    """A library, a file elsewhere or a number without bound; or any JSON damage."""
    if random.random() < 0.4:
        damage_json(random, path)
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    library = random.choice(("canary.so", "./canary.so", str(path.with_name("canary.so"))))
    secret = random.choice((str(_outside(path, 2)), "../../outside/secret"))
    decoder = config["model"]["decoder"]
    session = decoder.setdefault("session_options", {})
    kind = random.randrange(8)
    if kind == 0:
        random.choice((session, decoder, config["model"]))["custom_ops_library"] = library
    elif kind == 1:
        session[random.choice(("enable_profiling", "optimized_model_filepath", "log_id"))] = secret + "-made"
    elif kind == 2:
        name = random.choice(("QNN", "OpenVINO", "cuda", "VitisAI", "NvTensorRtRtx", "CustomEP", "canary"))
        key = random.choice(("backend_path", "library_path", "custom_ops_library", "cache_dir", "config_file"))
        session["provider_options"] = [{name: {key: random.choice((library, secret))}}]
    elif kind == 3:
        decoder["filename"] = random.choice((secret, "../model.onnx", "", "canary.so", "model.onnx\0", "/dev/zero"))
    elif kind == 4:
        config.setdefault("search", {})[random.choice(("max_length", "num_beams", "batch_size"))] = random.choice(
            (2**40, -1, 0, 2**31 - 1, 1e300, "x")
        )
    elif kind == 5:
        config["model"][random.choice(("encoder", "vision", "speech", "embedding"))] = {"filename": secret}
    elif kind == 6:
        session["config_entries"] = {"session.load_custom_ops": library, "ep.context_file_path": secret}
    else:
        decoder["pipeline"] = [{"a": {"filename": secret, "session_options": {"custom_ops_library": library}}}]
    path.write_text(json.dumps(config), encoding="utf-8")


_ASKS = {
    "auto_map": {
        "AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoModel": "evil.Model",
        "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"],
    },
    "model_type": "evil", "tokenizer_class": "EvilTokenizer", "architectures": ["evil.Model"],
    "custom_generate": "evil", "trust_remote_code": True, "transformers_weights": "pytorch_model.bin",
    "quantization_config": {"quant_method": "evil"}, "_name_or_path": "../outside/secret",
    "custom_pipelines": {"text-generation": {"impl": "evil.Model", "pt": ["AutoModel"]}},
    "vocab_file": "../outside/secret", "tokenizer_file": "../outside/secret",
    "chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ raise_exception('\x1b[31m') }}",
    "attn_implementation": "evil/kernel", "_attn_implementation": "evil/kernel", "dtype": "evil",
}  # fmt: skip


def damage_settings(random: Random, path: Path) -> None:
    """One to three demands, auto_map more often than others; or any JSON damage."""
    if random.random() < 0.35:
        damage_json(random, path)
        return
    settings = json.loads(path.read_text(encoding="utf-8"))
    for name in random.sample(sorted(_ASKS), random.randint(1, 3)):
        settings[name] = _ASKS[name]
    if random.random() < 0.6:
        settings["auto_map"] = _ASKS["auto_map"]
    path.write_text(json.dumps(settings), encoding="utf-8")


# -- links ---------------------------------------------------------------------------------------------------------


def damage_links(random: Random, folder: Path) -> None:
    """One file of the folder is no file any more."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    path = random.choice(files)
    _put_elsewhere(random, path, folder.parent.parent / "outside" / "secret")


_READ = ("merges.txt", "vocab.json", "chat_template.jinja", "added_tokens.json", "special_tokens_map.json",
         "tokenizer.model", "generation_config.json", "preprocessor_config.json", "w.safetensors", "b.gguf",
         "additional_chat_templates/k.jinja", "deeper/openvino_model.bin", "deeper/openvino_model.xml",
         "onnx/model.onnx", "kernels.cache", "original/extra", "anything", "deep/er/still")  # fmt: skip


def plant_links(random: Random, folder: Path) -> None:
    """One to three links under new names; sometimes a setting names one of them."""
    outside = folder.parent.parent / "outside"
    for _ in range(random.randint(1, 3)):
        name = Path(random.choice(_READ))
        kind = random.random()
        if kind < 0.4:
            name = name.with_name(f".{name.name}")
        elif kind < 0.55:
            name = Path(random.choice((".hidden", ".git", ".cache", ".cache/huggingface", ".tmp-1"))) / name
        path = folder / name
        if any(place.is_symlink() for place in (path, *path.parents)) or path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        _link(random, path, outside)
    if random.random() < 0.3:
        _name_hidden_weights(folder, outside)


def _link(random: Random, path: Path, outside: Path) -> None:
    """To a file or the directory outside, straight or through another link; inside, for bookkeeping."""
    target = random.choice((outside / "secret", outside / "secret", outside, outside / "nothing"))
    kind = random.randrange(4)
    if kind == 0:
        path.symlink_to(target)
    elif kind == 1:
        path.symlink_to(os.path.relpath(target, path.parent))
    elif kind == 2:
        path.with_name(f".{path.name}-on").symlink_to(target)
        path.symlink_to(f".{path.name}-on")
    else:
        path.symlink_to(outside)
        path.with_name(f"{path.name}-below").symlink_to(f"{path.name}/secret")


def _name_hidden_weights(folder: Path, outside: Path) -> None:
    if (folder / "model.safetensors").is_file() and not (folder / ".w.safetensors").is_symlink():
        (folder / ".w.safetensors").symlink_to(outside / "secret")
        index = {"weight_map": {"model.embed_tokens.weight": ".w.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _put_elsewhere(random: Random, path: Path, secret: Path) -> None:
    kept = path.with_name("kept")
    if path.exists():
        path.rename(kept)
    kind = random.choice(("outside", "outside", "relative", "zero", "pipe", "directory", "circle", "nothing", "beside"))
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        targets: dict[str, str | Path] = {
            "outside": secret, "relative": os.path.relpath(secret, path.parent), "zero": "/dev/zero",
            "circle": path.name, "nothing": "nowhere", "beside": "kept",
        }  # fmt: skip
        path.symlink_to(targets[kind])


# -- runs that were edited -----------------------------------------------------------------------------------------


def damage_run(random: Random, run: Path) -> None:
    """One file, by the damage of its kind; then the manifest says the hash that the file has."""
    files = [
        p for p in sorted(run.rglob("*")) if p.is_file() and p.suffix in (".json", ".safetensors", ".onnx", ".data")
    ]
    path = run / "nbl.json" if random.random() < 0.3 else random.choice(files)
    if path.name == "genai_config.json":
        damage_genai(random, path)
    elif path.suffix == ".json":
        damage_json(random, path)
    elif path.suffix == ".safetensors":
        damage_safetensors(random, path)
    elif path.suffix == ".onnx":
        damage_onnx(random, path)
    else:
        damage_bytes(random, path)
    if path.name != "nbl.json":
        rehash(run, path)


def rehash(run: Path, path: Path) -> None:
    """As whoever may write to a run directory would."""
    manifest: dict[str, Any] = json.loads((run / "nbl.json").read_text(encoding="utf-8"))
    name = path.relative_to(run).as_posix()
    for record in manifest["stages"].values():
        if name in record["files"]:
            record["files"][name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (run / "nbl.json").write_text(json.dumps(manifest), encoding="utf-8")
