"""A model folder -> a repository of the Hugging Face hub, in one commit.

What goes is what the run recorded (stage rewrite) and the card, nothing else that lies there. nbl.json goes without
the places of this machine. Nothing is sent, and no connection made, unless it is asked for.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from nbl_export.artifacts import RunDirectory
from nbl_export.base_model import check_hub_id
from nbl_export.card import CARD, check_publishable, is_stale
from nbl_export.errors import CorruptError, NblError
from nbl_export.progress import Ui
from nbl_export.public_facts import public_facts

__all__ = ["Upload", "push_run", "push_table", "uploads"]

_FACTS = "nbl.json"
_LOG_IN = "log in with hf auth login, or set HF_TOKEN to a token that may write there"


@dataclass(frozen=True)
class Upload:
    """A file that goes: its name in the repository, and where its bytes are."""

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def push_run(
    directory: Path, repo: str, ui: Ui, *, send: bool = False, private: bool = False, force: bool = False
) -> dict[str, Any]:
    """Say what would go to `repo`, and send it where `send` says so.

    Args:
        private: how the repository is made where there is none.
        force: also a run that failed verification, or a card of an older report.

    Returns:
        repository, files (name, bytes), total_bytes, sent, url (None where nothing was sent).

    Raises:
        UsageError: `repo` is not OWNER/NAME.
        NblError: the run is not to be published, has no card of it, or the hub refuses.
        CorruptError: a file is missing or not what was written there.
    """
    check_hub_id(repo, "the repository")
    with RunDirectory.open_run(directory, create=False) as run:
        check_publishable(run, force=force)
        _check_card(run, force)
        files = uploads(run)
        url = _send(repo, files, run, private, ui) if send else None
    return {
        "repository": repo,
        "files": [{"name": file.name, "bytes": file.size} for file in files],
        "total_bytes": sum(file.size for file in files),
        "sent": send,
        "url": url,
    }


def _check_card(run: RunDirectory, force: bool) -> None:
    card = run.path / CARD
    if not card.is_file():
        raise NblError(f"{run.path / 'model'} has no model card; write it with nbl-export card {run.path}")
    if is_stale(run) and not force:
        raise NblError(f"{card} is of an older report; write it again with nbl-export card {run.path}")


def uploads(run: RunDirectory) -> list[Upload]:
    """The card and the recorded files of the model folder, by name.

    Raises:
        CorruptError: one of them is a link, or lies in a folder that is one.
    """
    prefix = "model/"
    recorded = [name for name in run.stages["rewrite"]["files"] if name.startswith(prefix)]
    files = [Upload(name.removeprefix(prefix), _no_link(run.path, name)) for name in {*recorded, CARD}]
    return sorted((_without_places(file, run) for file in files), key=lambda file: file.name)


def _no_link(home: Path, name: str) -> Path:
    file = home / name
    if file.is_symlink() or file.parent.is_symlink() or ".." in Path(name).parts:
        raise CorruptError(f"{file} is a link, and what lies elsewhere is not published; put the file itself there")
    return file


def _without_places(file: Upload, run: RunDirectory) -> Upload:
    if file.name != _FACTS:
        return file
    facts = public_facts(run.read_json(f"model/{_FACTS}"), run.manifest)
    return Upload(file.name, (json.dumps(facts, indent=1, ensure_ascii=False) + "\n").encode())


def _send(repo: str, files: list[Upload], run: RunDirectory, private: bool, ui: Ui) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(library_name="nbl-export")
    replaced = len(run.manifest["replaced_layers"])
    message = f"{replaced} of {run.manifest['num_layers']} attention layers replaced by linear ones (nbl-export)"
    with _explained(repo), ui.task("uploading"):
        api.create_repo(repo, private=private or None, exist_ok=True)
        operations = [
            CommitOperationAdd(file.name, file.content if isinstance(file.content, bytes) else str(file.content))
            for file in files
        ]
        api.create_commit(repo, operations, commit_message=message)
    return f"{api.endpoint}/{repo}"


@contextlib.contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turn what the hub or the network says into a sentence."""
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except Exception as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403) or isinstance(error, LocalTokenNotFoundError):
            reason = f"the hub does not let you write there; {_LOG_IN}"
        elif isinstance(error, OfflineModeIsEnabled):
            reason = "HF_HUB_OFFLINE is set; unset it"
        elif status is not None:
            reason = f"the hub answers {status}: {first}"
        else:
            reason = f"{first}; check the network and HF_ENDPOINT, then give the same command again"
        raise NblError(f"could not publish to {repo}: {reason}") from error


def push_table(found: dict[str, Any]) -> Group:
    """`push_run` for people."""
    table = Table("file", "size", title=found["repository"])
    table.columns[1].justify = "right"
    for file in found["files"]:
        table.add_row(file["name"], _spoken(file["bytes"]))
    table.add_row("in all", _spoken(found["total_bytes"]), style="bold")
    said = found["url"] if found["sent"] else "Nothing was sent; the same command with --yes does."
    return Group(table, said)


def _spoken(size: int) -> str:
    return f"{size:,} B" if size < 2**20 else f"{size / 2**20:,.1f} MiB"
