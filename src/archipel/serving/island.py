"""``archipel serve RUN --expert 2``: one expert's velocity over HTTP, for ensembles that may not have its weights.

    GET  /healthz       no token
    GET  /v1/expert     run, expert, signed card, shapes, limits
    POST /v1/velocity   a v(c) + b v(null) at given states
    POST /v1/latents    whole clips of this expert alone, from their seeds

Bodies are those of ``archipel.remote.wire``. A token and every bound are held before a body is read, and its shapes before it is
computed with. Prompts are never seen, and nothing of a request is logged or kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archipel import store
from archipel.ensemble.settings import MAX_GUIDANCE, Settings
from archipel.errors import ArchipelError, DamagedError
from archipel.remote import wire
from archipel.remote.wire import MalformedError, Shapes
from archipel.serving.errors import Refused
from archipel.serving.gate import respond
from archipel.serving.keys import Keys, is_loopback, local_host
from archipel.serving.limits import Limits

if TYPE_CHECKING:
    import numpy as np
    from starlette.requests import Request
    from starlette.types import ASGIApp, Receive, Scope, Send

    from archipel.contracts import Conditioning, Velocity

VARIABLE = "ARCHIPEL_EXPERT_TOKEN"
_HOW = ("steps", "solver", "dtype", "shift", "guidance")


@dataclass(frozen=True)
class Bounds:
    """Of one island's server. rows: clips in a request; steps: of a whole clip; waiting: requests at work or waiting."""

    rows: int = 16
    steps: int = 200
    waiting: int = 8
    body_seconds: float = 30.0


@dataclass(frozen=True)
class Island:
    """One expert, and what is told about it. ``network`` is held from the start to the end of the process."""

    run: str
    name: str
    card: bytes
    version: str
    shapes: Shapes
    network: Velocity
    settings: Callable[..., Settings]
    device: str = "cpu"
    signature: str = ""
    signer: str = ""

    def describe(self, bounds: Bounds) -> dict[str, Any]:
        return {
            "format": 1,
            "kind": wire.KIND,
            "run": self.run,
            "expert": self.name,
            "version": self.version,
            "card": self.card.decode(),
            "signature": self.signature,
            "signer": self.signer,
            "latent": list(self.shapes.latent),
            "text": list(self.shapes.text),
            "image": self.shapes.image,
            "limits": {**asdict(bounds), "bytes": self.shapes.body_bytes(bounds.rows)},
        }


def opened(where: str | Path, name: str, *, device: str, key: Path | None = None, run_id: str | None = None) -> Island:
    """Expert ``name`` of a run's folder (or bucket), loaded; its card signed by ``key`` (see ``archipel keygen``).

    Raises ArchipelError where there is no such expert, MissingStageError where it is not trained, DamagedError.
    """
    from archipel.ensemble.parts import Parts, open_source
    from archipel.remote import signing

    parts = Parts(open_source(where, run_id), device)
    if name not in parts.run.expert_names:
        raise ArchipelError(f"--expert {name}: this run has experts 0 to {len(parts.run.expert_names) - 1}")
    parts.check([name])
    folder = parts.source.folder(name, parts.available()[name])
    card = (folder / "card.json").read_bytes()
    facts = (store.read_card(folder) or {}).get("network")
    network = parts.denoiser(name)
    if (folder / "card.json").read_bytes() != card:
        raise DamagedError(f"{folder} is being replaced by another process: try again when it has finished")
    config = parts.config
    return Island(
        run=parts.run_id,
        name=name,
        card=card,
        version=store.sha256_bytes(card),
        shapes=Shapes.of(facts if isinstance(facts, Mapping) else {}),
        network=network,
        settings=lambda **given: Settings.of(config, **given),
        device=device,
        **({} if key is None else signing.sign(key, parts.run_id, name, card)),
    )


def read_tokens(environment: Mapping[str, str]) -> list[str]:
    """Tokens of ``ARCHIPEL_EXPERT_TOKEN``, separated by commas. Raises ArchipelError where one cannot be used."""
    given = environment.get(VARIABLE, "")
    tokens = [token.strip() for token in given.split(",")] if given else []
    if any(len(token) < 8 or not token.isascii() or not token.isprintable() or " " in token for token in tokens):
        raise ArchipelError(f"{VARIABLE} holds a token that is shorter than 8 characters or has unusual ones")
    return tokens


def settle(host: str) -> list[str]:
    """The tokens of the environment. Raises ArchipelError where strangers could use the expert."""
    tokens = read_tokens(os.environ)
    if not is_loopback(host) and not tokens:
        raise ArchipelError(
            f"--host {host} can be reached from other machines, and no token is set: put one into {VARIABLE}, or leave "
            "--host out (127.0.0.1)"
        )
    return tokens


# --- the application -------------------------------------------------------------------------------------------------


