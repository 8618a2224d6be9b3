"""The command line of islands: a run in a bucket, the machines that train it, and what its owner lets in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from archipel.edge import parse_duration, say, stop_with_parent
from archipel.errors import ArchipelError

Url = Annotated[
    str, typer.Argument(help="Folder, file://, s3://bucket/prefix, gs:// or az://container/prefix.", show_default=False)
]

# What to do instead, where a stage that works in a folder was given a bucket.
_INSTEAD = {
    "init": "make the run in a folder, prepare and partition it there, then `archipel publish RUN {url}`",
    "prepare": "prepare in the folder of the run's owner, then `archipel publish RUN {url}`",
    "partition": "partition in the folder of the run's owner, then `archipel publish RUN {url}`",
    "train": "for a bucket use `archipel join {url} --only 2`",
    "run": "islands train with `archipel join {url}`; its owner goes on with `archipel pull {url} RUN` and `archipel run RUN`",
    "route": "train the router with `archipel join {url} --only router`, or bring the run here: `archipel pull {url} RUN`",
    "publish": "the run comes first, then the bucket: `archipel publish RUN {url}`",
    "pull": "the bucket comes first, then the folder: `archipel pull {url} RUN`",
}


def run_folder(ctx: typer.Context, value: str) -> Path:
    """A run's folder as it was given. Raises ArchipelError for a bucket, naming the verb that is meant for one.

    The text comes before it is a path: ``Path("s3://bucket")`` is ``s3:/bucket``.
    """
    if ctx.resilient_parsing or not is_bucket(value):
        return Path(value)
    instead = _INSTEAD.get(ctx.info_name or "", "bring it here first: `archipel pull {url} RUN`")
    raise ArchipelError(
        f"{ctx.info_name} works in a run's folder, and {value} is a bucket: {instead.format(url=value)}"
    )


RunFolder = Annotated[
    Path,
    typer.Argument(help="The run's folder.", show_default=False, parser=str, callback=run_folder, metavar="RUN"),
]
RunId = Annotated[str | None, typer.Option("--run-id", help="The id that `publish` printed: any other run is refused.")]

# How a process trains (archipel.training.local); None: as site.toml says, else the first that is named.
Precision = Annotated[str | None, typer.Option(help="Of the matrix products: float32 or bfloat16.", show_default=False)]
MicroBatch = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Clips computed at once; the batch of run.toml is made up of so many (0: all).",
        show_default=False,
    ),
]
Checkpointing = Annotated[
    bool | None,
    typer.Option(
        "--checkpointing/--no-checkpointing",
        help="Compute blocks again on the way back: less memory, more time.",
        show_default=False,
    ),
]
Optimizer = Annotated[
    str | None,
    typer.Option(help="adamw, or adamw8bit, whose moments take a quarter of the memory.", show_default=False),
]
Compile = Annotated[
    bool | None,
    typer.Option("--compile/--no-compile", help="Compile the repeated blocks (torch.compile).", show_default=False),
]
Average = Annotated[
    str | None,
    typer.Option("--ema", help="Where the average of the weights lies: device or host.", show_default=False),
]


def publish(
    run: RunFolder,
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
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1 (default: a GPU where there is one).")] = None,
    precision: Precision = None,
    micro_batch: MicroBatch = None,
    gpus: Annotated[int, typer.Option(min=1, help="Train each job on so many GPUs of this machine.")] = 1,
    checkpointing: Checkpointing = None,
    optimizer: Optimizer = None,
    compile_: Compile = None,
    ema: Average = None,
) -> None:
    """Make this machine an island: take free jobs of a published run until none is left."""
    from archipel.islands.bucket import Bucket
    from archipel.islands.worker import Options
    from archipel.islands.worker import join as work_on
    from archipel.progress import StopFlag
    from archipel.training.local import Local

    stop_with_parent()
    options = Options(
        only=tuple(dict.fromkeys(only or [])),
        seconds=None if for_ is None else parse_duration(for_),
        jobs=jobs,
        name=name,
        work=work,
        sign=_signer(key),
        local=Local(
            device=device,
            precision=precision or "float32",
            micro_batch=micro_batch or 0,
            threads=threads,
            gpus=gpus,
            checkpointing=bool(checkpointing),
            optimizer=optimizer or "adamw",
            compile=bool(compile_),
            ema=ema or "device",
        ),
    )
    with StopFlag(options.seconds) as stop:
        bucket = Bucket.open(url, run_id, give_up=lambda: bool(stop))
        finished = work_on(bucket, options, stop)
    say(f"finished here: {', '.join(finished) or 'nothing'}")


def gc(
    url: Url,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and leave it.")] = False,
    grace: Annotated[str, typer.Option(help="Leave what is younger than this by the store's clock.")] = "1h",
    run_id: RunId = None,
) -> None:
    """The owner's housekeeping: remove attempts that do not count and checkpoints that were overtaken."""
    from archipel.islands import gc as garbage
    from archipel.islands.bucket import Bucket
    from archipel.progress import StopFlag

    bucket = Bucket.open(url, run_id, patience=60.0)
    found = garbage.find(bucket, parse_duration(grace, "--grace"))
    going = [*found.entries, *found.torn]
    for entry in going if dry_run else []:
        print(f"{entry.size:>12} {entry.key}")
    if found.unknown:
        say(f"{len(found.unknown)} keys are not Archipel's and are left: {', '.join(found.unknown[:3])}")
    if not dry_run and going:
        with StopFlag() as stop:
            garbage.collect(bucket, found, stop)
    young = f"; {found.young} more are younger than {grace}" if found.young else ""
    say(f"{'would remove' if dry_run else 'removed'} {len(going)} objects, {found.size / 1e6:.1f} MB{young}")


