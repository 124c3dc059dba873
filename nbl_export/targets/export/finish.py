"""Completes an exported directory so that old and new runtimes load it.

Runs an exporter in this process, captures its output, and turns its failure into one sentence.

Refuses a checkpoint before a source of decoder graphs allocates what its configuration states.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError
from nbl_export.graph.names import GENAI_CONFIG, GRAPH_FILE, TEXT_FILES
from nbl_export.model.checkpoint.pretrained import check_weights, config_of, explained
from nbl_export.model.memory import available_bytes
from nbl_export.trust.contained import check_inside
from nbl_export.trust.model_settings import read_object

__all__ = ["add_text_files", "captured", "check_bounds", "finish_directory"]

# transformers 5 writes TokenizersBackend, which transformers 4 does not know. mobius turns that class into
# LlamaTokenizer, which transformers 4 would convert from a missing sentencepiece model. This class works with all.
_PORTABLE_TOKENIZER_CLASS = "PreTrainedTokenizerFast"


def finish_directory(checkpoint: Path, out: Path) -> None:
    """Add config.json and missing tokenizer files; transformers 4 and 5 can then load the tokenizer.

    Raises:
        NblError: the exporter wrote no graph or no runtime configuration.
    """
    for name in (GRAPH_FILE, GENAI_CONFIG):
        if not (out / name).is_file():
            raise NblError(f"the exporter wrote no {name}; try the other decoder_source, a key of --config")
    add_text_files(checkpoint, out)


def add_text_files(checkpoint: Path, out: Path) -> None:
    """Add missing configuration and tokenizer files; transformers 4 and 5 can then load the tokenizer.

    Raises:
        CorruptError: a file is a link out of the checkpoint's directory.
    """
    for name in TEXT_FILES:
        if (checkpoint / name).is_file() and not (out / name).exists():
            shutil.copyfile(check_inside(checkpoint / name, checkpoint), out / name)
    _make_tokenizer_portable(checkpoint, out)


def _make_tokenizer_portable(checkpoint: Path, out: Path) -> None:
    theirs = checkpoint / "tokenizer_config.json"
    ours = out / "tokenizer_config.json"
    if not (theirs.exists() and ours.exists() and (out / "tokenizer.json").exists()):
        return
    if read_object(theirs).get("tokenizer_class") != "TokenizersBackend":
        return
    settings = read_object(ours)
    settings["tokenizer_class"] = _PORTABLE_TOKENIZER_CLASS
    settings.setdefault("model_input_names", ["input_ids", "attention_mask"])  # no token_type_ids
    ours.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


log = logging.getLogger(__name__)


@contextlib.contextmanager
def captured(what: str, checkpoint: Path) -> Iterator[None]:
    """Capture stdout, stderr and log lines of the block; stdout and stderr go to the debug log. --verbose shows all.

    Exporters call logging.basicConfig at INFO, so the root logger is restored afterwards. A logged error without an
    exception is ignored: an int8 export logs "only supports 4 bits" for an embedding that it leaves alone.

    Raises:
        NblError: the block raised anything but a full disk, lack of memory or an interrupt.
    """
    said = io.StringIO()
    root = logging.getLogger()
    level = root.level
    handlers = root.handlers[:]
    disabled = root.manager.disable
    if not log.isEnabledFor(logging.DEBUG):
        logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (NblError, MemoryError):
        raise
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a failed write, not a missing file
            raise
        raise NblError(f"{what} cannot export {checkpoint}: {error}") from error
    except (Exception, SystemExit) as error:  # exporters raise errors of any library
        raise NblError(f"{what} cannot export {checkpoint}: {type(error).__name__}: {error}") from error
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
        logging.disable(disabled)
        log.debug("%s said:\n%s", what, said.getvalue())


# The GenAI builder (0.18, `make_rotary_embedding_caches_from_scratch`) and mobius make rotary tables for these.
_POSITIONS = ("max_position_embeddings", "original_max_position_embeddings", "seq_length")
_TABLES = 4  # angles, the angles twice, sines and cosines; float32
_ITEM = 4
_LEAST_BYTES = 1 << 26  # of tables; below this much they may be larger than the weights


def check_bounds(checkpoint: Path) -> None:
    """Compare a configuration with the weights in the files, and its rotary tables with these and the available memory.

    Raises:
        NblError: a weight is missing or has another shape; or the tables do not fit, or are larger than all weights.
    """
    from nbl_export.model.mapped import float32_bytes  # loads torch, which a build machine lacks

    with explained(f"{checkpoint} cannot be exported"):
        config = config_of(checkpoint)
    check_weights(checkpoint)
    positions = max(_whole(getattr(config, name, 0)) for name in _POSITIONS)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    tables = _ITEM * positions * head
    available = available_bytes()
    most = min(available // _TABLES, max(float32_bytes(checkpoint), _LEAST_BYTES))
    if tables > most:
        raise NblError(
            f"{checkpoint} states {positions} positions, whose rotary tables take {tables / 2**20:,.0f} MiB and may "
            f"take {most / 2**20:,.0f} MiB, because of its weights or the available memory; state fewer in config.json"
        )


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0
