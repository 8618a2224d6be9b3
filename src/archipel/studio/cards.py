"""Jobs as HTML: a clip with its settings and weights, progress, refusals. Everything that people typed is escaped here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from archipel.report.svg import cells, tone
from archipel.serving.jobs import COMPLETED, FAILED, Job
from archipel.studio.desk import Shot

_WIDTH, _HEIGHT = 480.0, 72.0  # of the drawing of the weights
NAMES = {
    "full": "Full: all experts, weighted",
    "threshold": "Threshold: all likely experts",
    "ancestral": "Ancestral: one expert, drawn once",
    "monolith": "Monolith: one big network",
    "uniform": "Uniform: equal shares",
    "random": "Random: one expert, drawn blindly",
}


def title(strategy: str, long: bool = False) -> str:
    """A strategy for people: ``top2`` -> Top-2, ``expert-0`` -> Expert 0."""
    if strategy.startswith("expert-"):
        return f"Expert {strategy[7:]}{', alone' if long else ''}"
    if strategy.startswith("top"):
        count = strategy[3:]
        which = "the likeliest expert" if count == "1" else f"the {count} likeliest experts"
        return f"Top-{count}{f': {which}' if long else ''}"
    name = NAMES.get(strategy, strategy.capitalize())
    return name if long else name.partition(":")[0]


def duration(seconds: float) -> str:
    """12.3 -> 12 s; 75 -> 1 min 15 s; 4000 -> 1 h 7 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes = whole // 60
    return f"{minutes} min {whole % 60} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def notice(text: str, kind: str = "wrong") -> str:
    """A sentence that a screen reader says at once; ``kind``: wrong or plain."""
    role = "alert" if kind == "wrong" else "status"
    return f'<div class="notice {kind}" role="{role}">{escape(text[:1].upper() + text[1:])}</div>'


def empty(text: str) -> str:
    return f'<div class="nothing-yet"><span class="still" aria-hidden="true"></span><p>{escape(text)}</p></div>'


def settings(job: Job, who: bool = True) -> str:
    """How a clip is or was made, as chips."""
    said = job.settings
    chips = [
        *([title(said["strategy"])] if who else []),
        f"guidance {said['guidance']:g}",
        f"{said['steps']} {'step' if said['steps'] == 1 else 'steps'}",
        f"seed {job.seed}",
    ]
    return f'<ul class="chips">{"".join(f"<li>{escape(chip)}</li>" for chip in chips)}</ul>'


def video(job: Job, side: int) -> str:
    """The clip itself, from the HTTP interface's own route, in a loop."""
    source = f"/v1/videos/{job.id}/content"
    return (
        f'<video src="{source}" width="{side}" height="{side}" autoplay loop muted playsinline controls '
        f'aria-label="{escape(job.prompt[:200], quote=True)}"></video>'
    )


def download(job: Job) -> str:
    return f'<a class="download" href="/v1/videos/{job.id}/content" download>Download MP4</a>'


def weights(trace: Mapping[str, Any] | None, strategy: str) -> str:
    """The experts' shares over the steps, noise on the left: stacked bands in the report's colours, with a legend.

    '' where nothing was kept; a sentence for the monolith.
    """
    rows = (trace or {}).get("weights")
    if strategy == "monolith":
        return '<p class="quiet">One network made this clip: there is nothing to route.</p>'
    if not rows or not rows[0]:
        return ""
    k, bands = len(rows[0]), cells(rows, _WIDTH, _HEIGHT, least=0.3)
    means = [sum(row[number] for row in rows) / len(rows) for number in range(k)]
    said = "; ".join(f"expert {number}: {mean:.0%} on average" for number, mean in enumerate(means) if mean >= 0.005)
    label = escape(f"Shares of the experts over {len(rows)} steps. {said}")
    legend = "".join(
        f'<li><i class="key {tone(number)}"></i><span>Expert {number} <b>{mean:.0%}</b></span></li>'
        for number, mean in enumerate(means)
        if mean >= 0.005
    )
    return (
        f'<figure class="weights"><svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" preserveAspectRatio="none" '
        f'shape-rendering="crispEdges" role="img" aria-label="{label}">{"".join(bands)}</svg>'
        f'<figcaption><span class="ends"><span>noise</span><span>clip</span></span><ul class="legend">{legend}</ul>'
        "</figcaption></figure>"
    )


