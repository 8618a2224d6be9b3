"""The studio on the server's application: gradio behind ``doors``, a private temporary folder, nothing that phones home."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archipel.studio.context import StudioContext

if TYPE_CHECKING:
    from archipel.ensemble.pipeline import Archipelago
    from archipel.run import Run
    from archipel.serving.server import Extend
    from archipel.serving.service import Service

PATH = "/studio"
# Read by gradio and its client when they are imported.
QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_SSR_MODE": "False",
    "GRADIO_MCP_SERVER": "False",
    "GRADIO_SHARE": "False",
    "GRADIO_RUN_HISTORY": "False",
    "GRADIO_ALLOWED_PATHS": "",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}
_ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 32 32'%3E%3Cellipse cx='11' cy='20' rx='9' "
    "ry='6' fill='%230b7d77'/%3E%3Cellipse cx='23' cy='13' rx='6' ry='4' fill='%23d08a12'/%3E%3C/svg%3E"
)


def prepare() -> None:
    """Import gradio, with everything off that it would tell others; before minutes of loading, in case it is missing."""
    os.environ.update(QUIET)
    import gradio  # noqa: F401


def extend(
    archipelago: Archipelago, where: str, run: Run | None, *, store: str | None = None, show_clips: bool = True
) -> Extend:
    """What ``serving.server.serve`` is given so that the studio is there, too."""

    @contextlib.contextmanager
    def mounted(app: Any, service: Service) -> Iterator[None]:
        context = StudioContext(archipelago, service, where, run, store, show_clips)
        with _private_folder(service.worker.folder.parent / "uploads") as temporary:
            _mount(app, context, temporary)
            yield

    return mounted


@contextlib.contextmanager
def _private_folder(folder: Path) -> Iterator[Path]:
    """Gradio's temporary folder, mode 0700, within the server's own, which is locked: what a killed process left there is
    removed at the start, and what this one leaves at its end."""
    kept = {name: os.environ.get(name) for name in (*QUIET, "GRADIO_TEMP_DIR")}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, parents=True)
    os.environ.update(QUIET, GRADIO_TEMP_DIR=str(folder))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _mount(app: Any, context: StudioContext, temporary: Path) -> None:
    import gradio as gr
    from fastapi.responses import RedirectResponse

    from archipel.studio import page, widgets
    from archipel.studio.desk import Desk
    from archipel.studio.doors import Doors

    def stopping() -> bool:
        ending = getattr(app.state, "ending", None)
        return ending is not None and ending.is_set()

    blocks, remembered = page.build(context, Desk(context, stopping))
    gr.mount_gradio_app(
        app,
        blocks,
        PATH,
        theme=widgets.theme(),
        max_file_size=context.service.limits.body,
        allowed_paths=[],
        show_error=False,
        ssr_mode=False,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
    )
    _remove_at_end(app, temporary)
    head = f'<title>{escape(page.TITLE)}</title><link rel="icon" href="{_ICON}"><style>{widgets.sheet()}</style>'
    head += f"<script>{widgets.script()}</script>"
    route = app.router.routes[-1]
    route.app = Doors(route.app, context.service, temporary, head, stopping, remembered)

    def without_slash() -> RedirectResponse:
        return RedirectResponse(f"{PATH}/", 303)

    app.get(PATH, include_in_schema=False)(without_slash)
    app.state.home = f"{PATH}/"


def _remove_at_end(app: Any, folder: Path) -> None:
    """With the application: uvicorn ends the process by the signal that it was sent, before any ``finally`` of ours."""
    before = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[Any]:
        async with before(app) as state:
            yield state
        shutil.rmtree(folder, ignore_errors=True)

    app.router.lifespan_context = lifespan