class App:
    """The ASGI application: a token before everything, a body within bounds, arithmetic in threads, one forward at a time."""

    def __init__(self, island: Island, tokens: list[str], bounds: Bounds) -> None:
        self.island, self.bounds = island, bounds
        self._keys = Keys(tokens, os.urandom(32))
        self._most = island.shapes.body_bytes(bounds.rows)
        self._turn = threading.Lock()  # one forward at a time, also between the steps of whole clips
        self._busy = 0
        self._routes = {
            ("GET", wire.DESCRIBE): self._describe,
            ("POST", wire.VELOCITY): self._velocity,
            ("POST", wire.LATENTS): self._latents,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            while (await receive())["type"] != "lifespan.shutdown":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        if scope["type"] != "http":
            return
        from starlette.requests import Request

        try:
            answer = await self._answer(Request(scope, receive))
        except Refused as refused:
            answer = respond(refused)
        except MalformedError as error:
            answer = respond(Refused(400, str(error), code="malformed"))
        except ArchipelError as error:
            answer = respond(Refused(400, str(error), code="invalid_value"))
        except Exception:
            answer = respond(Refused(500, "the expert could not be asked because of a fault in its server"))
        with contextlib.suppress(OSError):
            await answer(scope, receive, send)

    async def _answer(self, request: Request) -> ASGIApp:
        from starlette.responses import JSONResponse

        if request.url.path == wire.HEALTH and request.method == "GET":
            return JSONResponse({"status": "ok"})
        self._check_who(request)
        route = self._routes.get((request.method, request.url.path))
        if route is None:
            known = {path for _, path in self._routes}
            raise Refused(405 if request.url.path in known else 404, "there is no such route", code="not_found")
        return await route(request)

    def _check_who(self, request: Request) -> None:
        close = {"Connection": "close"}
        if "origin" in request.headers:
            raise Refused(403, "pages of browsers have no business here", code="wrong_origin", headers=close)
        if self._keys.open:
            if not local_host(request.headers.get("host", "")):
                raise Refused(403, "ask this server as 127.0.0.1 or localhost", code="wrong_host", headers=close)
        elif self._keys.bearer(request.headers.get("authorization")) is None:
            close["WWW-Authenticate"] = "Bearer"
            raise Refused(401, "the token is missing or wrong", code="invalid_token", headers=close)

    async def _describe(self, request: Request) -> ASGIApp:
        from starlette.responses import JSONResponse

        return JSONResponse(self.island.describe(self.bounds), headers={wire.VERSION: self.island.version})

    async def _velocity(self, request: Request) -> ASGIApp:
        found, _ = await self._body(request)
        return await self._computed(request, lambda gone: self._mixed(found, gone))

    async def _latents(self, request: Request) -> ASGIApp:
        found, told = await self._body(request)
        return await self._computed(request, lambda gone: self._clips(found, told, gone))

    # --- before anything is parsed -------------------------------------------------------------------------------

    async def _body(self, request: Request) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        close = {"Connection": "close"}
        wanted = request.headers.get(wire.VERSION, self.island.version)
        if wanted != self.island.version:
            raise Refused(412, "this is another version of the expert: admit it again", code="version", headers=close)
        if request.headers.get("content-type") != wire.MEDIA:
            raise Refused(415, f"send {wire.MEDIA}", code="wrong_type", headers=close)
        length = request.headers.get("content-length", "0")
        large = Refused(413, f"at most {self._most} bytes are read", code="too_large", headers=close)
        if not length.isdigit() or int(length) > self._most:
            raise large
        if self._busy >= self.bounds.waiting:
            raise Refused(503, "busy: ask again soon", code="busy", headers={**close, "Retry-After": "1"})
        data = bytearray()
        self._busy += 1
        try:
            async with asyncio.timeout(self.bounds.body_seconds):
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > self._most:
                        raise large
        except TimeoutError:
            raise Refused(408, "the request took too long to arrive", code="timeout", headers=close) from None
        except Refused:
            raise
        except Exception:  # starlette's ClientDisconnect
            raise Refused(400, "the request ended early", code="incomplete", headers=close) from None
        finally:
            self._busy -= 1
        return wire.unpack(bytes(data))

    async def _computed(self, request: Request, work: Callable[[threading.Event], bytes]) -> ASGIApp:
        """Its bytes as an answer. Work ends early where the client goes away (``gone``)."""
        from starlette.responses import Response

        gone = threading.Event()

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            gone.set()

        if self._busy >= self.bounds.waiting:
            raise Refused(503, "busy: ask again soon", code="busy", headers={"Retry-After": "1"})
        self._busy += 1
        watching = asyncio.create_task(watch())
        try:
            data = await asyncio.to_thread(work, gone)
        finally:
            self._busy -= 1
            watching.cancel()
        headers = {wire.VERSION: self.island.version, "Cache-Control": "no-store"}
        return Response(data, media_type=wire.MEDIA, headers=headers)

    # --- in a thread ---------------------------------------------------------------------------------------------

    def _mixed(self, found: dict[str, np.ndarray], gone: threading.Event) -> bytes:
        import numpy as np
        import torch

        from archipel.ensemble.guidance import combine

        shapes, rows = self.island.shapes, self._rows(found, "x")
        wire.only(found, "x", "t", "a", "b", "tokens", "mask", "pooled", *(["image"] if shapes.image else []))
        x = wire.expect(found, "x", (rows, *shapes.latent), "F32", "F16")
        t, a, b = (wire.expect(found, name, (rows,), "F32") for name in ("t", "a", "b"))
        if not bool(((t >= 0) & (t <= 1)).all()) or max(np.abs(a).max(), np.abs(b).max()) > MAX_GUIDANCE:
            raise MalformedError(f"t lies in [0, 1], a and b within {MAX_GUIDANCE:g}")
        cond = self._cond(found, rows)
        state, *rest = (self._tensor(value) for value in (x, t, a, b))
        with torch.no_grad(), self._turn:
            _stay(gone)
            v = combine(self.island.network, state, rest[0], cond, rest[1], rest[2])
        return self._packed("v", v, "F16" if x.dtype == np.float16 else "F32")

    def _clips(self, found: dict[str, np.ndarray], told: dict[str, str], gone: threading.Event) -> bytes:
        import torch

        from archipel.ensemble.guidance import Guided
        from archipel.flow import draws, samplers

        shapes, rows = self.island.shapes, self._rows(found, "seeds")
        wire.only(found, "seeds", "tokens", "mask", "pooled", *(["image"] if shapes.image else []))
        seeds = wire.expect(found, "seeds", (rows,), "I64").tolist()
        if min(seeds) < 0:
            raise MalformedError("seeds are whole numbers from 0")
        settings, cond = self._settings(told), self._cond(found, rows)
        guided = Guided(self.island.network, settings.guidance)

        def velocity(x: Any, t: Any, cond: Conditioning) -> Any:
            with self._turn:
                _stay(gone)
                return guided(x, t, cond)

        with torch.no_grad():
            noise = self._tensor(draws.clip_noise(seeds, shapes.latent))
            how: dict[str, Any] = {"steps": settings.steps, "shift": settings.shift, "solver": settings.solver}
            x = samplers.sample(velocity, noise, cond, **how)
        return self._packed("x", x, told["dtype"])

    def _rows(self, found: Mapping[str, np.ndarray], name: str) -> int:
        array = found.get(name)
        rows = len(array) if array is not None and array.ndim else 0
        if not 1 <= rows <= self.bounds.rows:
            raise MalformedError(f"tensor {name} is to have 1 to {self.bounds.rows} rows")
        return rows

    def _settings(self, told: dict[str, str]) -> Settings:
        if set(told) != set(_HOW) or told["dtype"] not in ("F32", "F16"):
            raise MalformedError(f"the metadata are to be {', '.join(_HOW)}")
        try:
            steps, shift, guidance = int(told["steps"]), float(told["shift"]), float(told["guidance"])
        except ValueError:
            raise MalformedError("steps, shift and guidance are numbers") from None
        if steps > self.bounds.steps:
            raise MalformedError(f"at most {self.bounds.steps} steps are made of a clip")
        strategy = f"expert-{self.island.name}"
        return self.island.settings(
            strategy=strategy, steps=steps, shift=shift, guidance=guidance, solver=told["solver"]
        )

    def _cond(self, found: dict[str, np.ndarray], rows: int) -> Conditioning:
        from archipel.contracts import Conditioning

        text = wire.text_of(found, rows, self.island.shapes)
        cond = Conditioning(*(self._tensor(text[name]) for name in ("tokens", "mask", "pooled")))
        if "image" not in found:
            return cond
        return cond.given(self._tensor(wire.expect(found, "image", (rows, *self.island.shapes.given), "F32", "F16")))

    def _tensor(self, array: np.ndarray) -> Any:
        import numpy as np
        import torch

        return torch.from_numpy(np.array(array, np.bool_ if array.dtype == np.bool_ else np.float32)).to(
            self.island.device
        )

    def _packed(self, name: str, tensor: Any, kind: str) -> bytes:
        array = tensor.float().cpu().numpy()
        return wire.pack({name: wire.half(array, name) if kind == "F16" else array})


def _stay(gone: threading.Event) -> None:
    if gone.is_set():
        raise Refused(400, "the client went away", code="gone")


# --- the process -----------------------------------------------------------------------------------------------------


def serve(
    island: Island, *, host: str, port: int, tokens: list[str], bounds: Bounds, tell: Callable[[str], None]
) -> None:
    """Listen until the process is stopped."""
    import uvicorn

    from archipel.serving.protocol import settings
    from archipel.serving.server import listen

    sys.setswitchinterval(0.001)
    with contextlib.closing(listen(host, port)) as sock:
        shown = f"[{host}]" if ":" in host else host
        tell(
            f"expert {island.name} of run {island.run[:12]} (card {island.version[:12]}{'' if island.signature else ', not signed'}): "
            f"listening on http://{shown}:{sock.getsockname()[1]}{'' if tokens else ' (no token: this machine only)'}"
        )
        bounds_of_wire = Limits(head_seconds=60.0, connections=256)
        config = settings(
            App(island, tokens, bounds), bounds_of_wire, grace=5, limit_concurrency=256, timeout_keep_alive=75
        )
        uvicorn.Server(config).run(sockets=[sock])
