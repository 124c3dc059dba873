"""Files that a stranger may hand over: each function damages one in place, in a way that `random` chooses.

    damage_bytes         any file: bits, cuts, slices and sizes
    damage_json          config.json, nbl.json, tokenizer.json
    damage_sizes         config.json: numbers that somebody allocates by
    damage_gguf          keys: arrays, texts and sizes that state more than there is; dimensions of a tensor
    damage_xml           an IR: places of constants, entities, tags without an end
    damage_toml          values of a configuration
    damage_safetensors   the header, or numbers that are none
    damage_onnx          fields of any message of a graph; external data that lies elsewhere
    damage_text          calibration text, compressed or not
    hostile_words        a prompt, and variables of torchrun, for a command line

What lies outside the given directories is named by `OUTSIDE`, relative to the damaged file, and as an absolute path.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
from safetensors.numpy import load_file, save_file

from nbl_export.options.options import OPTIONS

__all__ = ["OUTSIDE", "damage_bytes", "damage_codes", "damage_gguf", "damage_json", "damage_onnx",
           "damage_safetensors", "damage_sizes", "damage_text", "damage_toml", "damage_xml", "hostile_words",
           "places"]  # fmt: skip

OUTSIDE = "../outside/secret"
_SIZES = (0, 1, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)


def _outside(path: Path) -> str:
    return str((path.parent / OUTSIDE).resolve())


# -- bytes -----------------------------------------------------------------------------------------------------


def damage_bytes(random: Random, path: Path) -> None:
    """One to four changes; half of them near the beginning, where headers are."""
    data = bytearray(path.read_bytes())
    for _ in range(random.randint(1, 4)):
        end = len(data) if random.random() < 0.5 else min(len(data), 512)
        at = random.randrange(max(1, end))
        length = random.choice((1, 4, 8, 64, 1024))
        held = bytes(data[at : at + length])
        flipped = bytes(byte ^ 1 << random.randrange(8) for byte in held[:1])
        reach, new = random.choice((
            (1, flipped), (1, flipped), (1, random.choice((b"\0", b" ", b"\x7f", b"\x80", b"\xff"))),  # a bit, a byte
            (len(data), b""), (0, random.randbytes(length)), (0, held), (length, b""),  # cut, insert, double, remove
            (length, bytes(len(held))), (8, struct.pack("<Q", random.choice(_SIZES))),  # zeros, a size
        ))  # fmt: skip
        data[at : at + reach] = new
    path.write_bytes(data)


# -- JSON ------------------------------------------------------------------------------------------------------


def damage_json(random: Random, path: Path) -> None:
    """One to three values exchanged, removed or put elsewhere; or the bytes."""
    if random.random() < 0.1:
        damage_bytes(random, path)
        return
    root = json.loads(path.read_text(encoding="utf-8"))
    _damage_tree(random, root, path)
    path.write_text(json.dumps(root), encoding="utf-8")


def _damage_tree(random: Random, root: Any, path: Path) -> None:
    for _ in range(random.randint(1, 3)):
        found = list(places(root))
        if not found:
            return
        container, key = random.choice(found)
        kind = random.random()
        if kind < 0.15 and isinstance(container, dict):
            del container[key]
        elif kind < 0.25:
            other, where = random.choice(found)
            container[key] = json.loads(json.dumps(other[where]))
        elif kind < 0.3 and isinstance(container, dict):
            container[_hostile_name(random)] = container.pop(key)
        else:
            container[key] = _hostile_value(random, container[key], path)


def places(value: Any, most: int = 8) -> Iterator[tuple[Any, Any]]:
    """Containers and keys of every value, of a list the first ones."""
    keys = list(value) if isinstance(value, dict) else range(min(len(value), most)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from places(value[key], most)


def _hostile_name(random: Random) -> str:
    return random.choice(("", ".", "..", OUTSIDE, "\0", "a\nb", "\ud83d\ude00", "x" * 5000, "__class__", "-1"))


def _hostile_value(random: Random, was: Any, path: Path) -> Any:
    if isinstance(was, bool) or random.random() < 0.5:
        choices: list[Any] = [None, True, "", [], {}, [[]], {"": None}, "NaN", math.nan, math.inf, -1, 0, 1e308, 2**63]
        choices += [2**31, -(2**63), 10**30, 0.5, OUTSIDE, _outside(path), _hostile_name(random), _nested(200)]
        return random.choice(choices)
    if isinstance(was, int | float):
        return random.choice((-was, was + 1, was - 1, was * 2, was * 1000, was // 2 if was else 1, was + 0.5, str(was)))
    if isinstance(was, str):
        return random.choice((was[: len(was) // 2], was * 2, was.upper(), was + "\n", [was], {was: was}, OUTSIDE))
    if isinstance(was, list):
        return random.choice((was[:-1], was * 2, was[::-1], [was], dict(enumerate(map(str, was))), [*was, None]))
    return random.choice(([was], list(was or ()), str(was)))


def _nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


_SIZED = ("max_position_embeddings", "max_position_embeddings", "vocab_size", "hidden_size", "intermediate_size",
          "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window",
          "layer_types", "eos_token_id", "rope_parameters")  # fmt: skip


def damage_sizes(random: Random, path: Path) -> None:
    """One or two sizes far above, or a little beside, what the weights have."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in random.sample(_SIZED, random.choice((1, 1, 2))):
        number = random.choice((20_000_000, 2 ** random.randint(10, 34), random.randint(1, 5000)))
        was = config.get(name)
        if isinstance(was, dict):
            was["factor"], was["original_max_position_embeddings"] = float(number), number
        else:
            config[name] = [was] * min(number, 10**6) if name == "layer_types" else number
    path.write_text(json.dumps(config), encoding="utf-8")


