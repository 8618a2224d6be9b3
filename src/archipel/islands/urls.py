"""Where a store is: paths and URLs read and refused, and the obstore store behind a URL.

Credentials, regions, accounts and custom endpoints come from the environment that the clouds' own tools use.
"""

from __future__ import annotations

import contextlib
import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from archipel.errors import ArchipelError

SCHEMES = ("file", "s3", "gs", "az")


def is_url(text: str) -> bool:
    """Whether this names a store by URL and not a folder."""
    return "://" in text


def check_url(url: str) -> str:
    """The URL, fit to be printed. Raises ArchipelError for an unknown scheme and for credentials inside."""
    if not is_url(url):
        return url
    parts = urlsplit(url)
    scheme = parts.scheme.lower()
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ArchipelError(
            f"the {scheme}:// URL carries credentials or options: give scheme://bucket/prefix only, and credentials by the "
            "environment (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_KEY, ...)"
        )
    if scheme not in SCHEMES:
        raise ArchipelError(f"{scheme}:// is no store: give a folder, or {', '.join(f'{s}://' for s in SCHEMES)}")
    if scheme == "file" and (parts.netloc not in ("", "localhost") or not parts.path.startswith("/")):
        raise ArchipelError(f"{url!r}: a file URL has three slashes and an absolute path: file:///data/run")
    if scheme != "file" and not parts.netloc:
        raise ArchipelError(f"{url!r} names no bucket: give {scheme}://bucket/prefix")
    return url.rstrip("/") if parts.path != "/" else url


def local_root(url: str) -> Path | None:
    """The folder behind a path or a file:// URL, else None."""
    if not is_url(url):
        return Path(os.path.abspath(Path(url).expanduser()))  # noqa: PTH100 - keeps links
    parts = urlsplit(url)
    return Path(unquote(parts.path)) if parts.scheme.lower() == "file" else None


def _first(*names: str) -> str:
    return next((os.environ[name] for name in names if os.environ.get(name)), "")


def connect(url: str, timeout: float, retries: int = 0) -> tuple[Any, str]:
    """An obstore store for a remote URL, and the endpoint whose clock is the store's ("" where it is not known)."""
    from obstore import store

    parts = urlsplit(url)
    scheme, name, prefix = parts.scheme.lower(), parts.netloc, unquote(parts.path).strip("/") or None
    wanted = {
        "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
        "gs": ("STORAGE_EMULATOR_HOST", "GOOGLE_BASE_URL"),
        "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
    }[scheme]
    endpoint = _first(*wanted)
    client: Any = {"timeout": f"{int(timeout * 1000)}ms", "connect_timeout": "5s", "user_agent": "archipel"}
    client["allow_http"] = endpoint.startswith("http://")
    # Our own retries decide by default: they know which answers are final, stop when asked, and count.
    retry: Any = {"max_retries": retries, "retry_timeout": timedelta(seconds=timeout)}
    more: Any = {}
    if scheme == "s3":
        region = _first("AWS_REGION", "AWS_DEFAULT_REGION") or "us-east-1"
        more = {"region": region} | ({"endpoint": endpoint} if endpoint else {})
        s3 = store.S3Store(name, prefix=prefix, client_options=client, retry_config=retry, **more)
        return s3, endpoint or f"https://{name}.s3.{region}.amazonaws.com"
    if scheme == "gs":
        if endpoint:  # an emulator: no account, and nobody to ask for a token
            nobody = {"gcs_base_url": endpoint, "disable_oauth": True, "private_key_id": "", "private_key": ""}
            more = {"config": {"service_account_key": json.dumps({**nobody, "client_email": ""})}}
        gs = store.GCSStore(name, prefix=prefix, client_options=client, retry_config=retry, **more)
        return gs, endpoint or "https://storage.googleapis.com"
    more = {"config": {"endpoint": endpoint}} if endpoint else {}
    az = store.AzureStore(name, prefix=prefix, client_options=client, retry_config=retry, **more)
    account = _first("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT")
    return az, endpoint or (f"https://{account}.blob.core.windows.net" if account else "")


def http_date(endpoint: str) -> float | None:
    """The Date of whatever the endpoint answers to an unsigned HEAD; an answer of 403 has one, too."""
    import http.client
    from email.utils import parsedate_to_datetime

    parts = urlsplit(endpoint)
    if not parts.hostname:
        return None
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    with contextlib.suppress(OSError, ValueError, TypeError, http.client.HTTPException):
        connection = kind(parts.hostname, parts.port, timeout=5)
        try:
            connection.request("HEAD", "/")
            return parsedate_to_datetime(connection.getresponse().headers["Date"]).timestamp()
        finally:
            connection.close()
    return None
