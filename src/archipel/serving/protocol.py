"""uvicorn's HTTP/1.1 with bounds on how long a client may take, and with its own few answers in the form of all others."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from typing import TYPE_CHECKING, Any

from archipel.serving.errors import Refused
from archipel.serving.gate import respond
from archipel.serving.limits import Limits

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

LEAST = 16 << 10  # bytes that a client takes in ``stall_seconds``, or all there is


async def _busy(scope: Scope, receive: Receive, send: Send) -> None:
    later = {"Retry-After": "5", "Connection": "close"}
    await respond(Refused(503, "too many connections: try again soon", code="busy", headers=later))(
        scope, receive, send
    )


def _on_its_way(transport: Any) -> int:
    """Bytes that the kernel holds and the client's has not taken; 0 where it does not say. They are megabytes at times, and the
    kernel asks for more only once a third of its room is free: what waits here alone says little."""
    try:
        import fcntl
        import termios

        said = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, b"\0" * 4)
        return int(struct.unpack("i", said)[0])
    except (ImportError, AttributeError, OSError):
        return 0


def _reset(transport: Any) -> None:
    """End a connection at once, with what waits in the kernel: closing would wait for the client, which could also take what
    came for the whole."""
    with contextlib.suppress(AttributeError, OSError):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def settings(app: Any, limits: Limits, *, grace: int, **more: Any) -> Any:
    """uvicorn's ``Config`` for all that Archipel listens with: nothing logged per request, no word about who serves, heads of
    at most 32 KiB. ``grace``: seconds that running answers have when the process shall stop; ``more`` goes to uvicorn."""
    import uvicorn

    return uvicorn.Config(
        app,
        http=protocol(limits),
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=grace,
        h11_max_incomplete_event_size=32 << 10,
        **more,
    )


def protocol(limits: Limits) -> Any:
    """A class for uvicorn's ``http``.

    Closed are connections whose request's head takes longer than ``head_seconds`` (a new one's, and one after an answer, where
    uvicorn's own patience ends with the first byte), and those whose client takes less than ``LEAST`` of what is sent to it
    in ``stall_seconds``. A client that ends its side after a whole request still gets its answer.
    """
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Bounded(H11Protocol):
        _patience: Any = None
        _watch: Any = None
        _before = 0  # bytes that waited for the client when it was last looked at
        _took = False  # whether it has taken a whole buffer since

        @property
        def app(self) -> Any:
            """What a request goes to; uvicorn looks it up for each. Its own bound on connections answers with plain text."""
            over = len(self.connections) > limits.connections or len(self.tasks) >= limits.connections
            return _busy if over else self._app

        @app.setter
        def app(self, value: Any) -> None:
            self._app = value

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._patience = self.loop.call_later(limits.head_seconds, self._give_up)
            self._watch = self.loop.call_later(limits.stall_seconds, self._look)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            between = self.cycle is None or self.cycle.response_complete
            if between and self._patience is None:
                self._patience = self.loop.call_later(limits.head_seconds, self._give_up)
            elif not between:
                self._forget()

        def eof_received(self) -> bool:  # type: ignore[override]
            """Whether to stay open: only for the answer to a request that is there as a whole."""
            if self.cycle is None or self.cycle.response_complete or self.cycle.more_body:
                return False
            self.cycle.keep_alive = False
            return True

        def resume_writing(self) -> None:
            self._took = True
            super().resume_writing()

        def send_400_response(self, msg: str) -> None:
            body = json.dumps(Refused(400, "this is no valid HTTP request", code="invalid_http").body()).encode()
            kind, length = (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())
            try:
                answer = h11.Response(status_code=400, headers=[kind, length, (b"connection", b"close")])
                for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
                    self.transport.write(self.conn.send(event) or b"")
            except h11.LocalProtocolError:  # in the middle of an answer
                pass
            self.transport.close()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            if self._watch is not None:
                self._watch.cancel()
            super().connection_lost(exc)

        def _look(self) -> None:
            left = self.transport.get_write_buffer_size() + _on_its_way(self.transport)
            if left and self._before and not self._took and left > self._before - LEAST:
                _reset(self.transport)
                return
            self._before, self._took = left, False
            self._watch = self.loop.call_later(limits.stall_seconds, self._look)

        def _give_up(self) -> None:
            self._patience = None
            if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
                self.transport.close()

        def _forget(self) -> None:
            if self._patience is not None:
                self._patience.cancel()
                self._patience = None

    return Bounded
