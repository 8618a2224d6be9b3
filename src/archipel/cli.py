"""The command line: one verb per stage; parsing and printing only. Everything heavy is imported inside a verb."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from archipel import __version__, cli_evaluate, cli_exchange, cli_generate, cli_islands, cli_plan, cli_serve, cli_study
from archipel.edge import flush, message, parse_duration, say, stop_with_parent
from archipel.errors import EXIT_INTERRUPTED, EXIT_WRONG_INPUT, ArchipelError

app = typer.Typer(
    name="archipel",
    help="Train one text-to-video diffusion model on machines that never talk to each other, and generate with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
cache_app = typer.Typer(name="cache", help="The user's cache folder: downloaded clips.", no_args_is_help=True)
app.add_typer(cache_app)

RunPath = cli_islands.RunFolder
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="section.key=value, for example expert.steps=2000; repeatable.")
]


# typer brought its own copy of click at some version; the base of its usage errors is found by name in either case.
_USAGE_ERROR: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


@app.callback(invoke_without_command=True)
def _common(
    log_level: Annotated[
        str, typer.Option("--log-level", help="debug, info, warning or error, on the screen.")
    ] = "warning",
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
) -> None:
    import logging

    if version:
        print(f"archipel {__version__}")
        raise typer.Exit
    level = getattr(logging, log_level.upper(), None)
    if not isinstance(level, int):
        raise ArchipelError(f"--log-level {log_level!r} is not one of debug, info, warning, error")
    logging.raiseExceptions = False  # a log on a full disk must not print tracebacks; the stage itself will say so
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    handler.setLevel(level)
    logger = logging.getLogger("archipel")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False


# --- a run -----------------------------------------------------------------------------------------------------------


@app.command()
def init(
    run: RunPath,
    source: Annotated[str | None, typer.Option(help="fluent-emoji, shapes, folder, webdataset or huggingface.")] = None,
    preset: Annotated[str, typer.Option(help="tiny, demo, long, study, gpu or paris2: a scale of work.")] = "",
    data: Annotated[str, typer.Option(help="Folder, tar pattern or data set of the source.")] = "",
    backbone: Annotated[str, typer.Option(help="flux, wan, ltx, hunyuan or cogvideox.")] = "",
    codec: Annotated[
        str, typer.Option(help="Autoencoder of diffusers: folder or hub id (a pipeline's, or its own).")
    ] = "",
    text: Annotated[
        str, typer.Option(help="Text encoder of transformers: folder or hub id; two encoders joined by a plus sign.")
    ] = "",
    weights: Annotated[str, typer.Option(help="Trained transformer to begin with: folder or hub id.")] = "",
    sets: Sets = None,
) -> None:
    """Make a new run: write run.toml."""
    from archipel import pipeline

    parts = {"backbone": backbone, "codec": codec, "text": text, "weights": weights}
    made = pipeline.init(run, source=source, preset=preset, data=data, sets=sets or [], **parts)
    config = made.config
    say(f"made {run / 'run.toml'} (run {made.id[:12]})")
    say(
        f"  {config.clips.source} clips of {config.clips.frames}x{config.clips.size}x{config.clips.size}, "
        f"{config.partition.k} experts, {config.compute.archipelago_flops / 1e12:.2f} TFLOP of training per arm"
    )
    for what, part in (("codec", config.codec.model), ("text", config.text.encoder if config.text.path else "")):
        if part:
            say(f"  {what}: {part} of {getattr(config, what).path}")
    if config.expert.weights:
        say(f"  weights: {config.expert.network['_class_name']} of {config.expert.weights}")
    say(f"next: archipel run {run}")


@app.command()
def prepare(run: RunPath, sets: Sets = None) -> None:
    """Decode clips and cache latents, text embeddings and features."""
    from archipel import pipeline

    pipeline.prepare(pipeline.open_run(run, sets or []))


@app.command()
def partition(run: RunPath, sets: Sets = None) -> None:
    """Split the clips into K clusters and write each island's shard."""
    from archipel import pipeline

    pipeline.partition(pipeline.open_run(run, sets or []))