def cost(trace: Mapping[str, Any] | None) -> str:
    """What a clip took, as one line; '' where it was not kept."""
    if not trace:
        return ""
    seconds, batch = float(trace["seconds"]), int(trace["batch"])
    shared = f" for {batch} clips together" if batch > 1 else ""
    return f"{trace['expert_calls']:g} expert calls · {duration(seconds)}{shared}"


def progress(shot: Shot) -> str:
    """A bar with what is known: percent and time left, or how many wait before."""
    if shot.job.started is None:
        said = "Waiting: next in line" if not shot.ahead else f"Waiting: about {shot.ahead} before this one"
    elif shot.left is None:
        said = "Starting"
    else:
        said = f"{shot.progress} % · {duration(shot.left)} left" if shot.left >= 0.5 else "Writing the file"
    bar = f'<div class="bar" role="progressbar" aria-valuemin="0" aria-valuemax="100" aria-valuenow="{shot.progress}">'
    return (
        f'<div class="making"><div class="frame"><span class="noise" aria-hidden="true"></span></div>{bar}'
        f'<i style="width:{shot.progress}%"></i></div><p role="status">{said}</p></div>'
    )


def clip(shot: Shot, side: int, *, alone: bool = True) -> str:
    """A whole card: clip (or progress, or what went wrong), prompt, weights, settings; beside others it has its strategy as its
    head, and what all have in common is left out."""
    job = shot.job
    parts = [] if alone else [f"<h3>{escape(title(job.settings['strategy']))}</h3>"]
    if job.status == COMPLETED:
        parts.append(f'<div class="frame">{video(job, side)}</div>')
    elif job.status == FAILED:
        parts.append(notice(job.error_message or "the clip could not be made"))
    else:
        parts.append(progress(shot))
    if alone:
        parts.append(f'<p class="prompt">{escape(job.prompt).replace(chr(10), "<br>")}</p>')
    if job.status == COMPLETED:
        parts.append(weights(shot.trace, job.settings["strategy"]))
    if alone:
        parts.append(settings(job))
    if job.status == COMPLETED:
        parts.append(f'<div class="under"><span class="quiet">{cost(shot.trace)}</span>{download(job)}</div>')
    return f'<article class="card clip-card">{"".join(parts)}</article>'


def side_by_side(shots: Sequence[Shot], side: int) -> str:
    """Several clips of one noise, each under its strategy's name, and what each cost beside the dearest."""
    cards = "".join(clip(shot, side, alone=False) for shot in shots)
    first = shots[0].job
    return (
        f'<div class="compared"><p class="prompt">{escape(first.prompt)}</p><p class="quiet">All from the same noise.</p>'
        f'{settings(first, who=False)}<div class="row-of-clips">{cards}</div>{costs(shots)}</div>'
    )


def costs(shots: Sequence[Shot]) -> str:
    """A table of what each clip cost, once two are there."""
    done = [shot for shot in shots if shot.trace]
    if len(done) < 2:
        return ""
    most = max(float(shot.trace["expert_calls"]) for shot in done if shot.trace) or 1.0
    rows = []
    for shot in done:
        trace = shot.trace or {}
        calls, seconds = float(trace["expert_calls"]), float(trace["seconds"]) / max(int(trace["batch"]), 1)
        rows.append(
            f'<tr><th scope="row">{escape(title(shot.job.settings["strategy"]))}</th>'
            f'<td>{calls:g}<i class="meter" style="width:{100 * calls / most:.0f}%"></i></td>'
            f"<td>{float(trace['router_calls']):g}</td><td>{duration(seconds)}</td></tr>"
        )
    return (
        '<table class="costs"><thead><tr><th scope="col">What it cost</th><th scope="col">expert calls</th>'
        f'<th scope="col">router calls</th><th scope="col">time per clip</th></tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )
