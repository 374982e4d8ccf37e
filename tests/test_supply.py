"""Test that installed packages are those locked by hash, and that the audit says what it could not check."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any, ClassVar

import pytest

ROOT = Path(__file__).resolve().parents[1]


def lock() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = tomllib.loads((ROOT / "uv.lock").read_text("utf-8"))["package"]
    return found


def test_every_locked_package_has_a_hash() -> None:
    """Every file that could be installed has one, and every package comes from one index."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    packages = [p for p in lock() if p["name"] != project["name"]]
    assert len(packages) > 50
    for package in packages:
        assert package["source"] == {"registry": "https://pypi.org/simple"}, package["name"]
        files = [*package.get("wheels", []), *filter(None, [package.get("sdist")])]
        assert files, package["name"]
        for file in files:
            assert re.fullmatch(r"sha256:[0-9a-f]{64}", file["hash"]), package["name"]
            assert file["url"].startswith("https://files.pythonhosted.org/"), package["name"]


def test_what_the_project_asks_for_is_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    asked = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    names = {re.split(r"[<>=!~\[; ]", word)[0].lower().replace("_", "-") for word in asked}
    assert names <= {package["name"] for package in lock()}


def test_ci_installs_what_is_locked_and_audits_it() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "uv sync --locked" in script
    assert ".ci/audit" in script


class _Advisories(BaseHTTPRequestHandler):
    """Answer what `uv audit` asks of OSV: jinja2 has the vulnerabilities in `known`."""

    known: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        listed = [{"id": name, "modified": "2024-01-01T00:00:00Z"} for name in self.known]
        names = [query["package"]["name"] for query in body["queries"]]
        self._answer({"results": [{"vulns": listed} if name == "jinja2" else {} for name in names]})

    def do_GET(self) -> None:
        package = {"name": "jinja2", "ecosystem": "PyPI"}
        ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}]}]
        self._answer(
            {
                "id": self.path.rpartition("/")[2],
                "modified": "2024-01-01T00:00:00Z",
                "summary": "told of",
                "affected": [{"package": package, "ranges": ranges}],
            }
        )

    def _answer(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def advisories(known: list[str]) -> Iterator[str]:
    kind = type("Advisories", (_Advisories,), {"known": known})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def audit(service: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {"AUDIT_SERVICE": service, "UV_HTTP_RETRIES": "0", "NO_PROXY": "127.0.0.1", **environment}
    return subprocess.run(
        [str(ROOT / ".ci" / "audit")],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


needs_audit = pytest.mark.skipif(
    shutil.which("uv") is None
    or subprocess.run(["uv", "audit", "--help"], capture_output=True).returncode != 0,
    reason="no uv with audit",
)


@needs_audit
def test_the_audit_finds_what_is_known() -> None:
    with advisories([]) as service:
        done = audit(service)
        assert done.returncode == 0, done.stderr
        assert "SKIPPED" not in done.stderr
    with advisories(["PYSEC-0000-1"]) as service:
        done = audit(service)
        assert done.returncode == 1
        assert "PYSEC-0000-1" in done.stdout
        assert "jinja2" in done.stdout


@needs_audit
def test_the_audit_says_where_it_could_not_ask() -> None:
    with advisories([]) as service:
        pass  # its port was free a moment ago, and nobody listens there now
    done = audit(service)
    assert done.returncode == 0
    assert "audit: SKIPPED, nothing is known of the locked packages" in done.stderr
    assert audit(service, AUDIT="required").returncode == 1


def test_no_module_takes_the_name_of_a_package() -> None:
    """The scripts' directories come first on the path: a library that imports such a name would get our module."""
    taken = {package["name"].replace("-", "_") for package in lock()}
    taken |= set(packages_distributions()) | {"kernels"}  # transformers asks for it, installed or not
    ours = {
        path.stem for where in ("benchmarks", "inference/quantize") for path in (ROOT / where).glob("*.py")
    }
    assert len(ours) > 5
    assert not ours & taken
