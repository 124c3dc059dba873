"""Runs an exporter in this process, captures its output, and turns its failure into one sentence."""

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
    """Capture stdout, stderr and log lines of the block; stdout and stderr go to the debug log. --verbose shows all.

    Exporters call logging.basicConfig at INFO, so the root logger is restored afterwards. A logged error without an
    exception is ignored: an int8 export logs "only supports 4 bits" for an embedding that it leaves alone.

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