# -- GGUF ------------------------------------------------------------------------------------------------------

_NUMBERS, _WORD, _ARRAY = (0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), 8, 9
_KEYS = ("general.tags", "general.name", "general.base_model.0.repo_url", "tokenizer.ggml.tokens",
         "tokenizer.ggml.scores", "tokenizer.chat_template", "llama.context_length", "llama.block_count",
         "llama.embedding_length", "llama.vocab_size", "llama.attention.head_count", "x")  # fmt: skip


def damage_gguf(random: Random, path: Path) -> None:
    """A key before all others, the number of a tensor's dimensions, or the bytes."""
    data, kind = bytearray(path.read_bytes()), random.random()
    if kind < 0.2:
        damage_bytes(random, path)
        return
    if kind < 0.35:
        names = [b"blk.0.attn_q.weight", b"token_embd.weight", b"output_norm.weight", b"blk.1.ffn_up.weight"]
        name = random.choice(names)
        at = data.rindex(name) + len(name)
        data[at : at + 4] = struct.pack("<I", random.choice((0, 1, 3, 4, 5, 2**31)))
    else:
        count = struct.unpack_from("<Q", data, 16)[0]
        data[16:24] = struct.pack("<Q", count + 1)
        data[24:24] = _key(random)
    path.write_bytes(data)


def _key(random: Random) -> bytes:
    """A key of a GGUF file with a value of its own size, or far less of it than it states."""
    name = random.choice(_KEYS).encode()
    value = _typed(random, random.choice((_ARRAY, _ARRAY, _WORD, 4, 10)))
    if random.random() < 0.1:  # a long array that is all there: empty words, or numbers
        count = 1 << 20
        value = struct.pack("<IIQ", _ARRAY, random.choice((_WORD, 10)), count) + bytes(8 * count)
    return struct.pack("<Q", len(name)) + name + value


def _typed(random: Random, kind: int, depth: int = 0) -> bytes:
    if kind == _ARRAY:
        of = random.choice((*_NUMBERS, _WORD, _WORD, _ARRAY, _ARRAY, 99)) if depth < 3 else 5
        count = random.choice((*_SIZES, 2**24, 2**62))
        held = b"" if of == 99 else _typed(random, of, depth + 1) * random.choice((0, 1, min(count, 1000)))
        return struct.pack("<IIQ", _ARRAY, of, count)[0 if depth == 0 else 4 :] + held
    stated = b"" if depth else struct.pack("<I", kind)
    if kind == _WORD:
        return stated + struct.pack("<Q", random.choice(_SIZES)) + random.randbytes(random.choice((0, 8, 4096)))
    size = random.choice(_SIZES) if kind == 10 else random.choice((0, 20_000_000, 2**31, 2**32 - 1))
    return stated + struct.pack("<Q", size)[: {0: 1, 1: 1, 2: 2, 3: 2, 7: 1, 10: 8, 11: 8, 12: 8}.get(kind, 4)]


