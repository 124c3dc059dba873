"""A hub on this machine, as far as huggingface_hub talks to it: cards to fetch, repositories to push to. No network."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

__all__ = ["FakeHub", "fake_hub"]

_REVISION = "0123456789abcdef0123456789abcdef01234567"
_LARGE = (".onnx", ".data")  # what the hub takes as LFS objects, whatever the size


@dataclass
class FakeHub:
    """What was asked and sent. `cards` is served; `refuse_with` is the status of every answer, where it is set."""

    url: str
    cards: dict[str, str] = field(default_factory=dict)
    refuse_with: int | None = None
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, authorization
    repositories: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> as it was created
    files: dict[str, bytes] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)  # LFS objects by SHA-256
    messages: list[str] = field(default_factory=list)

    def environment(self, home: Path) -> dict[str, str]:
        """What a process needs to talk to this hub and to nothing else."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_secret",
            "HF_HOME": str(home),
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }


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
        if self._begin() is None:
            return
        repo = self.path.partition("/resolve/")[0].strip("/")
        card = self.hub.cards.get(repo) if self.path.endswith("/README.md") else None
        if card is None:
            self._answer({"error": "not found"}, 404, X_Error_Code="EntryNotFound")
            return
        text = card.encode()
        etag = hashlib.sha256(text).hexdigest()
        self._answer(text, ETag=f'"{etag}"', X_Repo_Commit=_REVISION)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        body = self._begin()
        if body is not None:
            self.hub.large[self.path.rpartition("/")[2]] = body
            self._answer()

    def do_POST(self) -> None:
        body = self._begin()
        if body is None:
            return
        if self.path.endswith("/repos/create"):
            self._create(json.loads(body))
        elif self.path.endswith("/validate-yaml"):
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            self._answer({"files": [_mode(file["path"]) for file in json.loads(body)["files"]]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self._answer({"transfer": "basic", "objects": [self._place(o) for o in json.loads(body)["objects"]]})
        elif "/commit/" in self.path:
            self._commit(
                self.path.removeprefix("/api/models/").partition("/commit/")[0],
                [json.loads(line) for line in body.splitlines()],
            )
        else:
            self._answer({"error": f"this hub does not know {self.path}"}, 404)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        status = 409 if name in self.hub.repositories else 200
        self.hub.repositories.setdefault(name, asked)
        self._answer({"url": f"{self.hub.url}/{name}"}, status)

    def _place(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.hub.large:
            return wanted
        return {**wanted, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}", "header": {}}}}

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif line["key"] == "file":
                self.hub.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.hub.files[value["path"]] = self.hub.large[value["oid"]]
        self._answer(
            {"commitUrl": f"{self.hub.url}/{repo}/commit/{_REVISION}", "commitOid": _REVISION, "success": True}
        )


def _mode(path: str) -> dict[str, Any]:
    return {"path": path, "uploadMode": "lfs" if path.endswith(_LARGE) else "regular", "shouldIgnore": False}
