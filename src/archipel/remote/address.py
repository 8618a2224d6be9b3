"""Where a remote expert may be: https, or http to this machine; never an address that only this machine's own network serves.

A name is looked up once per connection's life, every address that it has is judged, and the connection goes to one that was: a
name that is changed meanwhile changes nothing.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from archipel.errors import ArchipelError, ConfigError

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)*/?")
# Where clouds answer their own machines with credentials; most lie in 169.254.0.0/16, these do not.
_METADATA = frozenset(
    ipaddress.ip_address(text)
    for text in ("100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254", "fd00:ec2::23", "fd20:ce::254")
)
_NAT64 = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))
_COMPATIBLE = ipaddress.ip_network("::/96")


@dataclass(frozen=True)
class Origin:
    """A URL's parts, checked. ``path``: what stands before our own paths, without a slash at its end."""

    scheme: str
    host: str
    port: int
    path: str = ""

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        usual = self.port == (443 if self.scheme == "https" else 80)
        return f"{self.scheme}://{host}{'' if usual else f':{self.port}'}"

    @property
    def here(self) -> bool:
        """Whether this machine is named in so many words."""
        return self.host == "localhost" or _is_loopback(self.host)


def parse(url: str, where: str) -> Origin:
    """The origin of ``url``, which ``where`` (a key of site.toml) gives. Raises ConfigError; credentials are not repeated."""
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise ConfigError(f"{where} holds characters that no URL has (a name in other letters is written as xn--...)")
    try:
        parts = urlsplit(url)
        port, host = parts.port, (parts.hostname or "").removesuffix(".")
    except ValueError as error:
        raise ConfigError(f"{where} is no URL ({error})") from None
    if "@" in parts.netloc or parts.query or parts.fragment or "?" in url or "#" in url:
        raise ConfigError(f"{where} carries credentials or options: give https://host, and the token by token_env")
    if parts.scheme not in ("http", "https"):
        raise ConfigError(f"{where} = {url!r}: an expert is asked over https, or http on this machine")
    if not (_HOST.fullmatch(host) or _is_address(host)) or not _PATH.fullmatch(parts.path) or ".." in parts.path:
        raise ConfigError(f"{where} = {url!r} names no host that can be asked: https://island.example")
    origin = Origin(parts.scheme, host, port or (443 if parts.scheme == "https" else 80), parts.path.rstrip("/"))
    if origin.scheme == "http" and not origin.here:
        raise ConfigError(
            f"{where} = {url!r}: http is for this machine only (127.0.0.1, localhost): latents and the token would travel in "
            "the clear; put https before the expert"
        )
    return origin


def resolve(origin: Origin, *, private: bool, seconds: float) -> list[tuple[socket.AddressFamily, Any]]:
    """(family, socket address) of each address that may be connected to, looked up now.

    All addresses of the name must be allowed: one that is not refuses the name. Raises ArchipelError saying which and why,
    OSError where the name is not known or not answered for in ``seconds``.
    """
    found = []
    for family, _, _, _, place in _look_up(origin, seconds):
        if family in (socket.AF_INET, socket.AF_INET6):
            refused = _refused(str(place[0]), origin, private)
            if refused:
                raise ArchipelError(f"{origin}: {refused}")
            found.append((family, place))
    if not found:
        raise OSError(f"{origin.host} has no address")
    return found


def _look_up(origin: Origin, seconds: float) -> list[Any]:
    """getaddrinfo, which knows no limit of time by itself."""
    said: list[Any] = []

    def ask() -> None:
        try:
            said.append(socket.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            said.append(error)

    thread = threading.Thread(target=ask, daemon=True, name="look up")
    thread.start()
    thread.join(seconds)
    if not said:
        raise OSError(f"the name {origin.host} was not looked up within {seconds:g} s")
    if isinstance(said[0], Exception):
        raise OSError(f"the name {origin.host} cannot be looked up ({said[0]})")
    return list(said[0])


def _refused(text: str, origin: Origin, private: bool) -> str:
    """Why an address is not connected to, or nothing."""
    try:
        addresses = list(_meant(ipaddress.ip_address(text.partition("%")[0])))
    except ValueError:
        return f"{text} is no address"
    for one in addresses:
        if one.is_link_local or one in _METADATA:
            return f"{text} is a link-local or metadata address, which is never asked"
    own = addresses[-1]
    if own.is_unspecified or own.is_multicast or (own.is_reserved and not own.is_loopback):
        return f"{text} is not the address of a single machine"
    if own.is_loopback:
        if origin.here or (private and origin.scheme == "https"):
            return ""
        return f"the name leads to this machine ({text}): write 127.0.0.1, or set private = true"
    if origin.scheme == "http":
        return f"{text} is another machine, and http is for this one only"
    if not own.is_global and not private:
        return f"{text} is a private address: set private = true in its section of site.toml where that is meant"
    return ""


def _meant(address: _Address) -> Iterator[_Address]:
    """The address, and then those that stand inside of it (mapped, translated or tunnelled IPv4)."""
    yield address
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if any(address in network for network in _NAT64):
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if address in _COMPATIBLE and int(address) > 1:
            inner = ipaddress.IPv4Address(int(address))
        if inner is not None:
            yield inner


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return "%" not in host


def _is_loopback(host: str) -> bool:
    return _is_address(host) and ipaddress.ip_address(host).is_loopback