# -- an IR, and a configuration --------------------------------------------------------------------------------


def damage_xml(random: Random, path: Path) -> None:
    """Places of constants, shapes and names; entities that multiply; tags and attributes that do not end."""
    text = path.read_text(encoding="utf-8")
    kind = random.randrange(7)
    many = 2 ** random.randint(4, 17)
    if kind == 0:
        damage_bytes(random, path)
        return
    if kind == 1:
        text = text.replace("<layers>", f"<layers><layer {random.choice(_ENDLESS) * many}", 1)
    elif kind == 2:
        text += random.choice((*_ENDLESS, "<!--", "<![CDATA[", "<net>")) * many
    elif kind == 3:
        names = [f'<!ENTITY a{i + 1} "{f"&a{i};" * 10}">' for i in range(12)]
        head, rest = text.split("?>", 1)
        text = f'{head}?><!DOCTYPE net [<!ENTITY a0 "aaaaaaaaaa">{"".join(names)}]>' + rest.replace(
            "opset1", "&a12;", 1
        )
    elif kind == 4:
        text = text.replace("<layer ", "<layer>" * many + "<layer ", 1)
    else:
        place = random.choice(list(_PLACES.finditer(text)))
        value = random.choice((*map(str, _SIZES), "-1", "", "x", "9" * 5000, "1,2", "?", OUTSIDE))
        text = text[: place.start(1)] + value + text[place.end(1) :]
    path.write_text(text, encoding="utf-8")


_PLACES = re.compile(r'(?:offset|size|shape|element_type|version|from-layer|to-port)="([^"]*)"')
_ENDLESS = ('offset="1" ', 'offset="1" size=', "<", '"', "<a>", "<a b='", "&lt;", 'offset="' + "1" * 200)


def damage_toml(random: Random, path: Path) -> None:
    """Other values of options, more options, tables that nest; or the bytes. No text or model of this machine."""
    if random.random() < 0.15:
        damage_bytes(random, path)
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    names = [name for name, said in OPTIONS.items() if "path" not in said.python]
    for _ in range(random.randint(1, 3)):
        name = random.choice(names).replace("_", random.choice("_-"))
        numbers = ("0", "-1", "1e308", "nan", "2_000_000_000", str(2**63), "1.5", "true", '"8"', '"0-2000000000"')
        others = ('""', "[]", "[[]]", "{}", '"\\u001b[31m"', f'"{"x" * 5000}"', "1979-05-27", "[" * 3000, '"1e99%"')
        lines.append(f"{name} = {random.choice((*numbers, *others))}")
    if random.random() < 0.3:
        lines = [line for line in lines if random.random() < 0.7]
    path.write_text("\n".join(lines), encoding="utf-8")


# -- safetensors -----------------------------------------------------------------------------------------------


def damage_safetensors(random: Random, path: Path) -> None:
    """Bytes, header, numbers, or JSON that the metadata holds as text."""
    kind = random.random()
    if kind < 0.3:
        damage_bytes(random, path)
        return
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    written = [name for name, text in header.get("__metadata__", {}).items() if text.startswith("{")]
    if written and kind < 0.6:
        _damage_inner(random, header["__metadata__"], written[0], path)
    elif kind < 0.75:
        _damage_tree(random, header, path)
    else:
        _spoil_numbers(random, header, body)
    said = json.dumps(header).encode("utf-8", "surrogatepass")
    claimed = len(said) if random.random() < 0.95 else random.choice(_SIZES)
    path.write_bytes(struct.pack("<Q", claimed) + said + body)


def _damage_inner(random: Random, metadata: dict[str, str], name: str, path: Path) -> None:
    inner = json.loads(metadata[name])
    _damage_tree(random, inner, path)
    deep = ("[" * 200_000, '{"a":' * 100_000, "9" * 5000, "", "{")
    metadata[name] = random.choice(deep) if random.random() < 0.15 else json.dumps(inner)


