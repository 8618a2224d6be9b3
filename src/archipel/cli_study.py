"""The command line of the study: all arms of one question, trained, scored and shown."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from archipel.cli_islands import RunFolder
from archipel.edge import parse_duration, say

Only = Annotated[
    list[str] | None,
    typer.Option(
        "--only",
        help="Parts to do: table, ablations, experts (K), partitions, warm, curve. May be repeated; table always is done.",
    ),
]


def study(
    run: RunFolder,
    seeds: Annotated[
        int, typer.Option(min=1, max=100, help="Seeds of partition, initialisation and noise; 5 or more for intervals.")
    ] = 5,
    only: Only = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            "--judge",
            help="A scorer beside the packaged ones, NAME=WHERE[@sha256:HEX]: i3d, videomae, clip, aesthetic, dinov2. May be repeated.",
        ),
    ] = None,
    allow_torchscript: Annotated[
        bool,
        typer.Option("--allow-torchscript", help="Load TorchScript files whose sha256 is given: they are programs."),
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Jobs side by side (default: one per core or GPU).")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads per job (default: cores over jobs).")] = None,
    trial: Annotated[
        list[str] | None,
        typer.Option(
            "--trial",
            help="A pilot instead of the study: NAME:KEY=VALUE,KEY=VALUE, scored on validation captions. May be repeated.",
        ),
    ] = None,
    for_: Annotated[str | None, typer.Option("--for", help="Stop cleanly after this long: 30m, 2h.")] = None,
) -> None:
    """Train and score all arms of one question: archipelago, monoliths, controls, bounds. Start it again to continue."""
    from archipel import pipeline
    from archipel.progress import StopFlag
    from archipel.study.plan import PARTS
    from archipel.study.sampling import JudgeSpec
    from archipel.study.stage import study as stage

    opened = pipeline.open_run(run)
    seconds = None if for_ is None else parse_duration(for_)
    chosen = tuple(part for words in only for part in words.split(",")) if only else PARTS
    judges = JudgeSpec(tuple(judge or ()), allow_torchscript)
    where: dict[str, Any] = {"judges": judges, "workers": workers, "threads": threads}
    with StopFlag(seconds) as stop:
        if trial:
            from archipel.study import pilot

            rows = pilot.pilot(opened, pilot.parse(trial), seeds=seeds, stop=stop, **where)
            for line in pilot.summary(rows):
                say(line)
            return
        done = stage(opened, seeds=seeds, parts=chosen, stop=stop, **where)
    for line in done.said:
        say(line)
    print(done.page, file=sys.stdout)


def register(app: typer.Typer) -> None:
    app.command()(study)
