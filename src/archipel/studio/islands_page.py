"""The islands at work: a row per job, loss curves, and whether the store answers; looked at again every few seconds.

Annotations of functions that gradio calls are looked at while it runs, so they are not postponed here.
"""

import time
from html import escape
from typing import Any

from archipel.progress import seconds_text
from archipel.report.svg import Series, line_chart, number
from archipel.report.training import thin
from archipel.run import ROUTER
from archipel.studio.context import StudioContext
from archipel.studio.islands_facts import EVERY, Job, Look, Watch
from archipel.studio.partition_page import folder_of, is_bucket

STATES = {
    "free": "waiting for an island",
    "working": "at work",
    "silent": "not heard of for a lease: free to be taken over",
    "stopped": "stopped; the next start goes on there",
    "failed": "failed; its log says why",
    "done": "done",
    "admitted": "done and admitted",
    "refused": "refused by the owner",
}
_SHORT = {
    "free": "waiting",
    "working": "at work",
    "silent": "silent",
    "stopped": "stopped",
    "failed": "failed",
    "done": "done",
    "admitted": "admitted",
    "refused": "refused",
}


def build(context: StudioContext) -> None:
    """Components inside an open tab. Nothing is asked while the tab is not open."""
    import gradio as gr
    from gradio.context import Context

    from archipel.studio.widgets import QUIET, markup, plain

    watch = watch_of(context)
    if watch is None:
        words = "An export knows nothing of the islands that made it: open its run's folder or its bucket to see them."
        markup(f'<p class="notice plain">{words}</p>', elem_id="islands")
        return
    table = markup('<p class="quiet">Looking …</p>', elem_id="islands")
    curves = markup("", elem_id="island-curves")
    timer = gr.Timer(EVERY, active=False)
    seen = gr.State("")  # of the curves: what has not changed is not sent again, and does not flicker

    def look(before: str) -> list[Any]:
        found = watch.look()
        drawn = plain(charts(found))
        return [plain(html(found)), gr.skip() if drawn == before else drawn, drawn]

    def begin(before: str) -> list[Any]:
        return [*look(before), gr.Timer(active=True)]

    tab: Any = Context.block
    tab.select(begin, seen, [table, curves, seen, timer], **QUIET)
    timer.tick(look, seen, [table, curves, seen], **QUIET)


def watch_of(context: StudioContext) -> Watch | None:
    """What is looked at: the store that was named, a bucket, or the run's folder; None for an export."""
    bucket = is_bucket(context.where)
    store, run = context.store or (context.where if bucket else None), None if bucket else folder_of(context)
    if store is None and run is None:
        return None
    return Watch(run, store, context.parts.run_id)


# --- drawing -------------------------------------------------------------------------------------------------------------


def html(look: Look, now: float | None = None) -> str:
    """The table, and what is wrong with the store; every text that is not ours is escaped."""
    parts = []
    if look.away:
        parts.append(_away(look, time.time() if now is None else now))
    if look.jobs:
        counted = {state: sum(job.state == state for job in look.jobs) for state in STATES}
        said = ", ".join(f"{count} {_SHORT[state]}" for state, count in counted.items() if count)
        parts.append(f'<p class="lead">{len(look.jobs)} jobs: {said}.</p>')
        parts.append(_table(look))
    elif not look.away:
        parts.append('<p class="quiet">Asking the store …</p>')
    return f'<section class="islands{" stale" if look.away and look.jobs else ""}">{"".join(parts)}</section>'


def _away(look: Look, now: float) -> str:
    since = look.since or now
    clock = time.strftime("%H:%M:%S", time.localtime(since))
    old = f" Below is what was seen {seconds_text(now - look.told)} ago." if look.told is not None and look.jobs else ""
    return (
        f'<p class="notice wrong" role="alert">The store cannot be reached since {clock}, for {seconds_text(now - since)}: '
        f"{escape(look.away)}. It is asked again every few seconds.{old}</p>"
    )


def _table(look: Look) -> str:
    rows = "".join(_row(job, held=look.source == "store") for job in look.jobs)
    holder = '<th scope="col">held by</th>' if look.source == "store" else ""
    return (
        f'<table class="jobs"><thead><tr><th scope="col">job</th><th scope="col">state</th>{holder}'
        '<th scope="col" class="number">attempt</th><th scope="col">steps</th><th scope="col" class="number">loss</th>'
        '<th scope="col" class="number">time left</th><th scope="col" class="number">last sign of life</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def _row(job: Job, held: bool) -> str:
    share = 100 * job.step / job.steps if job.steps else 0.0
    label, state = escape(job.label), escape(_SHORT.get(job.state, job.state))
    speed = f" · {number(job.speed)} a second" if job.speed else ""
    meter = (
        f'<span class="meter" role="progressbar" aria-label="{label}" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{share:.0f}"><i class="{job.tone}" style="width:{share:.1f}%"></i></span>'
    )
    cells = [
        f'<th scope="row"><i class="key {job.tone}" aria-hidden="true"></i>{label}</th>',
        f'<td><span class="state {escape(job.state)}" title="{escape(STATES.get(job.state, ""))}">{state}</span></td>',
        f'<td class="{"" if job.holder else "none"}" data-label="held by">{escape(job.holder or "–")}</td>'
        if held
        else "",
        _number("attempt", str(job.attempt) if job.attempt else None),
        f'<td class="steps">{meter}<span class="quiet">{job.step:,} of {job.steps:,}{speed}</span></td>',
        _number("loss", None if job.loss is None else number(job.loss)),
        _number("time left", None if job.left is None else seconds_text(job.left)),
        _number("last sign of life", None if job.seen is None else f"{seconds_text(job.seen)} ago"),
    ]
    return f'<tr class="{escape(job.state)}">{"".join(cells)}</tr>'


def _number(name: str, value: str | None) -> str:
    return f'<td class="number{"" if value else " none"}" data-label="{name}">{escape(value or "–")}</td>'


def charts(look: Look) -> str:
    """Loss curves as in the report: training and held-out losses of experts and monolith, and the router's own."""
    tones = {job.name: (job.label, job.tone) for job in look.jobs}
    train, held, router = [], [], []
    for curve in look.curves:
        label, css = tones.get(curve.name, (curve.name, "t7"))
        if curve.name == ROUTER:
            router += _series([("training", curve.train, "t0"), ("held out", curve.validation, "t1")])
            continue
        train += _series([(label, curve.train, css)])
        held += _series([(label, curve.validation, css)])
    losses = [y for one in train for y in one.y if y > 0]
    wide = bool(losses) and max(losses) > 4 * min(losses)
    drawn = [
        ("Training loss", line_chart(train, "Training loss against steps", "steps", "training loss", log_y=wide)),
        ("Held-out loss", line_chart(held, "Loss on held-out clips against steps", "steps", "held-out loss")),
        ("Router", line_chart(router, "The router's loss against steps", "steps", "router's loss")),
    ]
    figures = "".join(f"<figure><h3>{title}</h3>{chart}</figure>" for title, chart in drawn if chart)
    if not figures:
        return '<p class="quiet">No losses yet: they are drawn here as soon as an island tells of its first steps.</p>'
    return f'<div class="charts">{figures}</div>'


def _series(rows: list[tuple[str, tuple[tuple[float, float], ...], str]]) -> list[Series]:
    made = []
    for label, points, css in rows:
        if points:
            x, y = thin([step for step, _ in points], [loss for _, loss in points])
            made.append(Series(label, x, y, css, dots=len(points) <= 30))
    return made