def damage_codes(random: Random, path: Path) -> None:
    """Codes, zero points or scales of a matrix in another shape or type."""
    tensors = load_file(path)
    name = random.choice([name for name in tensors if name.endswith(("qweight", "qzeros", "scales"))])
    was = tensors[name]
    rows = random.choice((0, 1, 3, 2 * len(was), 128))
    other = np.resize(was, (rows, *was.shape[1:]))
    shapes = (other, other, was.reshape(-1), was.reshape(-1)[:2], was.sum(), was[..., :0], was[..., :1], was.T)
    made = random.choice(shapes)
    kind = random.choice((was.dtype, was.dtype, was.dtype, np.float32, np.int64, np.bool_))
    tensors[name] = np.ascontiguousarray(made, dtype=kind)
    if random.random() < 0.1:
        del tensors[name]
    save_file(tensors, path, {"format": "pt"})


def _spoil_numbers(random: Random, header: dict[str, Any], body: bytearray) -> None:
    """NaN, infinity and what overflows, in one tensor or all over it."""
    names = [name for name in header if name != "__metadata__"]
    begin, end = header[random.choice(names)]["data_offsets"]
    wide = header[names[0]]["dtype"] == "F64"
    value = random.choice((math.nan, math.inf, -math.inf, 1e38, 0.0))
    number = np.array(value, np.float64 if wide else np.float32).tobytes()
    length = len(number)
    places = range(begin, end - length + 1, length)
    chosen = places if random.random() < 0.3 else random.choices(places, k=min(3, len(places))) if places else ()
    for place in chosen:
        body[place : place + length] = number


# -- ONNX ------------------------------------------------------------------------------------------------------


def damage_onnx(random: Random, path: Path) -> None:
    """One to three changes: fields of any message of the graph, data that lies elsewhere, or bytes that still parse."""
    model = onnx.load(path, load_external_data=False)
    for _ in range(random.randint(1, 3)):
        kind = random.random()
        if kind < 0.12:
            _external(random, model, path)
        elif kind < 0.18:
            path.write_bytes(model.SerializeToString())
            damage_bytes(random, path)
            with contextlib.suppress(Exception):  # which type depends on protobuf's release
                model.CopyFrom(onnx.load_model_from_string(path.read_bytes()))
        else:
            _damage_field(random, _part(random, model), model.graph)
    path.write_bytes(model.SerializeToString())


def _inner(message: Any, field: Any) -> list[Any]:
    """What a field holds."""
    held = getattr(message, field.name)
    return list(held) if _is_many(held) else [held]


def _is_many(held: Any) -> bool:
    return hasattr(held, "append")  # repeated fields of every release of protobuf


def _part(random: Random, model: Any) -> Any:
    """A message: the model, its graph, or one at any depth below."""
    part = random.choice((model, *[model.graph] * 9))
    while random.random() < 0.8:
        below = [field for field, _ in part.ListFields() if field.message_type]
        if not below:
            break
        part = random.choice(_inner(part, random.choice(below)))
    return part


def _damage_field(random: Random, part: Any, graph: Any) -> None:
    """Change, remove or double what a field holds; names become others of the graph, which may close a circle."""
    fields = [field for field, _ in part.ListFields()]
    if not fields or random.random() < 0.2:
        fields = list(part.DESCRIPTOR.fields)
    field = random.choice(fields)
    held, kind = getattr(part, field.name), random.randrange(3)
    if field.message_type and not (_is_many(held) and held):
        part.ClearField(field.name)
    elif not _is_many(held):
        setattr(part, field.name, _other(random, field, held, graph))
    elif held and kind == 0:
        del held[random.randrange(len(held))]
    elif field.message_type:
        held.append(random.choice(list(held)))
    elif held and kind == 1:
        index = random.randrange(len(held))
        held[index] = _other(random, field, held[index], graph)
    else:
        held.append(_other(random, field, held[0] if held else None, graph))


_OPERATORS = ("Add", "MatMul", "Identity", "If", "Loop", "GroupQueryAttention", "NoSuch", "com.microsoft", "evil.x")


