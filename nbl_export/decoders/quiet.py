"""Runs an exporter in this process with its chatter captured, and turns its failure into one sentence."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

from nbl_export.errors import NblError

__all__ = ["captured"]

log = logging.getLogger(__name__)


@contextlib.contextmanager
def captured(what: str, checkpoint: Path) -> Iterator[None]:
    """Swallow stdout, stderr and log lines of the block (the first two go to the debug log; all show with --verbose).

    Exporters call logging.basicConfig at INFO; the root logger is put back as it was. What they log as an error
    without raising one is no error: an int8 export "only supports 4 bits" of an embedding that it leaves alone.

    Raises:
        NblError: the block raised anything but a full disk, lack of memory or an interrupt.
    """
    said = io.StringIO()
    root = logging.getLogger()
    level, handlers, disabled = root.level, root.handlers[:], root.manager.disable
    if not log.isEnabledFor(logging.DEBUG):
        logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (NblError, MemoryError):
        raise
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a write that failed, not a file not found
            raise
        raise NblError(f"{what} cannot export {checkpoint}: {error}") from error
    except (Exception, SystemExit) as error:  # exporters raise what their depths raise
        raise NblError(f"{what} cannot export {checkpoint}: {type(error).__name__}: {error}") from error
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
        logging.disable(disabled)
        log.debug("%s said:\n%s", what, said.getvalue())
