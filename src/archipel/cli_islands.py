"""The command line of islands: a run in a bucket, the machines that train it, and what its owner lets in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from archipel.edge import parse_duration, say, stop_with_parent

Url = Annotated[
    str, typer.Argument(help="Folder, file://, s3://bucket/prefix, gs:// or az://container/prefix.", show_default=False)
]
RunId = Annotated[str | None, typer.Option("--run-id", help="The id that `publish` printed: any other run is refused.")]


def publish(
    run: Annotated[Path, typer.Argument(help="The run's folder.", show_default=False)],
    url: Url,
) -> None:
    """Put what islands need where they can reach it: configuration, codec and shards, never the clips."""
    from archipel import pipeline
    from archipel.islands.publish import publish as send
    from archipel.progress import StopFlag

    with StopFlag() as stop:
        done = send(pipeline.open_run(run), url, stop)
    say(f"published {done.files} files to {done.url} ({done.sent / 1e6:.1f} MB sent now)")
    say(f"islands join with: archipel join {done.url} --run-id {done.run_id[:16]}")
    print(done.run_id)


def join(
    url: Url,
    only: Annotated[
        list[str] | None, typer.Option(help="Only this job: an expert's number, monolith or router; repeatable.")
    ] = None,
    for_: Annotated[str | None, typer.Option("--for", help="Stop cleanly after this long: 90s, 30m, 6h.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="End after so many jobs.")] = None,
    run_id: RunId = None,
    name: Annotated[
        str, typer.Option(help="What others see (default: a name that says nothing of this machine).")
    ] = "",
    work: Annotated[
        Path | None, typer.Option(help="This island's own folder (default: one in the user's cache folder).")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="Private key (`archipel keygen`) that signs the results.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads (default: what a job began with, else all cores).")
    ] = None,
) -> None:
    """Make this machine an island: take free jobs of a published run until none is left."""
    from archipel.islands.bucket import Bucket
    from archipel.islands.worker import Options
    from archipel.islands.worker import join as work_on
    from archipel.progress import StopFlag

    stop_with_parent()
    options = Options(
        only=tuple(dict.fromkeys(only or [])),
        seconds=None if for_ is None else parse_duration(for_),
        jobs=jobs,
        name=name,
        work=work,
        sign=_signer(key),
        settings={"threads": threads},
    )
    with StopFlag() as stop:
        bucket = Bucket.open(url, run_id)
        finished = work_on(bucket, options, stop)
    say(f"finished here: {', '.join(finished) or 'nothing'}")


def is_bucket(text: str) -> bool:
    """Whether this is a published run: a URL, or a folder with the list of its published files."""
    return "://" in text or (Path(text) / "published.json").is_file()


def _signer(key: Path | None) -> Any:
    if key is None:
        return None
    from archipel.islands.trust import sign

    return lambda payload: sign(key, payload)


def print_status(url: str, run_id: str | None, as_json: bool, watch: bool) -> None:
    """`archipel status URL`: who holds what."""
    import json
    import time

    from archipel.islands.bucket import Bucket
    from archipel.islands.status import status

    bucket = Bucket.open(url, run_id, patience=60.0)
    if as_json:
        while True:
            print(json.dumps(status(bucket), indent=None if watch else 2), flush=True)
            if not watch:
                return
            time.sleep(2.0)
    from rich.console import Console
    from rich.live import Live

    if not watch:
        Console().print(_status_table(status(bucket)))
        return
    with Live(_status_table(status(bucket)), console=Console(), auto_refresh=False) as live:
        while True:
            time.sleep(2.0)
            live.update(_status_table(status(bucket)), refresh=True)


def _status_table(found: dict[str, Any]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    from archipel.progress import seconds_text

    table = Table(title=f"run {found['run'][:12]} in {escape(found['url'])}", title_justify="left")
    for head in ("job", "state", "held by", "attempt", "step", "loss", "steps/s", "left", "last seen"):
        table.add_column(head, justify="right" if head in ("attempt", "step", "loss", "steps/s", "left") else "left")
    for job in found["jobs"]:
        state = "admitted" if job["state"] == "done" and job["admitted"] else job["state"]
        seen = job["last_seen_s"]
        table.add_row(
            job["name"],
            state,
            job["holder"] or "",
            str(job["fence"] or ""),
            f"{job['step']}/{job['steps']}",
            "" if job["loss"] is None else f"{job['loss']:.4f}",
            "" if job["steps_per_s"] is None or job["state"] != "claimed" else f"{job['steps_per_s']:.2f}",
            "" if job["left_s"] is None else seconds_text(job["left_s"]),
            "" if seen is None else f"{seconds_text(seen)} ago",
        )
    return table


def register(app: typer.Typer) -> None:
    """Add these verbs to ``archipel``."""
    for verb in (publish, join):
        app.command()(verb)
