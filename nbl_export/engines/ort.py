"""ONNX Runtime: its capabilities, a known-answer probe, and a runner over ONNX Runtime GenAI.

    directory (model.onnx, model.onnx.data, genai_config.json, tokenizer; all_logits.onnx is not looked at)
        └─ GenaiRunner ── begin ─ append ─ append ─ rewind ─ append ...        what bench times
                      └── encode ─ stream | greedy                            what generate and verify read

What was found out about onnxruntime_genai 0.18 on the CPU provider, and is relied on here:

- `append_tokens` runs the decoder at once and synchronously; the logits of the last token are then there.
  `generate_next_token` runs it only where no unread logits are left: right after an append it takes
  tens of microseconds and merely picks a token. So the token loop here is append and argmax, one mechanism.
- `rewind_to` works with `past_present_share_buffer`, down to length 0, also with sparse cache ids. Appending the same
  chunks again gives bit-equal logits; other chunk sizes differ by rounding (4e-5 at fp32, SmolLM2).
- A batch takes one `append_tokens`; another is refused ("can only be called once for batch_size > 1"), as is a
  `rewind_to` other than to 0. So a batch goes on by `generate_next_token`, and is filled again to go back. In a
  batch `pad_token_id` is masked wherever it stands; a row of nothing else ends in an error of GroupQueryAttention.
- `get_logits` before the first append, or after a rewind, answers with stale memory instead of an error.
- A generator allocates and clears its whole cache on construction: max_length tokens are resident at once.
- Unset, `intra_op_num_threads` is half of the logical CPUs, 16 at most (src/models/model.cpp), which leaves
  half of a machine without hyper-threading idle. It is therefore always set here.
- `encode` adds no begin-of-text by itself; after `Tokenizer.update_options(add_special_tokens="true")` it does as
  transformers, if the post-processor of tokenizer.json has the bos_token of tokenizer_config.json.
- An int4 graph (MatMulNBits, accuracy level 4) computes single tokens and chunks with different kernels: logits of the
  same 40 tokens differ by up to 0.6 between one prefill and 25 + 15 single steps (SmolLM2). Compare like chunks.
- Token ids beyond the vocabulary are refused by an fp32 embedding, and go through unseen in an int4 one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil

from nbl_export.engines.base import Availability, Capabilities
from nbl_export.engines.genai_folder import check_genai_folder
from nbl_export.engines.onnx_decoder import OnnxDecoder, all_logits_file
from nbl_export.errors import MissingPackageError, NblError
from nbl_export.genai_config import GENAI_CONFIG, read_genai_config
from nbl_export.model_settings import check_tokenizer_settings
from nbl_export.records import DecoderSpec

__all__ = [
    "CAPABILITIES",
    "CPU",
    "GenaiRunner",
    "GenaiSettings",
    "default_threads",
    "is_installed",
    "open_checked",
    "open_graph",
    "open_runner",
    "probe",
    "probe_run",
]

CAPABILITIES = Capabilities(
    name="ort",
    title="ONNX Runtime",
    precisions=("fp32", "fp16", "int8", "int4"),
    sources=("genai", "mobius"),
    extra="cpu",
    half_caches=("fp16",),
)

CPU: tuple[str, dict[str, str]] = ("cpu", {})  # a provider by GenAI's name, and its options
_SILENT = 4  # ORT severity "fatal": an error reaches the user once, as the exception raised here


def probe() -> Availability:
    """Answer whether ONNX Runtime computes here, by a tiny product with a known result. Never raises."""
    try:
        clash = _clashing_packages()
        if clash:
            return Availability(False, f"{clash}; they overwrite each other's files: uninstall both, then install one")
        genai, onnxruntime = _import("onnxruntime_genai"), _import("onnxruntime")
        answer = _known_answer(onnxruntime)
        if answer != [17.0, 30.0]:
            return Availability(False, f"onnxruntime {onnxruntime.__version__} computes {answer}, not [17, 30]")
        return Availability(
            True, f"onnxruntime {onnxruntime.__version__}, onnxruntime-genai {genai.__version__}, CPU provider"
        )
    except Exception as error:  # whatever a broken installation raises is the answer
        return Availability(False, _short(error))


def probe_run() -> Availability:
    """The same: what can be exported can be run."""
    return probe()


def default_threads() -> int:
    """Number of physical cores this process may use, at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