def is_bucket(text: str) -> bool:
    """Whether this is a published run: a URL, or a folder with the list of its published files."""
    from archipel.islands import keys, urls

    return urls.is_url(text) or (Path(text) / keys.PUBLISHED).is_file()


def _signer(key: Path | None) -> Any:
    if key is None:
        return None
    from archipel.islands.trust import sign

    sign(key, b"")  # a key that cannot be used is told now, not after hours of training
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

    console = Console()
    if not watch:
        console.print(_status_table(status(bucket), console.width))
        return
    with Live(_status_table(status(bucket), console.width), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(2.0)
            live.update(_status_table(status(bucket), console.width), refresh=True)


def _status_table(found: dict[str, Any], width: int) -> Any:
    """A row per job; what matters less is left out where the terminal is narrower than ``width`` 76 and 56."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from archipel.progress import seconds_text

    title = f"run {found['run'][:12]} in {escape(found['url'])}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    right = ("try", "step", "loss", "steps/s", "left", "seen ago")
    hidden = {"try", "loss", "steps/s"} if width < 76 else set()
    hidden |= {"held by", "left"} if width < 56 else set()
    heads = ("job", "state", "held by", *right)
    for head in heads:
        if head not in hidden:
            table.add_column(head, justify="right" if head in right else "left", no_wrap=True)
    for job in found["jobs"]:
        state = "admitted" if job["state"] == "done" and job["admitted"] else job["state"]
        seen, at_work = job["last_seen_s"], job["state"] == "claimed"
        row = (
            job["name"],
            state,
            job["holder"] or "",
            str(job["fence"] or ""),
            f"{job['step']}/{job['steps']}",
            "" if job["loss"] is None else f"{job['loss']:.4f}",
            f"{job['steps_per_s']:.2f}" if at_work and job["steps_per_s"] is not None else "",
            "" if job["left_s"] is None else seconds_text(job["left_s"]),
            "" if seen is None else seconds_text(seen),
        )
        table.add_row(*(cell for head, cell in zip(heads, row, strict=True) if head not in hidden))
    return table


# --- the owner's door ------------------------------------------------------------------------------------------------

TrustFile = Annotated[
    Path | None,
    typer.Option("--trust", help="Your trust.toml (default: RUN/trust.toml, $ARCHIPEL_TRUST, or the user's own)."),
]


def admit(
    url: Annotated[str, typer.Argument(metavar="URL|RUN", help="A published run, or a run's folder.")],
    name: Annotated[str, typer.Argument(metavar="JOB", help="An expert's number, monolith or router.")],
    run_id: RunId = None,
    trust: TrustFile = None,
    reopen: Annotated[
        bool, typer.Option("--reopen", help="After a refusal, let islands take the job again (owners only).")
    ] = False,
    remote: Annotated[
        bool,
        typer.Option("--remote", help="An expert elsewhere, where site.toml says ([remote.2]), by what it answers."),
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Check what was trained, by ten rules, before any ensemble loads it; a refusal names the rule and exits 2."""
    import json

    from archipel.errors import EXIT_WRONG_INPUT
    from archipel.islands.admission import admit as check

    if remote and reopen:
        raise ArchipelError("--reopen is for jobs in buckets, --remote for experts elsewhere: give one of them")
    if remote:
        from archipel.remote.admission import admit as ask

        answer = ask(url, name, run_id=run_id, trust=trust)
    else:
        answer = check(url, name, run_id=run_id, trust=trust, reopen=reopen)
    if json_:
        print(json.dumps(answer.as_dict()))
    elif answer.admitted:
        print(f"job {name} is admitted: {answer.detail}")
    else:
        say(f"job {name} is refused ({answer.rule}): {answer.detail}")
    if not answer.admitted:
        raise typer.Exit(EXIT_WRONG_INPUT)


def keygen(
    file: Annotated[Path, typer.Argument(help="Where the private key goes; it must not exist.", show_default=False)],
) -> None:
    """Make a key pair for signing results: `join --key FILE`. Prints the public key, for the owner's trust.toml."""
    from archipel.islands.trust import keygen as make

    public = make(file)
    say(f"the private key is in {file}: keep it to yourself. The owner of the run puts this into trust.toml:")
    say(f'[[signature.keys]]\nname = "{file.stem}"\nkey = "{public}"')
    print(public)


def policy(
    url: Annotated[str, typer.Argument(help="s3://bucket/prefix or gs://bucket/prefix.", show_default=False)],
    island: Annotated[str, typer.Option("--island", help="The job whose island it is: 2, monolith, router.")],
    json_: Annotated[bool, typer.Option("--json", help="The policy alone, without the comments.")] = False,
) -> None:
    """Print the least rights that an island needs: read the run and its own shard, create under its own job."""
    from archipel.islands.policy import render

    print(render(url, island, bare=json_))


def pull(
    url: Url,
    run: RunFolder,
    run_id: RunId = None,
    admit_: Annotated[
        bool, typer.Option("--admit", help="Check what is committed by the rules of `archipel admit` first.")
    ] = False,
    trust: TrustFile = None,
) -> None:
    """Bring what is admitted into the run's folder (or a new one), where route, generate and evaluate go on."""
    from archipel.islands.admission import admit as check
    from archipel.islands.pull import pull as bring
    from archipel.islands.trust import FILE
    from archipel.progress import StopFlag

    if trust is None and os.path.lexists(run / FILE):  # ``url`` is the bucket, whose own would be a stranger's
        trust = run / FILE

    def door(name: str) -> dict[str, Any]:
        return check(url, name, run_id=run_id, trust=trust).as_dict()

    with StopFlag() as stop:
        done = bring(url, run, stop, run_id=run_id, admit=door if admit_ else None)
    for names, what in ((done.brought, "brought"), (done.kept, "there already"), (done.open, "not done yet")):
        if names:
            say(f"{what}: {', '.join(names)}")
    for note in done.notes:
        say(note)
    if done.waiting:
        say(
            f"committed but not admitted, and left: {', '.join(done.waiting)} (`archipel admit {done.url} {done.waiting[0]}` "
            "checks one; pull --admit all)"
        )
    print(done.run.root)


def register(app: typer.Typer) -> None:
    """Add these verbs to ``archipel``."""
    for verb in (publish, join, admit, pull, policy, gc, keygen):
        app.command()(verb)
