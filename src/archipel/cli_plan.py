"""The command line of planning: what a run would cost, before anything is spent."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from archipel.edge import say
from archipel.errors import ArchipelError


def plan(
    run: Annotated[Path | None, typer.Argument(help="The run's folder; or give --preset.", show_default=False)] = None,
    preset: Annotated[str, typer.Option(help="Plan a preset instead of a run, for example paris2.")] = "",
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value over the preset; repeatable.")
    ] = None,
    source: Annotated[str | None, typer.Option(help="With --preset: as `archipel init` has it.")] = None,
    data: Annotated[str, typer.Option(help="With --preset: folder, tar pattern or data set of the source.")] = "",
    backbone: Annotated[str, typer.Option(help="With --preset: flux, wan, ltx, hunyuan or cogvideox.")] = "",
    codec: Annotated[str, typer.Option(help="With --preset: folder or hub id of an autoencoder.")] = "",
    text: Annotated[str, typer.Option(help="With --preset: folder or hub id of text encoders.")] = "",
    weights: Annotated[str, typer.Option(help="With --preset: folder or hub id of trained weights.")] = "",
    clips: Annotated[
        int | None, typer.Option(min=1, help="Clips there will be, where the source cannot say it.")
    ] = None,
    gpu: Annotated[list[str] | None, typer.Option("--gpu", help="h100, h200, a100, rtx4090, ...; repeatable.")] = None,
    gpus: Annotated[int, typer.Option(min=1, max=1024, help="GPUs that hold one expert together.")] = 1,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    micro_batch: Annotated[int, typer.Option(min=0, help="Clips computed at once on a GPU (0: all).")] = 0,
    checkpointing: Annotated[bool, typer.Option(help="Compute blocks again on the way back.")] = False,
    optimizer: Annotated[str, typer.Option(help="adamw or adamw8bit.")] = "adamw",
    ema: Annotated[str, typer.Option(help="Where the average lies: device or host.")] = "device",
    mfu: Annotated[float, typer.Option(help="Share of the peak rate that training is assumed to reach.")] = 0.4,
    json_: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Parameters, FLOPs, memory, disk and hours of a run, without training anything: archipel plan --preset paris2"""
    from archipel.planning import hardware, settle
    from archipel.planning.switches import Switches

    chosen = hardware.find(gpu or hardware.DEFAULT)
    switches = Switches(precision, checkpointing, micro_batch, optimizer, ema, gpus, mfu)
    parts = {"source": source, "data": data, "backbone": backbone, "codec": codec, "text": text, "weights": weights}
    given = {key: value for key, value in parts.items() if value}
    if run is not None and (preset or given):
        odd = "preset" if preset else next(iter(given))
        raise ArchipelError(f"{run} is a run and has its own settings: leave out --{odd}, or leave out the run")
    if run is None and not preset and not given:
        raise ArchipelError("give a run or a preset: archipel plan RUN, or archipel plan --preset paris2")
    asked = settle.of_run(run, sets or []) if run else settle.of_preset(preset, sets or [], **given)

    from archipel.planning import plan as planning

    made = planning.make(
        asked.config,
        switches,
        chosen,
        clips=clips or asked.clips,
        root=asked.root,
        tell=lambda what: say(f"plan: {what}"),
    )
    if json_:
        import json

        print(json.dumps(planning.as_json(made), indent=2))
        return
    from rich.console import Console

    from archipel.planning.tables import page

    Console().print(page(made))


def register(app: typer.Typer) -> None:
    app.command()(plan)
