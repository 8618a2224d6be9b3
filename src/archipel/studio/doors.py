"""What stands between the server's gate and gradio: the few routes that the page needs, bounded bodies, sessions that belong to
one key, a strict Content-Security-Policy, and a first page that names no other host."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from archipel.serving.errors import Refused
from archipel.serving.gate import Bodies, respond
from archipel.studio.remembered import filled

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from archipel.serving.service import Service

# No 'unsafe-eval': components that evaluate strings (gr.HTML with a template) do not work here, see ``widgets.markup``.
CSP = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "media-src 'self' blob:; font-src 'self'; connect-src 'self'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
_API = "/gradio_api"
_LOOKS = re.compile(
    rf"/|/assets/[\w.@-]+|/static/[\w./-]+|/theme\.css|/config|{_API}/(startup-events|info|queue/data|upload_progress|app_id"
    rf"|heartbeat/\w+)"
)
_ACTS = re.compile(rf"{_API}/(queue/join|cancel|reset|upload)")
_STILL = re.compile(r"/assets/|/static/")  # the same for everybody, with a hash in its name or no secret in it
_SESSIONS = 10_000
_STREAMS = 512  # of events and heartbeats at once
_LOOK, _LAST_WORDS = 0.5, 1.0  # seconds between looks whether the server stops, and to say so
_CLOSES = b'"close_stream"'  # gradio's last words on a stream of events
_SETTLED = 0.5  # seconds in which a page has surely seen them
_SMALL = 256 << 10  # bytes of what a page sends, but for pictures
_UPLOADS = 256 << 20  # bytes of pictures that may lie in the temporary folder
_ELSEWHERE = re.compile(
    r'<meta\s+(?:property|name)="(?:og|twitter):[^>]*>|<link\s+rel="(?:manifest|preconnect)"[^>]*>', re.DOTALL
)


class Doors:
    """ASGI application around gradio's. ``head``: put into the page's head; ``temporary``: where gradio keeps uploads;
    ``stopping``: whether the server has been asked to end; ``remembered``: an owner's first values, by component."""

    def __init__(
        self,
        app: ASGIApp,
        service: Service,
        temporary: Path,
        head: str,
        stopping: Callable[[], bool] = lambda: False,
        remembered: Callable[[str], Mapping[int, Any]] = lambda owner: {},
    ) -> None:
        self.remembered = remembered
        self.app, self.temporary, self.head, self.stopping = app, temporary, head, stopping
        self.takes_image = service.offer.takes_image  # else uploads are of no use
        self._bodies = Bodies(service)
        self._owners: OrderedDict[str, str] = OrderedDict()
        self._streams = asyncio.Semaphore(_STREAMS)
        self._closed: OrderedDict[str, float] = OrderedDict()  # sessions, and when their stream was told to close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # its lifespan is run by the application that it is mounted in
            return
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        try:
            await self._pass(path, scope, receive, send)
        except Refused as refused:
            await respond(refused)(scope, receive, send)

    async def _pass(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        method = scope["method"]
        if not (_LOOKS if method in ("GET", "HEAD") else _ACTS).fullmatch(path) or method not in (
            "GET",
            "HEAD",
            "POST",
        ):
            raise Refused(404, "there is no such page", code="not_found")
        owner = scope["state"]["owner"]
        answer = _headed(send, still=bool(_STILL.match(path)))
        if method == "POST":
            body = await self._body(path, scope, receive)
            session = None if path.endswith("/upload") else self._check(body, owner)
            if session is not None and path.endswith("/join"):
                answer = self._after_closing(session, answer)
            receive = _replay(body, receive)
        for session in _sessions(path, scope):
            self._own(session, owner)
            if path.endswith("/data"):
                answer = self._noting_closing(session, answer)
        stream = path.startswith((f"{_API}/queue/data", f"{_API}/heartbeat"))
        if stream and self._streams.locked():
            raise Refused(429, "too many pages are open", code="streams", headers={"Retry-After": "5"})
        if path == "/" and method == "GET":
            await self._page(scope, receive, answer)
        elif stream:
            async with self._streams:
                await self._stream(scope, receive, answer)
        else:
            await self.app(scope, receive, answer)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Events for as long as the server is there; gradio's would hold it up when it shall stop."""
        task = asyncio.ensure_future(self.app(scope, receive, send))
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=_LOOK)
                if self.stopping() and not task.done():
                    await asyncio.wait({task}, timeout=_LAST_WORDS)
                    break
        finally:
            ended = task.done()
            task.cancel()
        if ended:
            await task
            return
        with contextlib.suppress(asyncio.CancelledError):
            await task

    def _noting_closing(self, session: str, send: Send) -> Send:
        async def answer(message: Message) -> None:
            if _CLOSES in message.get("body", b""):
                self._closed[session] = time.monotonic()
                self._closed.move_to_end(session)
                while len(self._closed) > _SESSIONS:
                    self._closed.popitem(last=False)
            await send(message)

        return answer

    def _after_closing(self, session: str, send: Send) -> Send:
        """A new event's answer, not right behind the closing of the session's stream: a page that reads it first takes that
        stream for open, opens no other, and waits for ever (seen with gradio 6.31 about once in 40 clicks on a busy machine)."""

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                await asyncio.sleep(max(0.0, self._closed.pop(session, 0.0) + _SETTLED - time.monotonic()))
            await send(message)

        return answer

    async def _body(self, path: str, scope: Scope, receive: Receive) -> bytes:
        """A request's body. Raises Refused: too much or too slow (``gate.Bodies``), or a picture where there is no room."""
        from starlette.requests import Request

        if path.endswith("/upload"):
            if not self.takes_image:
                raise Refused(404, "this run takes no picture", code="not_found")
            held = await asyncio.to_thread(_size, self.temporary)
            if held > _UPLOADS:
                raise Refused(429, "too many pictures were uploaded just now", headers={"Retry-After": "60"})
        body = await self._bodies.read(Request(scope, receive))
        if len(body) > _SMALL and not path.endswith("/upload"):
            raise Refused(413, f"the request is larger than {_SMALL} bytes", code="too_large")
        return body

    def _check(self, body: bytes, owner: str) -> str | None:
        """Hold a session to its owner, and files to those that were uploaded: gradio would fetch a URL given as one.
        Returns the session, where one is named."""
        try:
            value = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise Refused(400, "the body is not JSON", code="invalid_json") from error
        if not isinstance(value, dict):
            raise Refused(400, "the body must be a JSON object", code="invalid_json")
        session = value.get("session_hash")
        if session is not None:
            if not isinstance(session, str) or len(session) > 64:
                raise Refused(400, "that is no session", code="invalid_value")
            self._own(session, owner)
        inside = self.temporary.resolve()
        for path in _paths(value):
            if not isinstance(path, str) or "\0" in path or not Path(path).resolve().is_relative_to(inside):
                raise Refused(400, "only an uploaded file can be given", code="invalid_value")
        return session

    def _own(self, session: str, owner: str) -> None:
        """Whoever names a session first has it. Raises Refused for another's."""
        if self._owners.setdefault(session, owner) != owner:
            raise Refused(404, "there is no such session", code="not_found")
        self._owners.move_to_end(session)
        while len(self._owners) > _SESSIONS:
            self._owners.popitem(last=False)

    async def _page(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The first page: without links to other hosts, with our head, and with what its owner asked for last."""
        plain = {**scope, "headers": [(k, v) for k, v in scope["headers"] if k.lower() != b"accept-encoding"]}
        held: list[Message] = []

        async def hold(message: Message) -> None:
            held.append(message)

        await self.app(plain, receive, hold)
        start = next(message for message in held if message["type"] == "http.response.start")
        body = b"".join(
            message.get("body", b"") for message in held if message["type"] == "http.response.body"
        ).decode()
        body = _ELSEWHERE.sub("", body).replace("</head>", f"{self.head}</head>", 1)
        body = body.replace('"https://gradio.app/"', '""')
        values = await asyncio.to_thread(self.remembered, scope["state"]["owner"])
        data = filled(body, values).encode()
        headers = [(k, v) for k, v in start["headers"] if k.lower() != b"content-length"]
        await send({**start, "headers": [*headers, (b"content-length", str(len(data)).encode())]})
        await send({"type": "http.response.body", "body": data})


def _headed(send: Send, *, still: bool) -> Send:
    """Answers with the studio's policy; what is ``still`` may be kept by the browser."""

    async def answer(message: Message) -> None:
        if message["type"] == "http.response.start":
            mine = {b"content-security-policy": CSP.encode(), b"referrer-policy": b"same-origin"}
            mine[b"cache-control"] = b"private, max-age=604800" if still else b"no-store"
            kept = [(k, v) for k, v in message.get("headers", []) if k.lower() not in mine]
            message = {**message, "headers": [*kept, *mine.items()]}
        await send(message)

    return answer


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _sessions(path: str, scope: Scope) -> Iterator[str]:
    """Sessions that a request without a body names."""
    if path.startswith(f"{_API}/heartbeat/"):
        yield path.rpartition("/")[2][:64]
    elif path == f"{_API}/queue/data":
        yield from (name[:64] for name in parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", []))


def _paths(value: Any) -> Iterator[Any]:
    """Whatever stands where gradio looks for a file: ``path`` and ``url`` of its FileData, however deep."""
    if isinstance(value, dict):
        if "path" in value:
            yield value["path"]
            url = value.get("url")
            if isinstance(url, str) and "/file=" not in url:
                yield url
        for inner in value.values():
            yield from _paths(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _paths(inner)


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:
            continue  # removed while we looked
    return total
