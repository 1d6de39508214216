"""A stand-in for the Hugging Face Hub: an HTTP server on this machine that huggingface_hub itself talks to.

It serves files from memory under the addresses the Hub uses, honours byte ranges, counts what it sent, and
takes commits of small files.
It is a pytest plugin, which tests use through the fixture `hub`.
"""

import base64
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
import huggingface_hub.file_download
import huggingface_hub.hf_api
import huggingface_hub.utils
import pytest

from ctxkv_lib.data.hub import HubFile

_FILE = re.compile(r"^/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")
_WRITE = re.compile(r"^/api/models/([^/]+/[^/]+)/(preupload|commit)/main$")
_API = re.compile(r"^/api/(datasets|models)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)/?(.*))?$")


@dataclass
class Hub:
    """What the server serves, and what it has served."""

    files: dict[HubFile, bytes] = field(default_factory=dict)
    status: int | None = None  # answer everything with this status instead
    sent: int = 0  # bytes of files, without headers
    uploaded: dict[str, bytes] = field(default_factory=dict)  # "owner/name/path"
    created: list[dict[str, object]] = field(default_factory=list)  # what repositories were asked for

    def find(self, kind: str, repo: str, revision: str) -> dict[str, bytes]:
        wanted = (kind, repo, revision)
        return {f.path: body for f, body in self.files.items() if (f.kind, f.repo, f.revision) == wanted}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(self.path.partition("?")[0])
        if self.hub.status is not None:
            self._answer(self.hub.status, b"{}", {"Retry-After": "0"})
        elif path == "/api/validate-yaml":
            self._send_json({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._send_json(self._create(json.loads(body)))
        elif found := _WRITE.match(path):
            self._send_json(self._write(*found.groups(), body))
        elif found := _FILE.match(path):
            self._send_file(*found.groups())
        elif found := _API.match(path):
            self._send_json(self._listing(*found.groups()))
        else:
            self._answer(404, b"{}", {})

    do_HEAD = do_POST = do_GET

    def _send_file(self, kind: str | None, repo: str, revision: str, path: str) -> None:
        body = self.hub.find("dataset" if kind else "model", repo, revision).get(path)
        if body is None:
            self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"X-Repo-Commit": revision, "ETag": f'"{_sha1(body)}"', "Accept-Ranges": "bytes"}
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        status = 206 if asked else 200
        if asked:
            first, last = int(asked[1]), int(asked[2] or len(body) - 1)
            headers["Content-Range"] = f"bytes {first}-{min(last, len(body) - 1)}/{len(body)}"
            body = body[first : last + 1]
        if self.command != "HEAD":
            self.hub.sent += len(body)
        self._answer(status, body, headers)

    def _listing(self, kinds: str, repo: str, what: str | None, revision: str, folder: str) -> object:
        files = self.hub.find(kinds.removesuffix("s"), repo, revision)
        if what in ("tree", "paths-info"):
            found = {p: b for p, b in files.items() if p.startswith(folder)}
            return [{"type": "file", "path": p, "size": len(b), "oid": _sha1(b)} for p, b in found.items()]
        return {"id": repo, "sha": revision, "siblings": [{"rfilename": p} for p in files], "tags": []}

    def _create(self, asked: dict[str, object]) -> dict[str, object]:
        self.hub.created.append(asked)
        name = "/".join(filter(None, (asked.get("organization") or "me", asked["name"])))
        return {"url": f"http://{self.headers['Host']}/{name}"}

    def _write(self, repo: str, what: str, body: bytes) -> dict[str, object]:
        if what == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.hub.uploaded[f"{repo}/{line['value']['path']}"] = content
        url = f"http://{self.headers['Host']}/{repo}/commit/{'0' * 40}"
        return {"success": True, "commitOid": "0" * 40, "commitUrl": url, "hookOutput": ""}

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
    """Make huggingface_hub open its next connection anew (the function's name depends on the version)."""
    utils = huggingface_hub.utils
    getattr(utils, "close_session", getattr(utils, "reset_sessions", None))()


def direct_to(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the environment variable HF_ENDPOINT does, for a huggingface_hub that is imported already."""
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", endpoint)  # which transformers 4 asks
    copied = huggingface_hub.file_download  # before 1.0
    for module in (huggingface_hub.constants, copied):
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """huggingface_hub talks to the stand-in, and keeps its cache in `tmp_path`."""
    handler = type("Handler", (_Handler,), {"hub": Hub()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    direct_to(endpoint, monkeypatch)
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("time.sleep", lambda _: None)  # huggingface_hub waits between attempts
    forget_connections()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield handler.hub
    server.shutdown()
    server.server_close()
    forget_connections()
