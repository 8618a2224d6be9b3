from __future__ import annotations

import base64
import hashlib
import http.server
import io
import json
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from archipel import store
from archipel.data import fetch as fetching
from archipel.data.fetch import Package, cache_folder, downloads, fetch
from archipel.errors import ArchipelError, LockedError, Stopped
from archipel.progress import StopFlag

CONTENT = b"a tarball, as far as this test is concerned" * 1000
PACKAGE = Package(
    "@some/package", "1.2.3", base64.b64encode(hashlib.sha512(CONTENT).digest()).decode(), len(CONTENT)
)  # fmt: skip

# Stands in for npm: notes its arguments, says what npm might say, and leaves the file where npm pack leaves it.
_STAND_IN = """
import os, pathlib, sys, time
where = pathlib.Path(sys.argv[sys.argv.index("--pack-destination") + 1])
with open(os.environ["STAND_IN"] + "/calls", "a") as log:
    print(*sys.argv[1:3], file=log)
print("npm notice flood " * 50)
print(os.environ.get("STAND_IN_SAYS", ""), file=sys.stderr)
time.sleep(float(os.environ.get("STAND_IN_SLEEP", "0")))
if os.environ.get("STAND_IN_SAYS"):
    sys.exit(1)
(where / "some-package-1.2.3.tgz").write_bytes(pathlib.Path(os.environ["STAND_IN"] + "/content").read_bytes())
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the stand-in for npm; the cache folder beside it is empty."""
    folder = tmp_path / "stand-in"
    folder.mkdir()
    (folder / "content").write_bytes(CONTENT)
    monkeypatch.setenv("ARCHIPEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("STAND_IN", str(folder))
    monkeypatch.setattr(fetching, "_NPM", _STAND_IN)
    return folder


def _left(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache" / "npm").iterdir() if path.name != ".lock")


def test_a_package_is_fetched_once_and_quietly(
    tmp_path: Path, stand_in: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = fetch(PACKAGE)
    assert path == tmp_path / "cache" / "npm" / "some-package-1.2.3.tgz"
    assert path.read_bytes() == CONTENT
    assert fetch(PACKAGE) == path
    assert (stand_in / "calls").read_text() == "pack @some/package@1.2.3\n"
    said = "".join(capfd.readouterr())
    assert "npm notice" not in said and "fetch @some/package" in said
    assert _left(tmp_path) == ["some-package-1.2.3.tgz"]
    assert downloads() == [(path, len(CONTENT))]


def test_a_damaged_file_is_fetched_again(tmp_path: Path, stand_in: Path) -> None:
    path = tmp_path / "cache" / "npm" / PACKAGE.filename
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT[:-1])
    assert fetch(PACKAGE).read_bytes() == CONTENT


def test_other_bytes_than_the_pinned_ones_are_never_used(tmp_path: Path, stand_in: Path) -> None:
    (stand_in / "content").write_bytes(CONTENT + b"!")
    with pytest.raises(ArchipelError, match=r"expected sha512-.*nothing of it is used"):
        fetch(PACKAGE)
    assert _left(tmp_path) == []


@pytest.mark.parametrize("code", ["ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ETIMEDOUT", "ECONNRESET"])
def test_without_a_network_the_error_says_so_and_names_the_way_out(
    code: str, tmp_path: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_SAYS", f"npm error code {code}\nnpm error network request failed")
    with pytest.raises(ArchipelError, match=rf"no network: @some/package@1\.2\.3 .*{code}.*`--source shapes`"):
        fetch(PACKAGE)
    assert _left(tmp_path) == []


def test_other_failures_quote_npm(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_SAYS", "npm error code E404\nnpm error 404 no such package")
    with pytest.raises(ArchipelError, match=r"npm could not fetch.*404 no such package"):
        fetch(PACKAGE)
    monkeypatch.setenv("STAND_IN_SAYS", "npm error code ENOSPC")
    with pytest.raises(ArchipelError, match=r"the disk of .* is full"):
        fetch(PACKAGE)


def test_too_little_disk_space_is_noticed_before(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    full = shutil.disk_usage("/")._replace(free=50_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(ArchipelError, match="0 MB free"):
        fetch(PACKAGE)
    assert not (stand_in / "calls").exists()


def test_stopping_ends_npm_and_leaves_nothing_half_done(
    tmp_path: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_SLEEP", "60")
    began = time.monotonic()
    with pytest.raises(Stopped, match="this one starts over next time"):
        fetch(PACKAGE, StopFlag(seconds=0.5))
    assert time.monotonic() - began < 20
    assert _left(tmp_path) == []
    monkeypatch.setenv("STAND_IN_SLEEP", "0")
    assert fetch(PACKAGE).read_bytes() == CONTENT


def test_two_processes_do_not_fetch_at_once_and_leftovers_of_dead_ones_go(tmp_path: Path, stand_in: Path) -> None:
    folder = tmp_path / "cache" / "npm"
    (folder / ".part-dead").mkdir(parents=True)
    (folder / ".part-dead" / "half.tgz").write_bytes(b"half")
    with store.lock(folder / ".lock", "it"), pytest.raises(LockedError, match="another process"):
        fetch(PACKAGE)
    fetch(PACKAGE)
    assert _left(tmp_path) == [PACKAGE.filename]


def test_the_cache_folder_is_the_users_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHIPEL_CACHE", "/somewhere/else")
    assert cache_folder() == Path("/somewhere/else")
    monkeypatch.delenv("ARCHIPEL_CACHE")
    assert cache_folder().name == "archipel"


@pytest.fixture
def registry() -> Iterator[tuple[str, Package]]:
    """A registry on this machine that serves one package."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        data = json.dumps({"name": "tiny-clips", "version": "1.0.0"}).encode()
        info = tarfile.TarInfo("package/package.json")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    content = packed.getvalue()
    sha512 = base64.b64encode(hashlib.sha512(content).digest()).decode()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = f"http://127.0.0.1:{self.server.server_address[1]}"
            version = {
                "name": "tiny-clips",
                "version": "1.0.0",
                "dist": {"tarball": f"{host}/tiny-clips.tgz", "integrity": f"sha512-{sha512}"},
            }
            page = {"name": "tiny-clips", "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": version}}
            body = content if self.path.endswith(".tgz") else json.dumps(page).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", Package("tiny-clips", "1.0.0", sha512, len(content))
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
def test_the_real_npm_fetches_from_a_registry(
    registry: tuple[str, Package], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    address, package = registry
    monkeypatch.setenv("ARCHIPEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("npm_config_registry", address)
    assert fetching.sha512_of(fetch(package)) == package.sha512
    assert _left(tmp_path) == ["tiny-clips-1.0.0.tgz"]
    assert "npm notice" not in "".join(capfd.readouterr())
