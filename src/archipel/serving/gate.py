"""What every request passes before any route sees it: host, origin, key, size, and the time it takes to arrive."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from archipel.serving.asked import too_large
from archipel.serving.errors import Refused
from archipel.serving.keys import LOCAL, local_host, same_origin

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from archipel.serving.service import Service

OPEN = ("/healthz", "/login")  # routes that ask for no key
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with no-referrer a browser sends its login with "Origin: null", which is refused
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'",
}


def respond(refused: Refused) -> Any:
    from starlette.responses import JSONResponse

    return JSONResponse(refused.body(), refused.status, refused.headers)


class Gate:
    """ASGI middleware. Leaves the owner's name in ``scope["state"]["owner"]``."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        begin, metrics = time.monotonic(), self.service.metrics

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message.get("headers", [])}
                extra = [
                    (k.lower().encode(), v.encode()) for k, v in _HEADERS.items() if k.lower().encode() not in present
                ]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
                route = getattr(scope.get("route"), "path", "other")
                method = scope["method"] if scope["method"] in ("GET", "POST", "DELETE", "HEAD") else "other"
                metrics.requests.labels(route, method, str(message["status"])).inc()
                metrics.latency.labels(route).observe(time.monotonic() - begin)
            await send(message)

        refused = self._refuse(scope)
        if refused is not None:
            await refused(scope, receive, answer)
            return
        await self.app(scope, receive, answer)

    def _refuse(self, scope: Scope) -> Any:
        """The answer to a request that goes no further, else None."""
        from starlette.datastructures import Headers
        from starlette.responses import RedirectResponse

        headers, keys = Headers(scope=scope), self.service.keys
        host, origin = headers.get("host", ""), headers.get("origin")
        if keys.open and not local_host(host):
            return respond(Refused(403, "ask this server as 127.0.0.1 or localhost", code="wrong_host"))
        if origin is not None and not same_origin(origin, host):
            return respond(Refused(403, "pages of other origins cannot use this server", code="wrong_origin"))
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.service.limits.body:
            refused = too_large(self.service.limits)
            refused.headers["Connection"] = "close"  # what is still on its way is not read
            return respond(refused)
        state = scope.setdefault("state", {})
        if keys.open:
            state["owner"] = LOCAL
            return None
        owner = keys.bearer(headers.get("authorization"))
        if owner is None and "authorization" not in headers:
            owner = keys.session(headers.get("cookie"))
            if owner and origin is None and scope["method"] not in ("GET", "HEAD"):
                return respond(Refused(403, "a browser's request must say its origin", code="wrong_origin"))
        if owner is None and scope["path"] not in OPEN:
            if "text/html" in headers.get("accept", "") and scope["method"] == "GET":
                return RedirectResponse("/login", 303)
            challenge = {"WWW-Authenticate": "Bearer"}
            return respond(Refused(401, "the API key is missing or wrong", code="invalid_api_key", headers=challenge))
        state["owner"] = owner
        return None


class Bodies:
    """Reads request bodies: bounded in bytes and time, large ones a few at a time."""

    def __init__(self, service: Service) -> None:
        self._limits = service.limits
        self._turns = asyncio.Semaphore(service.limits.uploads)

    async def read(self, request: Request) -> bytes:
        """Raises Refused: 413 for too much, 408 for too slow, 400 where the client went away."""
        from starlette.requests import ClientDisconnect

        taken = False
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                data = bytearray()
                async for chunk in _chunks(request):
                    data += chunk
                    if len(data) > self._limits.body:
                        raise too_large(self._limits)
                    if len(data) > self._limits.small_body and not taken:
                        await self._turns.acquire()
                        taken = True
                return bytes(data)
        except TimeoutError:
            close = {"Connection": "close"}
            raise Refused(408, "the request took too long to arrive", code="timeout", headers=close) from None
        except ClientDisconnect:
            raise Refused(400, "the request ended early", code="incomplete") from None
        finally:
            if taken:
                self._turns.release()


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    async for chunk in request.stream():
        yield chunk