@app.command()
def train(
    run: RunPath,
    expert: Annotated[str, typer.Argument(help="An expert's number, monolith, router or trunk.", show_default=False)],
    for_: Annotated[str | None, typer.Option("--for", help="Stop cleanly after this long: 90s, 30m, 2h.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads (default: what the job began with, else all cores).")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1 (default: a GPU where there is one).")] = None,
    precision: cli_islands.Precision = None,
    micro_batch: cli_islands.MicroBatch = None,
    gpus: Annotated[int, typer.Option(min=1, help="Train on so many GPUs of this machine, one process each.")] = 1,
    checkpointing: cli_islands.Checkpointing = None,
    optimizer: cli_islands.Optimizer = None,
    compile_: cli_islands.Compile = None,
    ema: cli_islands.Average = None,
    sets: Sets = None,
) -> None:
    """Train one expert, the monolith or the router in this process; continues where it was."""
    from archipel import pipeline
    from archipel.islands import site

    stop_with_parent()
    seconds = None if for_ is None else parse_duration(for_)
    asked = {"device": device, "threads": threads, "gpus": gpus, "precision": precision, "micro_batch": micro_batch}
    asked |= {"checkpointing": checkpointing, "optimizer": optimizer, "compile": compile_, "ema": ema}
    local = site.local(run, asked)
    pipeline.train(pipeline.open_run(run, sets or []), expert, seconds=seconds, local=local)


@app.command()
def route(run: RunPath) -> None:
    """Train the router where it is missing, and calibrate it on validation."""
    from archipel import pipeline

    pipeline.route(pipeline.open_run(run))


@app.command()
def report(run: RunPath) -> None:
    """Write the run's page: RUN/report/index.html."""
    from archipel import pipeline

    say(f"report: {pipeline.report(pipeline.open_run(run))}")


@app.command("run")
def run_(
    run: RunPath,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads per training process.")] = None,
    engine: Annotated[str, typer.Option(help="Where the work is done: local, ray, slurm or sky.")] = "local",
    store: Annotated[
        str | None,
        typer.Option(
            help="Folder or URL that all machines of the engine see (default: RUN/store).", show_default=False
        ),
    ] = None,
    site: Annotated[
        list[str] | None,
        typer.Option("--site", help="On top of RUN/site.toml, for example slurm.partition=gpu; repeatable."),
    ] = None,
    sets: Sets = None,
) -> None:
    """Do everything that is missing, in order."""
    from archipel import pipeline

    _run_all(pipeline.open_run(run, sets or []), threads=threads, engine=engine, store_url=store, site=site or [])


def _run_all(opened: Any, **where: Any) -> None:
    from archipel import pipeline

    page = pipeline.run_all(opened, **where)
    cli_evaluate.print_table(opened)
    say(f"report: {page}")


@app.command()
def demo(
    run: Annotated[Path, typer.Argument(help="Where to put the demo's run.")] = Path("demo"),
    source: Annotated[
        str | None, typer.Option(help="fluent-emoji (the default; downloads 190 MB once) or shapes (no network).")
    ] = None,
) -> None:
    """The main job in minutes: real clips, three experts, a monolith, a router, samples, scores, a report."""
    from archipel import pipeline

    if not (run / "run.toml").exists():
        init(run, source=source or "fluent-emoji", preset="demo")
    _run_all(pipeline.open_run(run, [f"clips.source={source}"] if source else []))


@app.command()
def status(
    run: Annotated[str, typer.Argument(help="The run's folder, or the URL it was published to.", show_default=False)],
    json_: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="A bucket: again every two seconds, until Ctrl-C.")] = False,
    run_id: cli_islands.RunId = None,
) -> None:
    """What is done and what is missing; for a bucket: who holds what."""
    from archipel import pipeline

    if cli_islands.is_bucket(run):
        return cli_islands.print_status(run, run_id, json_, watch)
    found = pipeline.status(pipeline.open_run(run))
    if json_:
        import json

        print(json.dumps(found, indent=2))
        return None
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    title = f"run {found['run'][:12]} in {escape(found['root'])}"
    table = Table("stage", "state", "", title=title, title_justify="left")
    for stage in found["stages"]:
        table.add_row(stage["name"], stage["state"], stage["detail"])
    jobs = Table("job", "state", "step", "loss")
    for job in found["jobs"]:
        loss = "" if job["loss"] is None else f"{job['loss']:.4f}"
        jobs.add_row(job["name"], job["state"], f"{job['step']}/{job['steps']}", loss)
    console = Console()
    console.print(table)
    console.print(jobs)
    return None


