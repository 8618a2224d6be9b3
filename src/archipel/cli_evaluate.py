"""The command line of scores: a run's arms, any folder of clips against a run, any two folders."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from archipel.cli_islands import RunFolder
from archipel.edge import say
from archipel.errors import ArchipelError

# Short names of what comes with its package; the rest bear their own.
_SHORT = {
    "efficientnet": "efficientnet-appearance",
    "appearance": "efficientnet-appearance",
    "motion": "efficientnet-motion",
}


class Crop(Enum):
    """How a frame becomes square."""

    center = "center"
    pad = "pad"
    stretch = "stretch"


MaxRejected = Annotated[
    float,
    typer.Option(
        "--max-rejected", min=0, max=1, help="Stop where more than this share of a folder's clips cannot be used."
    ),
]


def evaluate(
    run: RunFolder,
    against: Annotated[
        Path | None,
        typer.Option("--against", help="Score this folder of clips against the run's test clips.", show_default=False),
    ] = None,
    max_rejected: MaxRejected = 0.1,
) -> None:
    """Score the generated clips of every arm; prints the table. --against: score any folder of clips instead."""
    from archipel import pipeline

    opened = pipeline.open_run(run)
    if against is None:
        pipeline.evaluate(opened)
        print_table(opened)
        return
    from rich.console import Console

    from archipel.evaluation.against import rich_table

    done = pipeline.evaluate_against(opened, against, max_rejected=max_rejected)
    console = Console()
    console.print(rich_table(done, console.width))
    for note in done.notes[3:]:  # the first stand under the table
        say(note)
    say(f"scores: {done.path}")


def print_table(opened: Any) -> None:
    """The table of a run's scores."""
    from rich.console import Console

    from archipel.evaluation.stage import rich_table

    console = Console()
    console.print(rich_table(opened, console.width))


def fvd(
    folder_a: Annotated[Path, typer.Argument(help="The reference: real clips.", show_default=False)],
    folder_b: Annotated[Path, typer.Argument(help="The clips held against it.", show_default=False)],
    extractor: Annotated[
        list[str] | None,
        typer.Option(
            help="efficientnet (appearance), motion, transnet, i3d, videomae or dinov2; repeatable.", show_default=False
        ),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=WHERE[@sha256:HEX] of an extractor that comes without: i3d=FILE@sha256:HEX, videomae=FOLDER or "
            "ORG/NAME; repeatable.",
            show_default=False,
        ),
    ] = None,
    allow_torchscript: Annotated[
        bool,
        typer.Option("--allow-torchscript", help="Run the code in a TorchScript file (i3d); its sha256 must be given."),
    ] = False,
    frames: Annotated[
        int, typer.Option(min=0, max=1024, help="Frames of a clip (0: as many as the clips have, up to 16).")
    ] = 0,
    fps: Annotated[float, typer.Option(min=0.01, max=240, help="Frames per second, picked by time.")] = 8.0,
    size: Annotated[int, typer.Option(min=8, max=2048, help="Height and width that frames are brought to.")] = 224,
    crop: Annotated[Crop, typer.Option(help="How a frame becomes square.")] = Crop.center,
    max_rejected: MaxRejected = 0.1,
    json_: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Distances between two folders of clips: archipel fvd REAL GENERATED --extractor efficientnet

    The Frechet distance (called FVD only with I3D) and the unbiased kernel distance, with intervals, protocol and real floor.
    """
    import json

    from archipel.config import Evaluate
    from archipel.evaluation import folders
    from archipel.evaluation.extractors import Judges
    from archipel.progress import StopFlag

    folders.two_folders(folder_a, folder_b)  # wrong ones are told before networks are loaded
    judges = Judges.open(
        specs(extractor or ["efficientnet"], weights or []), Evaluate(), allow_torchscript=allow_torchscript
    )
    with StopFlag() as stop:
        found = folders.compare(
            folder_a,
            folder_b,
            judges,
            frames=frames,
            fps=fps,
            size=size,
            crop=crop.value,
            max_rejected=max_rejected,
            stop=stop,
        )
    if json_:
        print(json.dumps(found, indent=2, allow_nan=False))
    else:
        _print_folders(found)


def specs(extractors: list[str], weights: list[str]) -> list[str]:
    """What ``Judges.open`` reads: every extractor, with its weights where they are given.

    Raises ArchipelError for weights of an extractor that was not asked for, and for judges without features.
    """
    given = {text.partition("=")[0].strip(): text.strip() for text in weights}
    wanted: list[str] = []
    for text in extractors:
        name = _SHORT.get(text.strip(), text.strip())
        if name.partition("=")[0] in ("clip", "aesthetic", "flow"):
            raise ArchipelError(
                f"--extractor {name} gives no features for a distance between sets: take efficientnet, motion, transnet, "
                "i3d, videomae or dinov2"
            )
        if name not in wanted:
            wanted.append(given.pop(name, name))
    for name, text in given.items():
        if "=" not in text:
            raise ArchipelError(
                f"--weights {text!r} does not say whose they are: write NAME=WHERE, for example i3d={text}"
            )
        raise ArchipelError(f"--weights {text!r}: the extractor {name!r} is not asked for: add --extractor {name}")
    return wanted


def _print_folders(found: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from archipel.evaluation import folders
    from archipel.evaluation.stage import cell

    a, b, window = found["a"], found["b"], found["window"]
    title = (
        f"A: {a['clips']} clips of {a['folder']}, B: {b['clips']} clips of {b['folder']}; "
        f"{window['frames']} frames at {window['fps']:g} per second, {window['size']} px"
    )
    arms = [arm for arm in (folders.BOTH, folders.HALF, folders.FLOOR) if any(r["arm"] == arm for r in found["scores"])]
    half = next((row["n"] for row in found["scores"] if row["arm"] == folders.FLOOR), 0)
    heads = {folders.BOTH: "B against A", folders.HALF: f"{half} of B\nagainst {half} of A"}
    heads[folders.FLOOR] = f"floor: {half} of A\nagainst {half} of A"
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("metric", no_wrap=True)
    for arm in arms:
        table.add_column(heads[arm], justify="right", no_wrap=True)
    cells = {(row["metric"], row["arm"]): cell(row) for row in found["scores"]}
    for metric in dict.fromkeys(row["metric"] for row in found["scores"]):
        table.add_row(metric.replace("-", "\n"), *(cells.get((metric, arm), "") for arm in arms))
    Console().print(table)
    for note in found["notes"]:
        say(note)


def register(app: typer.Typer) -> None:
    """Add these verbs to ``archipel``."""
    for verb in (evaluate, fvd):
        app.command()(verb)
