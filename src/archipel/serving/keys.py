"""Who asks: API keys compared in constant time, logins of a browser, and the names under which clips are kept."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import time
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from archipel.errors import ArchipelError

VARIABLE = "ARCHIPEL_API_KEY"
COOKIE = "archipel_session"
LOCAL = "local"  # the owner of all clips of a server without keys
_SESSIONS = 1000


def is_loopback(host: str) -> bool:
    """Whether an address to bind to is reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_keys(environment: Mapping[str, str]) -> list[str]:
    """Keys of ``ARCHIPEL_API_KEY``, separated by commas. Raises ArchipelError where one is empty or not printable ASCII."""
    given = environment.get(VARIABLE, "")
    if not given:
        return []
    keys = [key.strip() for key in given.split(",")]
    for key in keys:
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise ArchipelError(
                f"{VARIABLE} holds a key that is empty or has spaces or unusual characters: separate keys by single commas"
            )
    return keys


def check_exposure(host: str, keys: list[str]) -> None:
    """Raise ArchipelError where a server would be reachable from elsewhere and anybody could use it."""
    if not is_loopback(host) and not keys:
        raise ArchipelError(
            f"--host {host} can be reached from other machines, and no key is set: put one into {VARIABLE}, "
            "or leave --host out (127.0.0.1)"
        )


class Keys:
    """``owner`` of a request. ``salt``: of this server's database, so that owners' names say nothing about their keys."""

    def __init__(self, keys: list[str], salt: bytes, session_seconds: float = 12 * 3600.0) -> None:
        self._salt, self._session_seconds = salt, session_seconds
        self._owners = {self._digest(key): self._digest(b"owner:" + key.encode()).hex()[:32] for key in keys}
        self._sessions: dict[bytes, tuple[str, float]] = {}

    @property
    def open(self) -> bool:
        """Whether no key is asked for."""
        return not self._owners

    @property
    def several(self) -> bool:
        """Whether clips have different owners, who share one queue."""
        return len(self._owners) > 1

    def _digest(self, value: str | bytes) -> bytes:
        data = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
        return hmac.new(self._salt, data, hashlib.sha256).digest()

    def owner(self, key: str) -> str | None:
        """The owner whose key this is, else None. All keys are compared, each in constant time."""
        digest, found = self._digest(key), None
        for known, owner in self._owners.items():
            if hmac.compare_digest(digest, known):
                found = owner
        return found

    def bearer(self, authorization: str | None) -> str | None:
        scheme, _, key = (authorization or "").partition(" ")
        return self.owner(key.strip()) if scheme.lower() == "bearer" and key.strip() else None

    def login(self, key: str) -> str | None:
        """A session's token for a browser's cookie, or None for a wrong key. Sessions end with the process."""
        owner = self.owner(key)
        if owner is None:
            return None
        now = time.monotonic()
        self._sessions = {token: kept for token, kept in self._sessions.items() if kept[1] > now}
        while len(self._sessions) >= _SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        token = secrets.token_urlsafe(32)
        self._sessions[self._digest(token)] = (owner, now + self._session_seconds)
        return token

    def session(self, cookies: str | None) -> str | None:
        """The owner who is logged in with these cookies, else None."""
        try:
            morsel = SimpleCookie(cookies or "").get(COOKIE)
        except CookieError:
            return None
        owner, until = self._sessions.get(self._digest(morsel.value), ("", 0.0)) if morsel else ("", 0.0)
        return owner if owner and until > time.monotonic() else None


def same_origin(origin: str, host: str) -> bool:
    """Whether an ``Origin`` header names the host that was asked."""
    try:
        return bool(host) and urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False


def local_host(host: str) -> bool:
    """Whether a ``Host`` header is one of this machine's own names: what stops a page whose name was rebound to 127.0.0.1."""
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        return False
    return bool(name) and is_loopback(str(name))