@app.command()
def verify(run: RunPath) -> None:
    """Hold every finished file of a run to its checksum."""
    from archipel import pipeline

    opened = pipeline.open_run(run)
    folders, problems = pipeline.verify(opened)
    for problem in problems:
        say(f"{problem.path}: {problem.reason}")
    if problems:
        raise ArchipelError(
            f"{len(problems)} of the run's files are not what they were: remove the folders named above and run `archipel run {run}`"
        )
    say(f"{folders} folders verified, all as written")


# --- generating ------------------------------------------------------------------------------------------------------

cli_generate.register(app)


# --- this machine ----------------------------------------------------------------------------------------------------


@app.command()
def doctor() -> None:
    """Versions, devices, cache and disk: what a bug report needs."""
    from archipel import doctor as checks

    failed = False
    for line in checks.examine():
        failed = failed or not line.fine
        print(f"{'ok  ' if line.fine else 'FAIL'} {line.name}: {line.detail}")
    if failed:
        raise ArchipelError("something above needs attention")


@cache_app.command("list")
def cache_list() -> None:
    """What lies in the user's cache folder, and how large it is."""
    from archipel import doctor as checks

    entries = checks.cache_entries()
    for entry in entries:
        print(f"{entry.bytes / 1e6:9.1f} MB  {entry.path}")
    print(f"{sum(e.bytes for e in entries) / 1e6:9.1f} MB  in all, in {checks.cache_folder()}")


@cache_app.command("clean")
def cache_clean(yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False) -> None:
    """Remove what was downloaded; it will be fetched again when needed. Runs are not touched."""
    from archipel import doctor as checks

    entries = checks.cache_entries()
    if not entries:
        print(f"nothing to remove in {checks.cache_folder()}")
        return
    size = sum(entry.bytes for entry in entries) / 1e6
    if not yes and not typer.confirm(f"remove {size:.1f} MB from {checks.cache_folder()}?"):
        return
    checks.clean_cache()
    print(f"removed {size:.1f} MB")


cli_evaluate.register(app)
cli_exchange.register(app)
cli_islands.register(app)
cli_plan.register(app)
cli_serve.register(app)
cli_study.register(app)


# --- entry -----------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 1 a fault of ours, 2 wrong use or input, 130 interrupted with everything kept."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for as long as the process lives
    try:
        code = app(args=arguments, standalone_mode=False)
        if code == EXIT_INTERRUPTED:  # what the library makes of Ctrl-C outside of a stage
            raise KeyboardInterrupt
        flush()
        sys.exit(code if isinstance(code, int) else 0)
    except _USAGE_ERROR as error:
        error.show()  # type: ignore[attr-defined]
        sys.exit(EXIT_WRONG_INPUT)
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except typer.Abort:
        sys.exit(EXIT_INTERRUPTED)
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        text, code = message(error)
        if text:
            say(text)
        if os.environ.get("ARCHIPEL_DEBUG") == "1":
            import traceback

            traceback.print_exc()
        sys.exit(code)


if __name__ == "__main__":
    main()
