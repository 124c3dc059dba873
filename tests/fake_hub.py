"""A hub on this machine, as far as huggingface_hub and datasets talk to it: cards, and rows to stream. No network."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

__all__ = ["FakeHub", "fake_hub"]

_REVISION = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """What was asked. `refuse_with` is the status of every answer, where it is set.

    cards, configs: repository -> README.md, config.json of a model. datasets: repository -> path -> bytes.
    """

    url: str
    cards: dict[str, str] = field(default_factory=dict)
    configs: dict[str, str] = field(default_factory=dict)
    datasets: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refuse_with: int | None = None
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, authorization

    def environment(self, home: Path) -> dict[str, str]:
        """What a process needs to talk to this hub and to nothing else."""
        return {
            "HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_secret",
            "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
        }  # fmt: skip


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub that lives as long as the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = hub = FakeHub(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> FakeHub:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def _answer(self, value: Any = None, status: int = 200, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value or {}).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _begin(self) -> bytes | None:
        """Note the request; its body, None where it was refused."""
        self.hub.requests.append((self.command, self.path, self.headers.get("Authorization")))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.hub.refuse_with is not None:
            self._answer({"error": "no"}, self.hub.refuse_with)
            return None
        return body

    def do_GET(self) -> None:
        asked = self._begin()
        if asked is None:
            return
        path = unquote(self.path.partition("?")[0])
        api, data = _API.fullmatch(path), _DATA.fullmatch(path)
        if api and api["repo"] in self.hub.datasets:
            self._answer(_listed(self.hub.datasets[api["repo"]], api["kind"], api["path"] or ""))
            return
        if data and data["path"] in self.hub.datasets.get(data["repo"], {}):
            self._give(self.hub.datasets[data["repo"]][data["path"]])
            return
        repo = self.path.partition("/resolve/")[0].strip("/")
        known = {"README.md": self.hub.cards, "config.json": self.hub.configs}
        card = known.get(self.path.rpartition("/")[2], {}).get(repo)
        if card is None:
            self._answer({"error": "not found"}, 404, X_Error_Code="EntryNotFound")
            return
        text = card.encode()
        etag = hashlib.sha256(text).hexdigest()
        self._answer(text, ETag=f'"{etag}"', X_Repo_Commit=_REVISION)

    do_HEAD = do_GET

    def _give(self, content: bytes) -> None:
        """A file, or the range of it that was asked for."""
        facts = {"ETag": f'"{_digest(content)}"', "X_Repo_Commit": _REVISION, "Accept_Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            self._answer(content, 200, **facts)
            return
        first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        facts["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
        self._answer(content[first : last + 1], 206, **facts)


_API = re.compile(r"/api/datasets/(?P<repo>[^/]+/[^/]+)(/(?P<kind>revision|tree)/[^/]+(/(?P<path>.+))?)?")
_DATA = re.compile(r"/datasets/(?P<repo>[^/]+/[^/]+)/resolve/[^/]+/(?P<path>.+)")


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _listed(files: dict[str, bytes], kind: str | None, folder: str) -> Any:
    """Facts of a repository, or what is directly in a folder of it."""
    if kind != "tree":
        return {"id": "a", "sha": _REVISION, "private": False, "siblings": [{"rfilename": name} for name in files]}
    found: dict[str, Any] = {}
    prefix = f"{folder}/" if folder else ""
    for name in (name for name in files if name.startswith(prefix)):
        head, _, below = name.removeprefix(prefix).partition("/")
        kind, size = ("directory", 0) if below else ("file", len(files[name]))
        found[head] = {"type": kind, "path": prefix + head, "size": size, "oid": _digest(files[name])}
    return list(found.values())
