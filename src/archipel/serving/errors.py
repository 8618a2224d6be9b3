"""Refusals in the form that OpenAI's clients read: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refused(Exception):  # noqa: N818 - it is an answer
    """An answer other than success. ``message`` is for people and holds nothing of this machine."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def wrong(param: str, message: str, code: str = "invalid_value") -> Refused:
    """400 for one value of a request."""
    return Refused(400, message, param=param, code=code)


def no_such_video() -> Refused:
    """404, the same for an id that never was, one that was deleted, and another key's."""
    return Refused(404, "there is no such video, or it is not yours", param="video_id", code="not_found")
