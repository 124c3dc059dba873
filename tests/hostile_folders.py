"""Folders that a stranger may hand over: what asks for code, links, and runs that were edited.

damage_genai         genai_config.json: libraries, files elsewhere, profiles
damage_settings      config.json, tokenizer_config.json, generation_config.json: code that lies beside them
damage_links         a file of the folder becomes a link, a pipe or a device
plant_links          more entries that are links, under names that libraries read, hidden or deep
damage_run           a file of a run directory, and its recorded hash with it; later stages may be missing
damage_sums          sums of a calibration, and their recorded hash
damage_file          a file of a folder, by the damage of its kind
damage_engine        the record of an engine
enlarge              a file of a GiB that takes no disk
plant_decoys         what a command's own names could be taken for, in the working directory
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from .hostile import damage_bytes, damage_json, damage_onnx, damage_safetensors, damage_xml

__all__ = ["damage_engine", "damage_file", "damage_genai", "damage_links", "damage_run", "damage_settings",
           "damage_sums", "enlarge", "plant_decoys", "plant_links", "rehash"]  # fmt: skip


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
    provider = random.choice(("QNN", "OpenVINO", "cuda", "VitisAI", "NvTensorRtRtx", "CustomEP", "canary"))
    option = random.choice(("backend_path", "library_path", "custom_ops_library", "cache_dir", "config_file"))
    place, key, value = random.choice((
        (random.choice((session, decoder, config["model"])), "custom_ops_library", library),
        (session, random.choice(("enable_profiling", "optimized_model_filepath", "log_id")), secret + "-made"),
        (session, "provider_options", [{provider: {option: random.choice((library, secret))}}]),
        (decoder, "filename", random.choice((secret, "../model.onnx", "", "canary.so", "model.onnx\0", "/dev/zero"))),
        (config.setdefault("search", {}), random.choice(("max_length", "num_beams", "batch_size")),
         random.choice((2**40, -1, 0, 2**31 - 1, 1e300, "x"))),
        (config["model"], random.choice(("encoder", "vision", "speech", "embedding")), {"filename": secret}),
        (session, "config_entries", {"session.load_custom_ops": library, "ep.context_file_path": secret}),
        (decoder, "pipeline", [{"a": {"filename": secret, "session_options": {"custom_ops_library": library}}}]),
    ))  # fmt: skip
    place[key] = value
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


# -- files of any kind ---------------------------------------------------------------------------------------------

_LARGE_BYTES = 1 << 30
_SMALL_TEXTS = ("chat_template.jinja", "model.safetensors.index.json", "merges.txt", "vocab.json", "added_tokens.json",
                "generation_config.json", "special_tokens_map.json", "tokenizer_config.json", "config.json", "nbl.json",
                "engine.json", "eval.json", "README.md")  # fmt: skip


def enlarge(random: Random, path: Path) -> None:
    """Zeros behind a text or JSON file of a folder, or behind the file itself; sometimes a new file, or only zeros."""
    if path.is_dir():
        held = [p for p in sorted(path.rglob("*")) if p.suffix in _TEXTS and p.stat().st_size < 1 << 20]
        path = random.choice((*held, path / random.choice(_SMALL_TEXTS)))
    with path.open("ab") as file:
        if random.random() < 0.2:
            file.truncate(0)
        file.truncate(_LARGE_BYTES)


_TEXTS = (".json", ".jinja", ".txt", ".xml", ".md", ".jsonl", ".toml")


def damage_file(random: Random, folder: Path) -> Path:
    """Returns the file."""
    suffixes = (*_TEXTS, ".safetensors", ".onnx", ".data", ".bin")
    held = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix in suffixes]
    path = random.choice([p for p in held if p.name != "pytorch_model.bin"])  # a canary
    if path.name == "genai_config.json":
        damage_genai(random, path)
    elif path.name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        damage_settings(random, path)
    else:
        _DAMAGE.get(path.suffix, damage_bytes)(random, path)
    return path


_DAMAGE = {".json": damage_json, ".safetensors": damage_safetensors, ".onnx": damage_onnx, ".xml": damage_xml}


def damage_engine(random: Random, path: Path) -> None:
    """The name of a file as the hash of the engine; or any JSON damage."""
    if random.random() < 0.5:
        damage_json(random, path)
        return
    record = json.loads(path.read_text(encoding="utf-8"))
    place = random.choice((str(_outside(path, 1)), "../../outside/secret", "..", ".", "", "x" * 300, "a/b"))
    record["plan_sha256"] = random.choice((place, place + "-made"))
    path.write_text(json.dumps(record), encoding="utf-8")


def plant_decoys(random: Random, folder: Path) -> None:
    """Data sets, models and caches under the names that a command asks the hub for; a text of each names the secret."""
    secret = str(folder.parent / "outside" / "secret")
    front = f"---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: {secret}\n---\n"
    for name in ("allenai/c4", "codeparrot/codeparrot-clean-valid", "HuggingFaceH4/ultrachat_200k"):
        place = folder / name
        place.mkdir(parents=True)
        (place / "README.md").write_text(random.choice((front, "")), encoding="utf-8")
        (place / random.choice(("train.json", "data.jsonl"))).write_text('{"text": "theirs"}\n' * 99, encoding="utf-8")
        (place / f"{place.name}.py").write_text("raise SystemExit", encoding="utf-8")
    for name in ("kernels.cache", "nbl.json", "config.json", "options.toml", ".env", "click.py"):
        (folder / name).write_text("{}", encoding="utf-8")


# -- runs that were edited -----------------------------------------------------------------------------------------


_STAGES = ("verify", "bench", "report")


def damage_run(random: Random, run: Path) -> None:
    """One file, by the damage of its kind; then the manifest says the hash that the file has.

    Half of the runs lack a later stage, so that a command works on what was damaged.
    """
    if random.random() < 0.3:
        damage_json(random, run / "nbl.json")
        return
    rehash(run, damage_file(random, run), _STAGES[random.randrange(4) :] if random.random() < 0.5 else ())


def damage_sums(random: Random, run: Path) -> None:
    """The file of a calibration's sums."""
    path = run / "sums.safetensors"
    damage_safetensors(random, path)
    rehash(run, path)


def rehash(run: Path, path: Path, without: Sequence[str] = ()) -> None:
    """As whoever may write to a run directory would. without: stages that go."""
    if path == run / "nbl.json":
        return
    manifest: dict[str, Any] = json.loads((run / "nbl.json").read_text(encoding="utf-8"))
    name = path.relative_to(run).as_posix()
    manifest["stages"] = {stage: record for stage, record in manifest["stages"].items() if stage not in without}
    for record in manifest["stages"].values():
        if name in record["files"]:
            record["files"][name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (run / "nbl.json").write_text(json.dumps(manifest), encoding="utf-8")
