"""The few requests of Google's XML storage API that our client makes, answered from memory, preconditions included.

No emulator that can be installed here speaks this API: gcp-storage-emulator and fake-gcs-server know the JSON one. So
this shows that the client asks as Google's documents say, and not that Google's service answers so.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

_BUCKETS: dict[str, dict[str, tuple[bytes, float, int]]] = {}
_LOCK = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Nothing."""

    def _where(self) -> tuple[str, str, dict[str, list[str]]]:
        parts = urlsplit(self.path)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        return bucket, key, parse_qs(parts.query)

    def _say(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status: int, code: str) -> None:
        self._say(status, f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code></Error>".encode())

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        bucket, key, _ = self._where()
        with _LOCK:
            if not key:
                _BUCKETS.setdefault(bucket, {})
                return self._say(200)
            if bucket not in _BUCKETS:
                return self._error(404, "NoSuchBucket")
            generation = _BUCKETS[bucket][key][2] if key in _BUCKETS[bucket] else 0
            wanted = self.headers.get("x-goog-if-generation-match")
            if wanted is not None and int(wanted) != generation:
                return self._error(412, "PreconditionFailed")
            _BUCKETS[bucket][key] = (body, time.time(), generation + 1)
        return self._say(200, b"", {"ETag": f'"{generation + 1}"', "x-goog-generation": str(generation + 1)})

    def do_GET(self) -> None:
        bucket, key, query = self._where()
        if bucket not in _BUCKETS:
            return self._error(404, "NoSuchBucket")
        if not key:
            return self._list(bucket, query.get("prefix", [""])[0])
        found = _BUCKETS[bucket].get(key)
        if found is None:
            return self._error(404, "NoSuchKey")
        body, modified, generation = found
        headers = {"ETag": f'"{generation}"', "Last-Modified": formatdate(modified, usegmt=True)}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            begin, end = int(asked[1]), min(int(asked[2]) + 1, len(body))
            if begin >= len(body):
                return self._error(416, "InvalidRange")
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(body)}"
            return self._say(206, body[begin:end], headers)
        return self._say(200, body, headers)

    do_HEAD = do_GET  # noqa: N815

    def do_DELETE(self) -> None:
        bucket, key, _ = self._where()
        with _LOCK:
            gone = _BUCKETS.get(bucket, {}).pop(key, None)
        return self._say(204) if gone else self._error(404, "NoSuchKey")

    def _list(self, bucket: str, prefix: str) -> None:
        rows = []
        for key, (body, modified, generation) in sorted(_BUCKETS[bucket].items()):
            if key.startswith(prefix):
                stamp = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(modified))
                rows.append(
                    f"<Contents><Key>{escape(key)}</Key><LastModified>{stamp}</LastModified>"
                    f'<ETag>"{generation}"</ETag><Size>{len(body)}</Size></Contents>'
                )
        self._say(200, f"<ListBucketResult><Name>{bucket}</Name>{''.join(rows)}</ListBucketResult>".encode())


if __name__ == "__main__":
    ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), Handler).serve_forever()
