"""The command line of generation: prompts in, clips out."""

from __future__ import annotations

import difflib
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from archipel import box, cli_islands
from archipel.edge import parse_bytes
from archipel.errors import ArchipelError

if TYPE_CHECKING:
    from archipel.ensemble.generated import Generated
    from archipel.ensemble.pipeline import Archipelago
    from archipel.ensemble.safety import Safety

_BATCH = 16  # clips generated at a time
_MOST = 1024  # clips of one command
_MOST_BYTES = 16 << 20  # of a file of prompts


def generate(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN] PROMPT",
            help="The run (a folder, an export, or the URL of a bucket) and the prompt; a prompt alone goes to the model in the box.",
            show_default=False,
        ),
    ] = None,
    run: Annotated[str | None, typer.Option("--run", help="The run's folder, or the URL of a bucket.")] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="MP4, WebP or GIF file, or a folder for PNG frames.")
    ] = Path("clip.mp4"),
    strategy: Annotated[str | None, typer.Option(help="top1, top2, full, threshold, ancestral or monolith.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is off.")] = None,
    steps: Annotated[int | None, typer.Option(help="Solver steps.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same build, same bytes.")] = 0,
    image: Annotated[
        Path | None,
        typer.Option("--image", help="A picture that the clip begins with (runs trained for it).", show_default=False),
    ] = None,
    last_image: Annotated[
        Path | None,
        typer.Option(
            "--last-image", help="A picture that the clip ends with (runs trained for it).", show_default=False
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="A file with a prompt per line, instead of one; - reads them from a pipe."),
    ] = None,
    count: Annotated[
        int, typer.Option(min=1, max=_MOST, help="Clips to make of each prompt, with seeds seed, seed + 1, ...")
    ] = 1,
    grid: Annotated[bool, typer.Option("--grid", help="All clips side by side in one file.")] = False,
    scale: Annotated[int, typer.Option(min=1, max=32, help="Enlarge by this whole factor.")] = 4,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Most memory for networks at a time, such as 2GB: the rest waits on disk.", show_default=False
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(help="On a GPU: most host memory for networks that made room there.", show_default=False),
    ] = None,
    router_every: Annotated[
        int | None, typer.Option(help="Ask the router at every n-th step only.", show_default=False)
    ] = None,
    router_until: Annotated[
        float | None,
        typer.Option(help="Ask about a clip no more once an expert has this probability.", show_default=False),
    ] = None,
    safe: Annotated[
        bool, typer.Option("--safe", help="Refuse prompts of the blocklist, withhold unsafe clips (docs/serving.md).")
    ] = False,
    blocklist: Annotated[
        Path | None,
        typer.Option("--blocklist", help="With --safe: a file of rules, instead of ours.", show_default=False),
    ] = None,
    arms: Annotated[
        bool, typer.Option("--arms", help="Generate the clips that `evaluate` scores instead of one prompt.")
    ] = False,
    run_id: cli_islands.RunId = None,
) -> None:
    """Generate clips from a prompt: archipel generate "a party popper" -o clip.mp4 (or RUN and a prompt)"""
    words = list(words or [])
    if arms:
        given: dict[str, object] = {"--image": image, "--last-image": last_image, "--prompts": prompts}
        given |= {"--memory": memory, "--host": host, "--safe": safe or None, "--blocklist": blocklist}
        return _arms(words, run, [name for name, value in given.items() if value is not None])
    where, texts = (_run_of(words, run), _read(prompts)) if prompts else _run_and_prompt(words, run)
    clips = len(texts) * count
    if clips > _MOST:
        raise ArchipelError(f"{len(texts)} prompts, {count} clips each, are {clips}: one command makes at most {_MOST}")
    if host is not None and memory is None:
        raise ArchipelError("--host is for what --memory has no room for: give both")
    bounds = (None if memory is None else parse_bytes(memory), 0 if host is None else parse_bytes(host, "--host"))
    safety = safety_of(safe, blocklist)
    from archipel.ensemble.video import check_name

    check_name(output)  # before minutes of sampling, not after
    archipelago = _open(where, bounds, run_id)
    settings = {"strategy": strategy, "guidance": guidance, "steps": steps}
    settings |= {"router_every": router_every, "router_until": router_until}
    from archipel.progress import Progress

    with Progress("generate", clips * (steps or archipelago.config.sample.steps)) as bar:
        made = archipelago.batches(
            texts,
            settings,
            seed,
            count,
            _BATCH,
            image=image,
            last_image=last_image,
            on_step=lambda i, n, x, t: bar.advance(len(x)),
            safe=safety,
        )
        withheld: list[str] = []
        made = _noting(made, withheld)
        written = _write_grid(output, [*made], scale) if grid else _write(output, made, clips, scale)
        paths = [*written]
    for path in paths:
        print(path)
    if withheld:
        raise ArchipelError("; ".join(withheld))
    return None


def safety_of(safe: bool, blocklist: Path | None, threshold: float | None = None) -> Safety | None:
    """What --safe and --blocklist ask for. Raises ArchipelError where a part is missing."""
    if not safe:
        if blocklist is not None or threshold is not None:
            raise ArchipelError("--blocklist and --safe-threshold are for --safe: give it as well")
        return None
    from archipel.ensemble import safety

    return safety.Safety.open(blocklist, safety.THRESHOLD if threshold is None else threshold)


