"""What moved between an island and the store: counted per connection, told in heartbeats and cards."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Traffic:
    """Requests by kind and payload bytes, retries included; threads may share it."""

    requests: Counter[str] = field(default_factory=Counter)
    sent: int = 0
    received: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def count(self, kind: str, requests: int = 1, *, sent: int = 0, received: int = 0) -> None:
        with self._lock:
            self.requests[kind] += requests
            self.sent += sent
            self.received += received

    def as_dict(self) -> dict[str, Any]:
        return {
            "requests": dict(sorted(self.requests.items())),
            "bytes_sent": self.sent,
            "bytes_received": self.received,
        }