@dataclass(frozen=True)
class GenaiSettings:
    """What genai_config.json says of a decoder: positions, vocabulary, the ids that end a text."""

    context_length: int
    vocab_size: int
    end_ids: tuple[int, ...]
    pad_id: int | None = None

    @classmethod
    def read(cls, directory: Path) -> GenaiSettings:
        """Read the settings without loading the model.

        Raises:
            NblError: the file is missing, not JSON, sets what is refused, or lacks one of the three.
        """
        path = directory / GENAI_CONFIG
        if not path.is_file():
            raise NblError(
                f"{directory} is not an ONNX Runtime GenAI model: {GENAI_CONFIG} is missing; export it again"
            )
        settings = read_genai_config(directory)
        try:
            model = settings["model"]
            end = model["eos_token_id"]
            ends = tuple(int(i) for i in (end if isinstance(end, list) else [end]))
            pad = model.get("pad_token_id")
            return cls(int(model["context_length"]), int(model["vocab_size"]), ends, None if pad is None else int(pad))
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise NblError(f"{path} cannot be read ({_short(error)}); export the model again") from error


class GenaiRunner:
    """A GenAI model directory, loaded: the TextRunner of ONNX Runtime. The directory is only read.

    Args:
        directory: model.onnx, its data, genai_config.json and, for text, the tokenizer.
        threads: intra-op threads; None takes `default_threads()`. The number in force is `self.threads`.
        provider: GenAI's name of the execution provider, and its options; None is what the directory says.

    Raises:
        MissingPackageError: onnxruntime-genai is not installed.
        NblError: the directory is not a model that loads; the message has the path.
    """

    def __init__(
        self, directory: Path, threads: int | None = None, provider: tuple[str, dict[str, str]] | None = None
    ) -> None:
        self.directory = directory
        self.threads = threads or default_threads()
        self.settings = GenaiSettings.read(directory)
        self._og = _import("onnxruntime_genai")
        self._model = _load(self._og, directory, self.threads, provider)
        self._generator: Any = None
        self._capacity = self._length = 0
        self._batch = 1
        self._fill = np.zeros((1, 0), np.int32)

    def __enter__(self) -> GenaiRunner:
        return self

    def __exit__(self, *exc: object) -> None:
        """Free the cache and the model; the runner cannot be used afterwards."""
        self.__dict__.pop("_tokenizer", None)
        self._generator = self._model = None

    # -- tokens ----------------------------------------------------------------------------------------

    def begin(self, max_tokens: int, batch: int = 1) -> None:
        """Forget the sequence; reserve the cache for min(max_tokens, context length) tokens, resident at once.

        A batch takes one token more, the one that it picks last.
        """
        self._generator = None  # free the old cache before the new one is allocated
        self._batch, self._fill = batch, np.zeros((batch, 0), np.int32)
        self._length, self._capacity = 0, min(max_tokens, self.settings.context_length)
        longest = self._capacity if batch == 1 else min(max_tokens + 1, self.settings.context_length)
        shortest = 0 if batch == 1 else longest  # a batch goes on behind an end of text
        try:
            params = self._og.GeneratorParams(self._model)
            params.set_search_options(
                max_length=longest, min_length=shortest, do_sample=False, num_beams=1, batch_size=batch
            )
            self._generator = self._og.Generator(self._model, params)
        except Exception as error:
            raise NblError(
                f"cannot start a sequence of {max_tokens} tokens on {self.directory}: {_short(error)}"
            ) from (error)

    def append(self, ids: Sequence[int]) -> None:
        """Run the decoder over ids as one chunk; returns when it is computed.

        A batch takes ids [B, T] once, and picks a token; single steps [B, 1] then go on with the tokens picked. The
        id of padding, which would be left out, becomes another one in it.

        Raises:
            NblError: the sequence would outgrow what `begin` reserved, or the engine fails.
        """
        count = len(ids) if self._batch == 1 else np.shape(ids)[1]
        if self._length + count > self._capacity:
            raise NblError(
                f"{self._length + count} tokens do not fit into {self.directory}: room for {self._capacity} "
                f"(its context is {self.settings.context_length}); use a shorter prompt"
            )
        try:
            if self._batch == 1:
                self._generator.append_tokens(np.asarray(ids, dtype=np.int32))
            else:
                self._append_rows(np.asarray(ids, dtype=np.int32))
        except Exception as error:
            raise NblError(f"{self.directory} failed on a chunk of {count} tokens: {_short(error)}") from error
        self._length += count

    def _append_rows(self, ids_BT: np.ndarray) -> None:
        if self._length == 0:
            pad = self.settings.pad_id
            self._fill = (
                ids_BT if pad is None else np.where(ids_BT == pad, (pad + 1) % self.settings.vocab_size, ids_BT)
            )
            self._generator.append_tokens(self._fill)
        elif ids_BT.shape[1] != 1:
            raise ValueError("a batch goes on token by token")
        self._generator.generate_next_token()  # runs the decoder unless it just ran, and picks

    def rewind(self, length: int) -> None:
        """Drop everything after the first `length` tokens; costs microseconds, the cache stays.

        A batch can go back to its start or to its first chunk alone, and runs that again.
        """
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot rewind {self._length} tokens to {length}")
        if self._batch > 1 and length not in (0, self._fill.shape[1]):
            raise ValueError(f"cannot rewind a batch to {length}: its first chunk has {self._fill.shape[1]} tokens")
        self._generator.rewind_to(length if self._batch == 1 else 0)
        self._length = length
        if self._batch > 1 and length:
            self._length = 0
            self.append(self._fill)  # type: ignore[arg-type]

    def last_logits(self) -> np.ndarray:
        """Logits [V] float32 after the last token; only valid right after `append`."""
        return np.asarray(self._generator.get_logits()[0, -1], dtype=np.float32)

    def pick(self) -> int:
        """The most likely next token, of the first sequence."""
        return int(self.last_logits().argmax()) if self._batch == 1 else int(self._generator.get_next_tokens()[0])

    # -- text ------------------------------------------------------------------------------------------

    @functools.cached_property
    def _tokenizer(self) -> Any:
        check_tokenizer_settings(self.directory)
        try:
            return self._og.Tokenizer(self._model)
        except Exception as error:
            raise NblError(f"the tokenizer of {self.directory} does not load: {_short(error)}; export again") from error

    def encode(self, prompt: str, *, chat: bool) -> list[int]:
        """Token ids of a prompt. With `chat` and a template in the directory: as the user's turn, through it.

        A template writes its own begin-of-text, so special tokens are added to a plain prompt only.
        """
        tokenizer = self._tokenizer
        templated = chat and _has_chat_template(self.directory)
        text = self._apply_template(prompt) if templated else prompt
        tokenizer.update_options(add_special_tokens="false" if templated else "true")
        return [int(i) for i in tokenizer.encode(text)]

    def _apply_template(self, prompt: str) -> str:
        messages = json.dumps([{"role": "user", "content": prompt}])
        try:
            return str(self._tokenizer.apply_chat_template(messages, add_generation_prompt=True))
        except Exception as error:
            raise NblError(
                f"the chat template of {self.directory} cannot be applied ({_short(error)}); try without it (--raw)"
            ) from error

    def stream(self, ids: Sequence[int], max_new_tokens: int) -> Iterator[str]:
        """Greedy continuation as text pieces, until an end-of-text id, the limit or the end of the context.

        A character that spans tokens comes out whole, with its last token.
        """
        pieces = self._tokenizer.create_stream()
        for token in self._continuation(ids, max_new_tokens):
            if token in self.settings.end_ids:
                return
            if piece := pieces.decode(token):
                yield piece

    def greedy(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        """Greedy continuation as token ids, end of text ignored; shorter where the context ends first."""
        return list(self._continuation(ids, new_tokens))

    def _continuation(self, ids: Sequence[int], new_tokens: int) -> Iterator[int]:
        if not len(ids):
            raise NblError("the prompt is empty: give at least one word")
        if len(ids) >= self.settings.context_length:
            raise NblError(
                f"the prompt has {len(ids)} tokens and {self.directory} takes {self.settings.context_length}, "
                f"the answer included: shorten the prompt"
            )
        self.begin(len(ids) + new_tokens)
        chunk: Sequence[int] = ids
        for _ in range(self._capacity - len(ids)):
            self.append(chunk)
            chunk = [self.pick()]
            yield chunk[0]


def _load(og: ModuleType, directory: Path, threads: int, provider: tuple[str, dict[str, str]] | None) -> Any:
    check_genai_folder(directory)
    options = {"intra_op_num_threads": threads, "log_severity_level": _SILENT}
    try:
        config = og.Config(str(directory))  # `check_genai_folder` has read it
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        if provider is not None:
            _choose_provider(config, *provider)
        return og.Model(config)
    except Exception as error:
        raise NblError(f"{directory} does not load in ONNX Runtime GenAI: {_short(error)}") from error


def _choose_provider(config: Any, name: str, options: dict[str, str]) -> None:
    """Leave the directory's provider its own options where it is the one asked for."""
    if name == CPU[0]:
        config.clear_providers()  # the CPU provider takes what is left, and is not to be named
    for key, value in options.items():
        config.set_provider_option(name, key, value)


def _has_chat_template(directory: Path) -> bool:
    if (directory / "chat_template.jinja").is_file():
        return True
    config = directory / "tokenizer_config.json"
    return config.is_file() and bool(json.loads(config.read_text(encoding="utf-8")).get("chat_template"))


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError(name.replace("_", "-"), CAPABILITIES.extra, "running a decoder") from error


def _clashing_packages() -> str:
    """Names of two builds of one package that are both installed, or nothing."""
    for pair in (("onnxruntime", "onnxruntime-gpu"), ("onnxruntime-genai", "onnxruntime-genai-cuda")):
        if all(is_installed(name) for name in pair):
            return f"{pair[0]} and {pair[1]} are both installed"
    return ""


def is_installed(distribution: str) -> bool:
    """Whether a distribution of that name is there, whatever state it is in."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _known_answer(onnxruntime: ModuleType) -> list[float]:
    """Run [1, 2] @ [[1, 2], [3, 4]] + [10, 20] on the CPU provider; right is [17, 30]."""
    from onnx import TensorProto, helper

    weights = [
        helper.make_tensor("w", TensorProto.FLOAT, [2, 2], [1.0, 2.0, 3.0, 4.0]),
        helper.make_tensor("b", TensorProto.FLOAT, [2], [10.0, 20.0]),
    ]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["xw"]), helper.make_node("Add", ["xw", "b"], ["y"])]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2]) for name in ("x", "y"))
    graph = helper.make_graph(nodes, "known_answer", [x], [y], weights)
    # opset 17 and IR 8: old enough for every ONNX Runtime the extra admits
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {"x": np.array([[1.0, 2.0]], dtype=np.float32)})
    return [float(value) for value in answer[0]]


def _short(error: Exception) -> str:
    """An exception as one line; of a long one the end, where ONNX Runtime puts the cause."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"...{text[-300:]}"


# -- what every engine module offers ---------------------------------------------------------------------


def open_runner(directory: Path, threads: int | None = None) -> GenaiRunner:
    """A text runner on a deployable directory."""
    return GenaiRunner(directory, threads)


def open_checked(directory: Path, threads: int | None = None) -> GenaiRunner:
    """The same runner, for verification."""
    return open_runner(directory, threads)


def open_graph(directory: Path, spec: DecoderSpec, file: str | None = None) -> OnnxDecoder:
    """The directory's graph on plain ONNX Runtime, for verification: that with all logits unless another is named."""
    return OnnxDecoder(directory, spec.head_dim, file=file or all_logits_file(directory))
