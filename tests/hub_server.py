"""Serve a Hugging Face hub on loopback: the part of its HTTP API with which libraries read.

    with HubServer(models={"org/tiny": directory}, datasets={"org/text": directory}) as hub:
        ...  # HF_ENDPOINT=hub.url

Every repository has one commit, `main`. Repositories in `gated` answer as the hub answers users who have not accepted
their conditions. Unknown repositories answer as the hub answers users who are not logged in.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
REPO = r"(?P<repo>[^/]+?(/[^/]+?)??)"
API = re.compile(rf"/api/(?P<kind>models|datasets)/{REPO}(/(?P<what>revision|tree|paths-info)/(?P<rest>.+))?")
RESOLVE = re.compile(rf"/(?P<kind>datasets/)?{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


class HubServer:
    """Serve directories as repositories on a free port of 127.0.0.1, in a thread, within the context."""

    def __init__(
        self,
        *,
        models: dict[str, Path] | None = None,
        datasets: dict[str, Path] | None = None,
        gated: tuple[str, ...] = (),
    ) -> None:
        self.repos = {"models": dict(models or {}), "datasets": dict(datasets or {})}
        self.gated = gated
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        """Return the value for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    # Headers and body are sent in two writes: with Nagle's algorithm, each answer would wait 40 ms for an ACK.
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: the default writes to stderr."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_GET  # noqa: N815 (the names that http.server calls)

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        match = RESOLVE.fullmatch(path) or API.fullmatch(path)
        if match is None:
            return self._error(404, "", "not found")
        found = match.groupdict()
        kind = "datasets" if (found["kind"] or "").startswith("datasets") else "models"
        repo = unquote(found["repo"])
        root = self.hub.repos[kind].get(repo)
        if root is None:  # the repository may be private: the hub says 401 to users who are not logged in
            return self._error(401, "", "Invalid username or password.")
        if match.re is RESOLVE:
            if repo in self.hub.gated:  # everybody may list its files
                return self._error(401, "GatedRepo", f"Access to {kind[:-1]} {repo} is restricted")
            if not self._known(found["revision"]):
                return self._error(404, "RevisionNotFound", f"Invalid rev id: {found['revision']}")
            return self._file(root, unquote(found["path"]))
        revision, _, inside = (found["rest"] or "main").partition("/")
        if not self._known(unquote(revision)):
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if found["what"] == "tree":
            return self._tree(root, unquote(inside))
        if found["what"] == "paths-info":
            return self._paths_info(root, body)
        files = [str(p.relative_to(root)) for p in _files(root)]
        return self._json(
            {
                "_id": COMMIT[:24],
                "id": repo,
                "modelId": repo,
                "sha": COMMIT,
                "private": False,
                "gated": False,
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": name} for name in files],
            }
        )

    @staticmethod
    def _known(revision: str) -> bool:
        return revision in ("main", COMMIT)

    def _tree(self, root: Path, inside: str) -> None:
        top = root / inside
        if not top.is_dir():
            return self._error(404, "EntryNotFound", f"{inside} does not exist")
        recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() == "true"
        entries = top.rglob("*") if recursive else top.iterdir()
        return self._json([_entry(root, p) for p in sorted(entries)])

    def _paths_info(self, root: Path, body: bytes) -> None:
        if "json" in self.headers.get("Content-Type", ""):
            asked = json.loads(body)["paths"]
        else:
            asked = parse_qs(body.decode()).get("paths", [])
        return self._json([_entry(root, root / p) for p in asked if (root / p).exists() and p])

    def _file(self, root: Path, name: str) -> None:
        file = root / name
        if not file.is_file() or not file.resolve().is_relative_to(root.resolve()):
            return self._error(404, "EntryNotFound", f"{name} does not exist")
        data = file.read_bytes()
        size, status = len(data), 200
        headers = {
            "ETag": f'"{_oid(file)}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(asked[1]), min(int(asked[2] or size - 1), size - 1)
            if start > end:
                return self._error(416, "", "range outside of the file")
            data, status = data[start : end + 1], 206
            headers["Content-Range"] = f"bytes {start}-{end}/{size}"
        return self._send(status, data, headers)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message, "Content-Type": "application/json"}
        self._send(status, json.dumps({"error": message}).encode(), {k: v for k, v in headers.items() if v})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _files(root: Path) -> list[Path]:
    return sorted(p for p in root.rglob("*") if p.is_file())


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()


def _entry(root: Path, path: Path) -> dict[str, Any]:
    """Return one entry of a tree listing."""
    name = str(path.relative_to(root))
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0}
    return {"type": "file", "path": name, "oid": _oid(path), "size": path.stat().st_size}
