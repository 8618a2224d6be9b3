"""The command line of what goes out of Archipel and comes into it: exports for diffusers, experts from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from archipel.cli_islands import RunFolder, RunId
from archipel.edge import say


def export(
    run: Annotated[str, typer.Argument(help="The run's folder, or the URL of a bucket.", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="Where to write it: a new folder.", show_default=False)],
    expert: Annotated[
        str | None,
        typer.Option(
            help="One expert alone (a number, or monolith), as a pipeline of diffusers' own where there is one."
        ),
    ] = None,
    monolith: Annotated[bool, typer.Option("--monolith", help="With the monolith, for comparison.")] = False,
    partial: Annotated[bool, typer.Option("--partial", help="Also where experts are missing.")] = False,
    licence: Annotated[str, typer.Option("--license", help="Licence of the weights, for the model card.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export there.")] = False,
    run_id: RunId = None,
) -> None:
    """Write the run as a folder for diffusers: ArchipelPipeline.from_pretrained(FOLDER)."""
    from archipel.exchange import folder as out

    if expert is not None:
        from archipel.exchange.single import export as export_one

        made = export_one(run, folder, expert, run_id=run_id, force=force, licence=licence)
        say(f"exported expert {expert} as {made.pipeline}: {folder} ({made.bytes / 1e6:.1f} MB)")
        for note in made.notes:
            say(f"  {note}")
        return
    done = out.export(run, folder, run_id=run_id, force=force, partial=partial, monolith=monolith, licence=licence)
    count = f"{len(done.experts)} experts" + (f" of {len(done.experts) + len(done.missing)}" if done.missing else "")
    say(f"exported {count}: {folder} ({done.bytes / 1e6:.1f} MB)")
    say(f'next: python -c \'from archipel import ArchipelPipeline as P; P.from_pretrained("{folder}")("a prompt")\'')


def import_(
    run: RunFolder,
    name: Annotated[str, typer.Argument(help="Which expert of the run it becomes: a number.", show_default=False)],
    folder: Annotated[
        Path,
        typer.Argument(
            help="Weights: FOLDER/expert_0 of an export, or any transformer of diffusers.", show_default=False
        ),
    ],
    licence: Annotated[
        str, typer.Option("--license", help="Licence of the weights, where their folder has none.")
    ] = "",
    trust: Annotated[
        Path | None, typer.Option(help="The owner's trust.toml: bounds, and the bar for its loss.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the expert that is there.")] = False,
) -> None:
    """Make weights from elsewhere an expert of a run, after checking them as admission does."""
    from archipel import pipeline
    from archipel.exchange.bring import bring

    opened = pipeline.open_run(run)
    done = bring(opened.root, name, folder, licence=licence, force=force, trust=trust)
    say(f"imported expert {name}: {opened.expert(name)} (sha256 {done.sha256[:12]})")
    for note in done.notes:
        say(f"  {note}")


def pack(
    run: RunFolder,
    folder: Annotated[Path, typer.Argument(help="Where to write it: a new folder.", show_default=False)],
    name: Annotated[str, typer.Option(help="Of the model (default: the folder's).", show_default=False)] = "",
    licence: Annotated[str, typer.Option("--license", help="Licence of the weights, for the model card.")] = "",
    command: Annotated[str, typer.Option(help="How the run was made, for the model card.")] = "",
    commit: Annotated[str, typer.Option(help="From which commit, for the model card.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier one there.")] = False,
) -> None:
    """Write a finished run as a small folder that generates: half precision, checked, with model card and samples."""
    from archipel import pipeline
    from archipel.exchange import pack as packing

    opened = pipeline.open_run(run)
    said = {"name": name, "licence": licence, "command": command, "commit": commit}
    done = packing.pack(opened.root, folder, force=force, tell=lambda text: say(f"pack: {text}"), **said)
    say(f"packed: {folder} ({done.bytes / 1e6:.1f} MB)")
    for note in done.notes:
        say(f"  {note}")
    say(f'next: archipel generate {folder} "a prompt" -o clip.mp4')


def model(
    where: Annotated[
        str | None, typer.Argument(metavar="[FOLDER]", help="A packed model (default: what ships).", show_default=False)
    ] = None,
    card: Annotated[bool, typer.Option("--card", help="The whole model card.")] = False,
) -> None:
    """What the model in the box is: its size, run, scores and captions to try."""
    from archipel import box

    folder = Path(box.locate(where))
    facts = box.facts(folder)
    if card:
        print((folder / box.CARD).read_text(encoding="utf-8"), end="")
        return
    for line in box.summary(folder, facts):
        print(line)


def register(app: typer.Typer) -> None:
    app.command()(export)
    app.command()(pack)
    app.command()(model)
    app.command("import")(import_)