def _noting(made: Iterator[Generated], withheld: list[str]) -> Iterator[Generated]:
    for one in made:
        withheld += [one.withheld()] * bool(one.blocked)
        yield one


def _open(where: str, bounds: tuple[int | None, int], run_id: str | None) -> Archipelago:
    from archipel.ensemble.parts import EXPORTED
    from archipel.ensemble.pipeline import Archipelago
    from archipel.training.machine import pick_device

    shipped = box.is_address(where)
    if not shipped and not cli_islands.is_bucket(where) and not (Path(where) / EXPORTED).is_file():
        from archipel import pipeline

        pipeline.open_run(where)  # refuses a run.toml that was edited after work began
    return Archipelago.load(where, device=pick_device(None), run_id=run_id, memory=bounds[0], host=bounds[1])


def _write(output: Path, made: Iterator[Generated], clips: int, scale: int) -> Iterator[Path]:
    """Clips as they are finished: what was made is there also where a later one fails."""
    from archipel.ensemble import video

    names = iter(video.names_of(output, clips))
    for one in made:
        for row, (clip, note) in enumerate(zip(one.clips, one.notes, strict=True)):
            name = next(names)
            if row not in one.blocked:
                yield video.write(name, clip, one.fps, scale=scale, note=note)


def _write_grid(output: Path, made: list[Generated], scale: int) -> Iterator[Path]:
    from archipel.ensemble import video
    from archipel.ensemble.generated import Generated

    whole = Generated.join(made)
    yield video.write(output, video.grid(whole.clips), whole.fps, scale=scale, note=whole.note(whole.seeds))


def _read(path: Path) -> list[str]:
    """Prompts of a file, one a line; empty lines are left out. Raises ArchipelError."""
    if str(path) == "-":
        data = sys.stdin.buffer.read(_MOST_BYTES + 1)
    else:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ArchipelError(f"{path} has more than {_MOST_BYTES >> 20} MB: give a text file with a prompt per line")
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ArchipelError(f"{path} is not a text in UTF-8: give a file with a prompt per line") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ArchipelError(f"{path} holds no prompt: give a text file with a prompt per line")
    return found


def _arms(words: list[str], run: str | None, given: list[str]) -> None:
    from archipel import pipeline

    if "--image" in given or "--last-image" in given:
        raise ArchipelError("--arms takes its frames from the clips of the run: leave --image and --last-image out")
    if given:
        raise ArchipelError(f"--arms makes the clips that `evaluate` scores: leave {given[0]} out")
    where = _only_run(words, run, "--arms")
    if cli_islands.is_bucket(where):
        raise ArchipelError(
            f"--arms works in a run's folder, and {where} is a bucket: bring it here first: `archipel pull {where} RUN`"
        )
    pipeline.generate(pipeline.open_run(where))


def _run_of(words: list[str], run: str | None) -> str:
    """The run of a file of prompts: what is named, else the model in the box."""
    return box.ADDRESS if run is None and not words else _only_run(words, run, "--prompts FILE")


def _only_run(words: list[str], run: str | None, option: str) -> str:
    if run is not None and not words:
        return run
    if run is None and len(words) == 1:
        return words[0]
    raise ArchipelError(f"{option.split()[0]} takes a run and no prompt: archipel generate RUN {option}")


def _run_and_prompt(words: list[str], run: str | None) -> tuple[str, list[str]]:
    if run is not None:
        if len(words) != 1:
            raise ArchipelError('with --run give exactly one prompt: archipel generate --run RUN "a red ball bounces"')
        return run, words
    if len(words) == 2:
        return words[0], words[1:]
    if len(words) == 1:
        _check_is_prompt(words[0])
        return box.ADDRESS, words
    raise ArchipelError('give a prompt (in quotes), or a run and a prompt: archipel generate RUN "a red ball bounces"')


def _check_is_prompt(word: str) -> None:
    """Refuse what is more likely the run of somebody who forgot the prompt, or mistyped it: a sentence is cheap to say again, a
    clip of the wrong model is not noticed. ``archipel generate box: "..."`` takes any prompt."""
    if "://" in word or box.is_address(word) or Path(word).is_dir():
        kind = "URL" if "://" in word else "folder" if Path(word).is_dir() else "model"
        raise ArchipelError(
            f'{word!r} is a {kind}: is it the run? Then a prompt is missing: archipel generate {word} "a red ball bounces"'
        )
    anyway = f"if it is the prompt: archipel generate {box.ADDRESS} {shlex.quote(word)}"
    path = Path(word)
    bare = not any(letter.isspace() for letter in word)
    if path.is_file() or word.startswith(("/", "./", "../", "~")) or ("/" in word and (bare or path.parent.is_dir())):
        raise ArchipelError(f"{word!r} looks like a path, and there is no run at it; {anyway}")
    runs = [found.parent.name for found in Path().glob("*/run.toml")] if bare else []
    if near := difflib.get_close_matches(word, runs, 1, 0.8):
        raise ArchipelError(
            f"{word!r} is nearly the name of the run {near[0]} here, and no prompt is given with it; {anyway}"
        )
    if not box.names():
        raise ArchipelError(
            f"{word[:40]!r} was read as the prompt, but which run shall generate it? This installation has no model of its own: "
            f'archipel generate RUN "{word[:40]}"'
        )


def register(app: Any) -> None:
    """Add the verb to the command line."""
    app.command()(generate)
