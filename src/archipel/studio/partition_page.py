"""What each island knows: its clips at a glance, their captions, how many there are, and how well its expert learned them.

Annotations of functions that gradio calls are looked at while it runs, so they are not postponed here.
"""

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archipel.errors import ArchipelError
from archipel.progress import seconds_text
from archipel.report.svg import number
from archipel.studio import partition_facts
from archipel.studio.context import StudioContext
from archipel.studio.partition_facts import Cluster, Expert, Partition

if TYPE_CHECKING:
    from archipel.islands.bucket import Bucket
    from archipel.run import Run


def build(context: StudioContext) -> None:
    """Components inside an open tab."""
    from gradio.context import Context

    from archipel.studio.widgets import QUIET, markup, plain

    gather = gatherer(context)
    shown = markup('<p class="quiet">Reading the partition …</p>', elem_id="partition")

    def look() -> str:
        return plain(html(gather()))

    tab: Any = Context.block
    tab.select(look, None, shown, **QUIET)


def gatherer(context: StudioContext) -> Callable[[], Partition]:
    """A function that looks at what there is now: a bucket, a run's folder (or the model in the box), or an export."""
    where = context.where
    if is_bucket(where):
        return _of_bucket(context)
    run = folder_of(context)
    if run is not None:
        return lambda: partition_facts.of_run(run, clips=context.show_clips)
    return lambda: partition_facts.of_export(Path(where), context.config)


def is_bucket(where: str) -> bool:
    return "://" in where or (Path(where) / "published.json").is_file()


def folder_of(context: StudioContext) -> "Run | None":
    """The folder whose files tell of the run: its own, or what a packed model has of it; None for an export."""
    if context.run is None and (Path(context.where) / "run.toml").is_file():
        return context.parts.run
    return context.run


def _of_bucket(context: StudioContext) -> Callable[[], Partition]:
    held: list[Bucket] = []

    def ask() -> Partition:
        from archipel.islands.bucket import Bucket
        from archipel.islands.objects import Objects

        try:
            if not held:
                objects = Objects.open(context.where, patience=4.0, timeout=10.0)
                held.append(Bucket.read(objects, context.parts.run_id))
            return partition_facts.of_bucket(held[0])
        except (ArchipelError, OSError):
            part = context.config.partition
            words = "The store cannot be reached now, or is damaged: open this page again later."
            return Partition((), part.method, part.features, missing=(words,))

    return ask


# --- drawing -------------------------------------------------------------------------------------------------------------


def html(found: Partition) -> str:
    """The page's content; every text that is not ours is escaped."""
    k = len(found.clusters)
    how = f"{escape(found.method)} on {escape(found.features)} features"
    parts = [f'<p class="lead">{k} islands, each with a cluster of its own: {how}.</p>'] if k else []
    parts += [f'<p class="notice plain" role="status">{_sentence(text)}</p>' for text in found.missing]
    parts.append(_shares(found.clusters))
    cards = [_cluster(one) for one in found.clusters]
    if found.monolith is not None and k:
        cards.append(
            '<article class="card cluster"><h3><i class="key mono" aria-hidden="true"></i>Monolith</h3>'
            f'<p class="quiet">One network trained on all clusters, to compare with.</p>{_numbers(found.monolith)}</article>'
        )
    parts.append(f'<div class="clusters">{"".join(cards)}</div>')
    if found.facts:
        rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in found.facts)
        parts.append(
            f'<details class="measures"><summary>Measures of the split</summary><dl class="pairs">{rows}</dl></details>'
        )
    return f'<section class="partition">{"".join(parts)}</section>'


def _sentence(text: str) -> str:
    """Escaped; what stands between backticks as code."""
    pieces = escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if place % 2 else piece for place, piece in enumerate(pieces))


def _shares(clusters: tuple[Cluster, ...]) -> str:
    """One bar of all training clips, a stretch per cluster."""
    if not clusters or any(one.share is None for one in clusters):
        return ""
    cells = "".join(
        f'<i class="{one.tone}" style="width:{100 * (one.share or 0):.2f}%" title="Cluster {escape(one.name)}: {one.share:.0%}"></i>'
        for one in clusters
    )
    label = ", ".join(f"cluster {one.name} {one.share:.0%}" for one in clusters)
    return f'<div class="shares" role="img" aria-label="Shares of the training clips: {escape(label)}">{cells}</div>'


def _cluster(one: Cluster) -> str:
    total = one.clips.get("train")
    share = f" · {one.share:.0%}" if one.share is not None else ""
    size = f"{total:,} training clips{share}" if total is not None else "size not known here"
    held = [f"{one.clips[split]:,} {split}" for split in ("validation", "test") if split in one.clips]
    parts = [
        f'<h3><i class="key {one.tone}" aria-hidden="true"></i>Island {escape(one.name)}</h3>',
        f'<p class="quiet">{size}{"; held out: " + ", ".join(held) if held else ""}</p>',
    ]
    if one.sheet:
        width, height = one.size
        parts.append(
            f'<img src="{escape(one.sheet)}" width="{width}" height="{height}" loading="lazy" '
            f'alt="First and middle frames of the training clips nearest to the middle of cluster {escape(one.name)}">'
        )
    if one.captions:
        items = "".join(f"<li>{escape(text)}</li>" for text in one.captions)
        parts.append(f'<h4>Typical captions</h4><ul class="captions">{items}</ul>')
    parts.append(f"<h4>Its expert</h4>{_numbers(one.expert)}")
    return f'<article class="card cluster">{"".join(parts)}</article>'


def _numbers(one: Expert) -> str:
    rows = [("state", escape(one.state))]
    if one.steps is not None:
        rows.append(("steps", f"{one.steps:,}"))
    if one.loss is not None:
        rows.append(("held-out loss", number(one.loss)))
    if one.parameters is not None:
        rows.append(("parameters", number(one.parameters)))
    if one.seconds is not None:
        rows.append(("training time", seconds_text(one.seconds)))
    return f'<dl class="pairs">{"".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in rows)}</dl>'
