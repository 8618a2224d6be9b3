"""The FastAPI application: one function per route. Annotations here are looked at by FastAPI while it runs, so they are
not postponed, and its names are imported where the application is made (the extra ``serve``)."""

import asyncio
import contextlib
import json
import re
import sqlite3
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from archipel import __version__
from archipel.serving import asked as requests
from archipel.serving import pages, shapes
from archipel.serving.errors import Refused, no_such_video, wrong
from archipel.serving.gate import Bodies, Gate, respond
from archipel.serving.jobs import COMPLETED, FAILED, Job
from archipel.serving.keys import COOKIE
from archipel.serving.service import Service

if TYPE_CHECKING:
    from fastapi import APIRouter, FastAPI

_ID = re.compile(r"video_[0-9a-f]{32}")
_POLL = 0.25  # seconds between looks at a job whose progress is followed
_ALIVE = 15.0  # seconds after which a silent stream says that it lives
_STORED = Refused(
    503, "the server cannot store anything now: try again later", code="storage", headers={"Retry-After": "30"}
)
_UNHEALTHY = "the worker has stopped"


def make(service: Service) -> "FastAPI":
    """The application around an open ``service``; starts its worker with the application and stops it with it."""
    from fastapi import FastAPI

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.ending = asyncio.Event()
        service.worker.start()
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="Archipel",
        version=__version__,
        description=f"Clips from {service.offer.model}: the OpenAI video interface. All times are Unix seconds.",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,  # behind the key like everything else: a route of its own below
        lifespan=lifespan,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state.home = "/docs"  # what / leads to, and a login
    app.include_router(_videos(service))
    app.include_router(_models(service))
    app.include_router(_house(service, app))
    _add_errors(app)
    _describe(app, service)
    app.add_middleware(Gate, service=service)
    return app


