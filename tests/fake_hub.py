"""A hub on this machine, as far as huggingface_hub talks to it: cards to fetch. No network."""

from __future__ import annotations

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


@dataclass
class FakeHub:
    """What was asked. `cards` is served; `refuse_with` is the status of every answer, where it is set."""

    url: str
    cards: dict[str, str] = field(default_factory=dict)
    refuse_with: int | None = None
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, authorization

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