def _other(random: Random, field: Any, was: Any, graph: Any) -> Any:
    """Another value of a field of protobuf."""
    if field.enum_type:
        return random.choice(field.enum_type.values).number
    if field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return random.choice((math.nan, math.inf, 0.0, -1.0, 1e38))
    if field.type == field.TYPE_BYTES:
        length = len(was or b"")
        spoiled = np.full(length // 4, random.choice((np.nan, np.inf, 1e38)), np.float32).tobytes()
        return random.choice((spoiled, (was or b"")[: length // 2], b"", (was or b"") * 2, b"\xff"))
    if field.type == field.TYPE_STRING:
        names = [name for node in graph.node for name in (*node.input, *node.output)]
        return random.choice((random.choice(names or [""]), "", OUTSIDE, "x" * 1000, random.choice(_OPERATORS)))
    most = 31 if field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_UINT32) else 63
    least = 0 if field.cpp_type in (field.CPPTYPE_UINT32, field.CPPTYPE_UINT64) else -(2**most)
    numbers = (0, 1, 2, 3, 7, 10, 16, 99, 2**31 - 1, 2**40, 2**62, -1, least)
    return random.choice([number for number in numbers if least <= number < 2**most])


def _external(random: Random, model: Any, path: Path) -> None:
    """Data that lies elsewhere: outside, behind a link, beyond the end."""
    tensor = random.choice(model.graph.initializer or [onnx.TensorProto()])
    link = path.with_name("link.data")
    link.unlink(missing_ok=True)
    link.symlink_to(_outside(path))
    place = random.choice((OUTSIDE, _outside(path), link.name, "model.onnx.data", path.name, "", ".", "/dev/zero"))
    del tensor.external_data[:]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    offset, length = (random.choice(("0", "-1", "7", str(2**40), str(2**63), "x")) for _ in range(2))
    for key, value in (("location", place), ("offset", offset), ("length", length))[: random.randint(1, 3)]:
        tensor.external_data.add(key=key, value=value)


# -- text ------------------------------------------------------------------------------------------------------


def damage_text(random: Random, path: Path) -> None:
    """Other encodings, lines that are no JSON, archives that are none or far larger than they look."""
    text = path.read_bytes()
    kind = random.randrange(6)
    if path.suffix == ".gz":
        whole = gzip.decompress(text)
        bomb = b'{"text": "' + b"a " * (4 << 20) + b'"}\n'
        path.write_bytes(
            random.choice((text[: len(text) // 2], whole, gzip.compress(bomb), gzip.compress(os.urandom(99))))
        )
        return
    if kind == 0:
        path.write_bytes(text.decode().encode(random.choice(("utf-16", "utf-32", "latin-1")), "replace"))
    elif kind == 1:
        lines = text.splitlines()
        lines[random.randrange(len(lines))] = random.choice(
            (b"", b"[]", b"{", b'{"text": 5}', b'{"tex', b"null", b"\xff")
        )
        path.write_bytes(b"\n".join(lines))
    elif kind == 2:
        path.write_bytes(random.choice((b"", b"\0" * 1000, b"\n" * 5000, b"a" * 100_000, b"\xef\xbb\xbf", b" ")))
    else:
        damage_bytes(random, path)


# -- words of a command line -----------------------------------------------------------------------------------


def hostile_words(random: Random) -> dict[str, str]:
    """A prompt that may be no UTF-8, and what torchrun leaves in a shell: no port that anything could wait at."""
    pieces = ("Hi", "\udcff\udcfe", "\udc80", "\0", "\x1b[31m", "\u202e", "{{", "\ud83d", "a" * 5000, "\u0301")
    numbers = ("0", "1", "2", "7", "-1", "x", "", "\u00b2", "1e3", "9" * 5000)
    said = {name: random.choice(numbers) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    said["MASTER_ADDR"] = random.choice(("127.0.0.1", "", "\u00b2"))
    said["MASTER_PORT"] = random.choice(("x", "-1", "", "9" * 5000, "70000"))
    kept = random.sample(sorted(said), random.choice((6, 6, 6, 5, 4)))
    prompt = "".join(random.choices(pieces, k=random.randint(1, 3)))
    return {"prompt": prompt, "variables": " ".join(f"{name}={said[name]}" for name in kept)}
