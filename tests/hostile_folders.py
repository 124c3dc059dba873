"""Folders that a stranger may hand over: what asks for code, links, archives that grow, runs that were edited.

damage_genai         genai_config.json: libraries, files elsewhere, profiles
damage_settings      config.json, tokenizer_config.json, generation_config.json: code that lies beside them
damage_links         a file of the folder becomes a link, a pipe or a device
plant_links          more entries that are links, under names that libraries read, hidden or deep
damage_names         tokenizer_config.json names files elsewhere
damage_place         a working directory with modules and packages that nobody asked for
damage_sizes         config.json: a model that its weights are too small for
damage_gguf_header   a GGUF file without tensors
damage_bomb          a text that is far larger than it looks
damage_run           a file of a run directory, and its recorded hash with it
damage_lock          the lock of a run directory
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file

from .hostile import damage_bytes, damage_json, damage_onnx, damage_safetensors

__all__ = [
    "damage_bomb",
    "damage_eval",
    "damage_genai",
    "damage_gguf_header",
    "damage_links",
    "damage_lock",
    "damage_moments",
    "damage_names",
    "damage_place",
    "damage_run",
    "damage_settings",
    "damage_sizes",
    "plant_links",
    "rehash",
]


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


def damage_names(random: Random, path: Path) -> None:
    """A file outside, by a name, in a list or in a mapping."""
    outside = path.parent.parent.parent / "outside"
    place = random.choice((
        "../outside/tokenizer.1.json", "../../outside/tokenizer.1.json", str(outside / "tokenizer.1.json"),
        "./../../outside/secret", str(outside / "secret"), "~nobody/../../../outside/tokenizer.1.json", str(outside),
    ))  # fmt: skip
    if place.startswith("~"):
        (path.parent / "~nobody").mkdir()
    key = random.choice((
        "fast_tokenizer_files", "fast_tokenizer_files", "vocab_file", "tokenizer_file", "merges_file", "spm_file",
        "chat_template", "additional_files_names", "gguf_file", "name_or_path", "tokenizer_object", "image_processor",
    ))  # fmt: skip
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings[key] = random.choice((place, [place], ["tokenizer.json", place], {"a": place}, {"a": [place]}))
    path.write_text(json.dumps(settings), encoding="utf-8")


def damage_place(random: Random, folder: Path) -> None:
    """Canaries under names that programs look for in the directory where they start."""
    for name in random.sample(("torch", "numpy", "json", "transformers", "sitecustomize", "nbl_export", "openvino"), 3):
        shutil.copyfile(folder / "evil.py", folder / f"{name}.py")
    for name in random.sample(("libcuda.so.1", "plugins.xml", ".env", "matplotlibrc", ".netrc", "node.config.json"), 3):
        shutil.copyfile(folder / random.choice(("evil.py", "pytorch_model.bin")), folder / name)


_SIZE_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "head_dim",
              "max_position_embeddings", "num_key_value_heads")  # fmt: skip


def damage_sizes(random: Random, path: Path) -> None:
    """Sizes of a model of many GiB over the weights of a small one; sometimes the weights are another tensor alone."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    if random.random() < 0.5:
        settings |= {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": random.choice((1, 8, 64))}
        settings |= {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128}
    else:
        for key in random.sample(_SIZE_KEYS, random.randint(1, 3)):
            settings[key] = random.choice((4096, 65_536, 1 << 20, 1 << 24, 1 << 31))
    path.write_text(json.dumps(settings), encoding="utf-8")
    if random.random() < 0.5:
        save_file({"x": np.zeros(1, np.float32)}, path.with_name("model.safetensors"))


def damage_gguf_header(random: Random, path: Path) -> None:
    """A few keys and no tensor."""
    writer = gguf.GGUFWriter(path, random.choice(("llama", "qwen2", "qwen3", "gemma2", "phi3", "mistral3")))
    for key in random.sample(_SIZE_KEYS, random.randint(0, 2)):
        writer.add_uint32(f"llama.{key}", random.choice((1, 4096, 1 << 20, 1 << 31)))
    if random.random() < 0.5:
        writer.add_block_count(random.choice((1, 32, 4096)))
    if random.random() < 0.5:
        writer.add_embedding_length(random.choice((64, 4096, 1 << 20)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def damage_lock(random: Random, run: Path) -> None:
    """The lock: no file, or one of any content and size."""
    path = run / ".lock"
    if random.random() < 0.6:
        _put_elsewhere(random, path, run.parent.parent / "outside" / "secret")
    else:
        path.write_bytes(random.choice((b"", b"\0" * 100, random.randbytes(1000), b"99999\nhost\n")))
        path.chmod(random.choice((0o600, 0o000, 0o777)))


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


# -- archives ------------------------------------------------------------------------------------------------------

_ROW = b'{"text": "a few words that make a row of some length, so that there are not too many"}\n'
_PATTERNS = (b"\0", b" ", b"\n", b"a", b"a word ", b"[", _ROW, b'{"text": "', b"\xc3", b"{}\n")


def damage_bomb(random: Random, path: Path) -> None:
    """A GiB in a small archive, or in a file that is mostly hole; or a long line, deep nesting, many rows."""
    pattern = random.choice(_PATTERNS)
    if path.suffix == ".gz":
        begin = gzip.compress(random.choice((b"", b'{"text": "some words"}\n')))
        member = gzip.compress(pattern * ((16 << 20) // len(pattern)), 1)
        end = random.choice((b"", b"junk", member[: len(member) // 2], gzip.compress(member)))
        path.write_bytes(begin + member * random.choice((1, 16)) + end)
        return
    begin = random.choice((b"", b'{"text": "some words"}\n'))
    path.write_bytes(
        begin + pattern * random.choice((1, 1 << 10, (1 << 20) // len(pattern), (20 << 20) // len(pattern)))
    )
    if random.random() < 0.5:
        os.truncate(path, 200 << 20)


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


def damage_moments(random: Random, path: Path) -> None:
    """The moments of a run, and the hash that the manifest has of them."""
    damage_safetensors(random, path)
    rehash(path.parent, path)


def rehash(run: Path, path: Path) -> None:
    """As whoever may write to a run directory would."""
    manifest: dict[str, Any] = json.loads((run / "nbl.json").read_text(encoding="utf-8"))
    name = path.relative_to(run).as_posix()
    for record in manifest["stages"].values():
        if name in record["files"]:
            record["files"][name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (run / "nbl.json").write_text(json.dumps(manifest), encoding="utf-8")


def damage_eval(random: Random, path: Path) -> None:
    """eval.json: values, or the scores of single items, which are numbers in one string each."""
    if random.random() < 0.6:
        damage_json(random, path)
    else:
        value = json.loads(path.read_text(encoding="utf-8"))
        scores = random.choice(value["results"])["scores"]
        name = random.choice(sorted(scores))
        scores[name] = random.choice(
            (scores[name][:-3], scores[name] + " 1", "", "x", "nan", "1e999", "1,2 3", "\x1b[31m")
        )
        path.write_text(json.dumps(value), encoding="utf-8")
    if random.random() < 0.5:
        rehash(path.parent, path)
