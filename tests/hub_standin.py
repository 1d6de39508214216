"""A stand-in for the Hugging Face Hub: a local HTTP server that the Hub's libraries talk to.

It serves files from memory under the addresses that the Hub uses. Tests use it through the fixture `hub`.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub.constants
import huggingface_hub.hf_api
import huggingface_hub.utils
import pytest

_FILE = re.compile(r"^/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")
_API = re.compile(r"^/api/(datasets|models)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)/?(.*))?$")
MAIN = "0" * 40  # the commit that branch main points to


@dataclass
class Hub:
    """The files that the server serves, and a record of what it has served."""

    files: dict[tuple[str, str, str], bytes] = field(default_factory=dict)  # by repository, commit and path
    status: int | None = None  # if set, answer everything with this status
    served: list[str] = field(default_factory=list)  # paths of files, one entry per download
    endpoint: str = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(self.path.partition("?")[0])
        if self.hub.status is not None:
            self._answer(self.hub.status, b"{}", {"Retry-After": "0"})
        elif found := _FILE.match(path):
            self._send_file(*found.groups()[1:])
        elif found := _API.match(path):
            self._send_listing(*found.groups()[1:], asked=json.loads(body or b"{}").get("paths"))
        else:
            self._answer(404, b"{}", {})

    do_HEAD = do_POST = do_GET

    def _send_file(self, repo: str, revision: str, path: str) -> None:
        commit = MAIN if revision == "main" else revision
        body = self.hub.files.get((repo, commit, path))
        if body is None:
            self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return
        if self.command == "GET":
            self.hub.served.append(path)
        self._answer(200, body, {"X-Repo-Commit": commit, "ETag": f'"{_sha1(body)}"'})

    def _send_listing(
        self, repo: str, what: str, revision: str, folder: str, asked: list[str] | None
    ) -> None:
        commit = revision if revision not in (None, "main") else MAIN
        files = {key[2]: body for key, body in self.hub.files.items() if key[:2] == (repo, commit)}
        folders = {parent.as_posix() for path in files for parent in Path(path).parents} - {"."}
        found = [{"type": "file", "path": p, "size": len(b), "oid": _sha1(b)} for p, b in files.items()]
        found += [{"type": "directory", "path": path, "oid": _sha1(path.encode())} for path in folders]
        if not files:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif what == "paths-info":
            self._send_json([entry for entry in found if entry["path"] in (asked or [])])
        elif what == "tree":
            below = f"{folder}/" if folder else ""
            self._send_json([entry for entry in found if str(entry["path"]).startswith(below)])
        else:
            self._send_json({"id": repo, "sha": commit, "siblings": [{"rfilename": p} for p in files]})

    def _send_json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _sha1(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


def forget_connections() -> None:
    """Make huggingface_hub open new connections. Old versions use a different name for the function."""
    utils = huggingface_hub.utils
    getattr(utils, "close_session", getattr(utils, "reset_sessions", None))()


def direct_to(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the Hub's address as HF_ENDPOINT does, but after huggingface_hub has been imported."""
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Let huggingface_hub talk to the stand-in and keep its cache in `tmp_path`."""
    handler = type("Handler", (_Handler,), {"hub": Hub()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    direct_to(handler.hub.endpoint, monkeypatch)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("time.sleep", lambda _: None)  # huggingface_hub waits between attempts
    forget_connections()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield handler.hub
    server.shutdown()
    server.server_close()
    forget_connections()