def _videos(service: Service) -> "APIRouter":
    from anyio import CapacityLimiter, to_thread
    from fastapi import APIRouter, Query, Request, Response
    from fastapi.responses import FileResponse, StreamingResponse
    from starlette.concurrency import run_in_threadpool

    router = APIRouter(prefix="/v1/videos", tags=["videos"])
    bodies = Bodies(service)
    streams = asyncio.Semaphore(service.limits.streams)
    writers = CapacityLimiter(4)  # threads that wait for the disk: the others are for those who only look

    def find(request: Request, name: str) -> Job:
        # In the loop itself: a tenth of a millisecond, where a thread would have to wait for its turn beside the models.
        job = service.jobs.find(name, request.state.owner) if _ID.fullmatch(name) else None
        if job is None:
            raise no_such_video()
        return job

    @router.post(
        "",
        response_model=shapes.Video,
        responses=shapes.answers(400, 401, 403, 408, 413, 415, 429, 503),
        openapi_extra={"requestBody": shapes.create_body(service.offer, service.limits)},
    )
    async def create_video(request: Request) -> Any:
        """Ask for a clip. It is made in turn; follow it by its id. An Idempotency-Key makes asking again safe."""
        fields, image = await _fields(request, await bodies.read(request))
        name = request.headers.get("idempotency-key")
        if name is not None and not 0 < len(name) <= 255:
            raise wrong("Idempotency-Key", "an Idempotency-Key has 1 to 255 characters")
        asked = await run_in_threadpool(requests.read, fields, image, service.offer, service.limits)
        job = await to_thread.run_sync(service.create, request.state.owner, asked, name, limiter=writers)
        return service.video(job)

    @router.get("", response_model=shapes.VideoList, responses=shapes.answers(400, 401, 403, 404))
    async def list_videos(
        request: Request,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> Any:
        """Your clips and jobs, newest first."""
        begin = None if after is None else find(request, after)
        found = service.jobs.page(request.state.owner, after=begin, limit=limit + 1, newest=order == "desc")
        data = [service.video(job) for job in found[:limit]]
        first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
        return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": len(found) > limit}

    @router.get("/{video_id}", response_model=shapes.Video, responses=shapes.answers(400, 401, 403, 404))
    async def retrieve_video(request: Request, video_id: str) -> Any:
        """How far a clip is."""
        return service.video(find(request, video_id))

    @router.delete("/{video_id}", response_model=shapes.Deleted, responses=shapes.answers(400, 401, 403, 404, 503))
    def delete_video(request: Request, video_id: str) -> Any:
        """Remove a clip with its prompt and picture; a job that waits or is being made is cancelled."""
        service.delete(find(request, video_id))
        return {"id": video_id, "object": "video.deleted", "deleted": True}

    @router.get(
        "/{video_id}/content",
        response_class=FileResponse,
        responses={
            200: {
                "description": "The clip",
                "content": {"video/mp4": {"schema": {"type": "string", "format": "binary"}}},
            },
            **shapes.answers(400, 401, 403, 404),
        },
    )
    async def download_video(request: Request, video_id: str, variant: Literal["video"] = "video") -> Any:
        """The finished clip, MP4."""
        job = find(request, video_id)
        if job.status != COMPLETED:
            raise Refused(
                400, f"this clip is not there: its status is {job.status}", param="video_id", code="not_ready"
            )
        path = service.worker.path(job.id)
        if not path.is_file():
            raise no_such_video()
        return FileResponse(path, media_type="video/mp4", filename=path.name)

    @router.get(
        "/{video_id}/events",
        response_class=StreamingResponse,
        responses={
            200: {
                "description": "Server-sent events",
                "content": {"text/event-stream": {"schema": {"type": "string"}}},
            },
            **shapes.answers(400, 401, 403, 404, 429),
        },
    )
    async def follow_video(request: Request, video_id: str) -> Response:
        """Progress as server-sent events: `video.progress` at each change, then `video.completed`, `video.failed` or
        `video.deleted`, and the end."""
        job, owner = find(request, video_id), request.state.owner
        if streams.locked():
            later = {"Retry-After": "5"}
            raise Refused(429, "too many streams are open: ask for the clip instead", code="streams", headers=later)

        async def events() -> AsyncIterator[str]:
            async with streams:
                last, silent, now = "", 0.0, job
                while not request.app.state.ending.is_set():
                    text = json.dumps(service.video(now), ensure_ascii=False)
                    ended = now.status in (COMPLETED, FAILED)
                    if text != last:
                        yield f"event: video.{now.status if ended else 'progress'}\ndata: {text}\n\n"
                        last, silent = text, 0.0
                    if ended:
                        return
                    await asyncio.sleep(_POLL)
                    silent += _POLL
                    if silent >= _ALIVE:
                        yield ": still here\n\n"
                        silent = 0.0
                    found = service.jobs.find(video_id, owner)
                    if found is None:
                        yield f'event: video.deleted\ndata: {{"id": "{video_id}"}}\n\n'
                        return
                    now = found

        return StreamingResponse(events(), media_type="text/event-stream")

    return router


async def _fields(request: Any, body: bytes) -> tuple[dict[str, Any], bytes | None]:
    """A body's fields and its uploaded picture. Raises Refused."""
    from starlette.concurrency import run_in_threadpool

    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in ("application/json", ""):
        return await run_in_threadpool(_json, body), None
    if kind not in ("multipart/form-data", "application/x-www-form-urlencoded"):
        raise Refused(415, "send application/json or multipart/form-data", code="unsupported_media_type")
    from starlette.formparsers import FormParser, MultiPartException, MultiPartParser

    async def stream() -> Any:
        yield body
        yield b""

    fields: dict[str, Any] = {}
    image: bytes | None = None
    try:
        if kind == "multipart/form-data":
            form = await MultiPartParser(
                request.headers, stream(), max_files=1, max_fields=20, max_part_size=1 << 24
            ).parse()
        else:
            form = await FormParser(request.headers, stream(), max_fields=20, max_part_size=1 << 24).parse()
    except MultiPartException as error:
        raise Refused(400, f"the form cannot be read: {error.message}", code="invalid_form") from error
    except (ValueError, KeyError, LookupError, RecursionError) as error:
        raise Refused(400, "the form cannot be read", code="invalid_form") from error
    try:
        for name, value in form.multi_items():
            if not isinstance(value, str):
                if name != "input_reference":
                    raise wrong(name[:40], "a file can only be sent as input_reference", "unknown_parameter")
                image = await value.read()
                continue
            outer, _, inner = name.partition("[")
            if outer == "input_reference" and inner.endswith("]"):  # as OpenAI's client writes nested values
                held = fields.setdefault(outer, {})
                if not isinstance(held, dict):
                    raise wrong(outer, "input_reference was given twice")
                held[inner[:-1]] = value
            elif name in fields:
                raise wrong(name[:40], "the same field was given twice")
            else:
                fields[name] = value
    finally:
        await form.close()
    return fields, image


def _json(body: bytes) -> dict[str, Any]:
    def constant(name: str) -> Any:
        raise ValueError(name)

    try:
        value = json.loads(body, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "the body is not JSON", code="invalid_json") from error
    if not isinstance(value, dict):
        raise Refused(
            400, 'the body must be a JSON object such as {"prompt": "a red ball bounces"}', code="invalid_json"
        )
    return value


def _models(service: Service) -> "APIRouter":
    from fastapi import APIRouter

    router = APIRouter(prefix="/v1/models", tags=["models"])
    offer = service.offer
    model = {
        "id": offer.model,
        "object": "model",
        "created": 0,
        "owned_by": "archipel",
        "seconds": [offer.seconds],
        "sizes": list(offer.sizes),
        "takes_image": offer.takes_image,
    }

    @router.get("", response_model=shapes.ModelList, responses=shapes.answers(401, 403))
    def list_models() -> Any:
        """The run's model: there is one."""
        return {"object": "list", "data": [model]}

    @router.get("/{model_id}", response_model=shapes.Model, responses=shapes.answers(400, 401, 403, 404))
    def retrieve_model(model_id: str) -> Any:
        """What clips a model makes."""
        if model_id != offer.model:
            raise Refused(404, f"there is no such model; there is {offer.model}", param="model_id", code="not_found")
        return model

    return router


def _house(service: Service, app: "FastAPI") -> "APIRouter":
    from fastapi import APIRouter, Request, Response
    from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse

    router = APIRouter()
    bodies = Bodies(service)

    @router.get("/healthz", responses={503: {"description": _UNHEALTHY}})
    def health() -> JSONResponse:
        """Whether the server works; the only thing that is told without a key."""
        alive = service.worker.alive
        return JSONResponse({"status": "ok" if alive else _UNHEALTHY}, 200 if alive else 503)

    @router.get("/metrics", response_class=Response, responses=shapes.answers(401, 403))
    def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/openapi.json", include_in_schema=False)
    def description() -> JSONResponse:
        return JSONResponse(app.openapi())

    @router.get("/", include_in_schema=False)
    def root() -> Response:
        return RedirectResponse(app.state.home, 303)

    @router.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        return HTMLResponse(pages.docs(app.openapi()))

    @router.get("/login", include_in_schema=False)
    def login_page() -> HTMLResponse:
        return HTMLResponse(pages.login())

    @router.post("/login", include_in_schema=False)
    async def login(request: Request) -> Response:
        fields, _ = await _fields(request, await bodies.read(request))
        key = fields.get("key")
        token = service.keys.login(key) if isinstance(key, str) else None
        if token is None:
            return HTMLResponse(pages.login(wrong=True), 401)
        answer = RedirectResponse(app.state.home, 303)
        secure = request.url.scheme == "https"
        answer.set_cookie(COOKIE, token, httponly=True, samesite="strict", secure=secure, path="/")
        return answer

    return router


def _add_errors(app: "FastAPI") -> None:
    from fastapi import Request
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException

    async def refused(request: Request, error: Exception) -> Any:
        assert isinstance(error, Refused)
        return respond(error)

    async def invalid(request: Request, error: Exception) -> Any:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        name = str(first["loc"][-1])[:40]
        return respond(wrong(name, f"{name}: {first['msg']}"))

    async def plain(request: Request, error: Exception) -> Any:
        assert isinstance(error, HTTPException)
        code = "not_found" if error.status_code == 404 else None
        return respond(Refused(error.status_code, str(error.detail), code=code, headers=error.headers))

    async def storage(request: Request, error: Exception) -> Any:
        return respond(_STORED)

    async def fault(request: Request, error: Exception) -> Any:
        return respond(Refused(500, "a fault in the server", code="internal"))

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, plain)
    app.add_exception_handler(sqlite3.OperationalError, storage)  # a full or failing disk
    app.add_exception_handler(Exception, fault)


def _describe(app: "FastAPI", service: Service) -> None:
    """FastAPI's own description says 422 for what is 400 here, and knows nothing of the key."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            description = made()
            for verbs in description["paths"].values():
                for operation in verbs.values():
                    operation["responses"].pop("422", None)
            parts = description["components"]["schemas"]
            for name in ("HTTPValidationError", "ValidationError"):
                parts.pop(name, None)
            if not service.keys.open:
                description["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                description["security"] = [{"key": []}]
            app.openapi_schema = description
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
