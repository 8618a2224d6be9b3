"""The command line of serving: a run's clips over HTTP."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from archipel import box
from archipel.edge import parse_bytes, parse_duration, say, stop_with_parent
from archipel.errors import ArchipelError


def serve(
    run: Annotated[
        str | None,
        typer.Argument(
            help="The run's folder, or the URL of a bucket (default: the model in the box).", show_default=False
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but 127.0.0.1 needs ARCHIPEL_API_KEY.")
    ] = "127.0.0.1",
    state: Annotated[
        Path | None,
        typer.Option(
            help="Folder for jobs and clips (default: RUN/serving; of the model in the box: in the user's data folder).",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1 (default: a GPU where there is one).")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads (default: all cores).")] = None,
    queue: Annotated[int, typer.Option(min=1, max=100_000, help="Jobs that may wait; more are refused.")] = 64,
    batch: Annotated[int, typer.Option(min=1, max=256, help="Clips generated together.")] = 16,
    max_steps: Annotated[int, typer.Option(min=1, max=1000, help="Solver steps that may be asked for.")] = 200,
    max_side: Annotated[int, typer.Option(min=8, max=8192, help="Pixels of a delivered clip's side.")] = 1024,
    keep: Annotated[str, typer.Option(help="Remove finished clips after this long: 90s, 30m, 24h.")] = "168h",
    keep_size: Annotated[str, typer.Option(help="Remove the oldest clips above this size in all.")] = "10GB",
    memory: Annotated[
        str | None, typer.Option(help="Most memory for networks at a time, such as 2GB.", show_default=False)
    ] = None,
    safe: Annotated[
        bool,
        typer.Option(
            "--safe", "--public", help="For public serving: refuse prompts of a blocklist, withhold unsafe clips."
        ),
    ] = False,
    blocklist: Annotated[
        Path | None, typer.Option(help="With --safe: a file of rules, instead of ours.", show_default=False)
    ] = None,
    safe_threshold: Annotated[
        float | None,
        typer.Option(help="With --safe: what a frame may score, up to 1 (default: 0.8).", show_default=False),
    ] = None,
    expert: Annotated[
        int | None,
        typer.Option(min=0, help="Offer this expert's velocity to ensembles elsewhere instead.", show_default=False),
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(
            help="With --expert: the private key (`archipel keygen`) that signs its card.", show_default=False
        ),
    ] = None,
    run_id: Annotated[str | None, typer.Option("--run-id", help="Refuse a run of another id.")] = None,
    store: Annotated[
        str | None,
        typer.Option(
            help="In the studio: where the run's islands work, as `archipel status URL` has it (default: RUN itself).",
            show_default=False,
        ),
    ] = None,
    no_clips: Annotated[
        bool, typer.Option("--no-clips", help="In the studio: show no pictures of the training clips.")
    ] = False,
    pages: Annotated[bool, typer.Option("--studio", help="With the studio's pages, as `archipel studio`.")] = False,
) -> None:
    """Serve clips over HTTP, as OpenAI's video interface: archipel serve RUN --port 8000"""
    if expert is not None:
        if safe or blocklist is not None or safe_threshold is not None:
            raise ArchipelError("--safe looks at prompts and clips, and --expert is given neither: leave one out")
        bounds = {"rows": batch, "steps": max_steps}
        return _expert(str(box.locate(run)), str(expert), host, port, device, threads, key, run_id, bounds)
    if key is not None:
        raise ArchipelError("--key signs the card of an expert that is offered: give --expert as well")
    from archipel.serving.limits import Limits

    limits = Limits(
        queue=queue,
        batch=batch,
        steps=max_steps,
        side=max_side,
        keep_seconds=parse_duration(keep, "--keep"),
        keep_bytes=parse_bytes(keep_size, "--keep-size"),
    )
    from archipel.serving import server

    keys = server.settle(host)
    shipped, run = run is None or box.is_address(run), str(box.locate(run))
    home = not shipped and (Path(run) / "run.toml").exists()  # else the box, a bucket or an export, which others read
    if state is None and not (home or shipped) and ("://" in run or Path(run).is_dir()):
        raise ArchipelError(f"{run} is not a run's own folder: give --state FOLDER for jobs and clips")
    bound = None if memory is None else parse_bytes(memory)
    import fastapi  # noqa: F401 - said before minutes of loading where it is missing
    import uvicorn  # noqa: F401

    if pages:
        from archipel.studio import mount

        mount.prepare()
    from archipel import pipeline
    from archipel.cli_generate import safety_of
    from archipel.ensemble.pipeline import Archipelago
    from archipel.training.machine import pick_device

    safety = safety_of(safe, blocklist, safe_threshold)
    if home:
        pipeline.open_run(Path(run))  # refuses a run.toml that was edited after work began
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    archipelago = Archipelago.load(run, device=pick_device(device), run_id=run_id, memory=bound)
    stop_with_parent()
    folder = state or (box.home() if shipped else Path(run) / "serving")
    given: dict[str, Any] = {"host": host, "port": port, "keys": keys, "limits": limits, "tell": say, "safety": safety}
    if pages:
        own = pipeline.open_run(Path(run)) if home else None
        given["extend"] = mount.extend(archipelago, run, own, store=store, show_clips=not no_clips)
    server.serve(archipelago, folder, **given)
    return None


@functools.wraps(serve)
def studio(**given: Any) -> None:
    serve(**given, pages=True)


_signature = inspect.signature(serve, eval_str=True)
studio.__signature__ = _signature.replace(  # type: ignore[attr-defined]
    parameters=[one for name, one in _signature.parameters.items() if name not in ("pages", "expert", "key")]
)
studio.__name__ = "studio"
studio.__doc__ = "Open the studio, where clips are made and looked at in the browser: archipel studio RUN"


def _expert(
    run: str,
    name: str,
    host: str,
    port: int,
    device: str | None,
    threads: int | None,
    key: Path | None,
    run_id: str | None,
    bounds: dict[str, int],
) -> None:
    """One expert's velocity (docs/remote.md)."""
    from archipel.serving import island

    tokens = island.settle(host)
    import uvicorn  # noqa: F401 - said before minutes of loading where it is missing

    from archipel.training.machine import pick_device

    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    found = island.opened(run, name, device=pick_device(device), key=key, run_id=run_id)
    stop_with_parent()
    island.serve(found, host=host, port=port, tokens=tokens, bounds=island.Bounds(**bounds), tell=say)


def register(app: typer.Typer) -> None:
    app.command()(serve)
    app.command()(studio)
