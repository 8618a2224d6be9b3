"""A folder of clips from anywhere, held against a run's test clips: the run's window, extractors, PCA and rules.

Rows look like those of ``scores/<split>.json``, but their protocols name the folder's clips instead of the prompts that
arms share, so that ``require_same`` refuses to compare them with arms that were made from other captions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from archipel import store
from archipel.cache import open_kind
from archipel.data.base import Item, Window, printable
from archipel.data.folder import Folder, find_table, find_videos
from archipel.errors import ArchipelError, DamagedError
from archipel.evaluation import distances, folders, intervals, measure, probe, sides, verdicts
from archipel.evaluation.folders import ClipSet
from archipel.evaluation.inputs import (
    EXTRACTORS,
    REAL,
    Arm,
    Extract,
    Inputs,
    default_extract,
    probe_extractors,
    real_identity,
    reference_rows,
)
from archipel.evaluation.intervals import FEW_GROUPS, Interval
from archipel.evaluation.measure import Frame, Score
from archipel.manifest import read_manifest, rows_of
from archipel.partition.kmeans import one_thread
from archipel.progress import StopFlag
from archipel.run import Run

if TYPE_CHECKING:
    from rich.table import Table

Embed = Callable[[list[str]], np.ndarray]
FOLDER = "FOLDER_OF_CLIPS"


@dataclass(frozen=True)
class Against:
    """path: the file that was written; rows: its content; notes: sentences that belong under the table."""

    path: Path
    rows: list[dict[str, Any]]
    notes: list[str]


def against(
    run: Run,
    folder: Path,
    stop: StopFlag | None = None,
    *,
    max_rejected: float = folders.MAX_REJECTED,
    extract: Extract = default_extract,
    embed: Embed | None = None,
) -> Against:
    """Score a folder of clips against the clips of ``evaluate.split`` -> ``scores/against-<folder>-<hash8>.json``.

    Captions (and groups) are read as the folder source reads them, where there are any; with a caption for every clip the
    text-video probe is scored too. Raises MissingStageError before *prepare* has finished, ArchipelError for folders that
    are missing, empty or hold too many clips that cannot be used, Stopped.
    """
    root = folders.folder_of_clips(folder, FOLDER)
    items, notes = items_with_captions(root)
    data = _read_run(run)
    window = replace(Window.from_config(run.config.clips), phases=1)
    config = run.config.evaluate

    def features(clips: np.ndarray, _: Sequence[str]) -> dict[str, np.ndarray]:
        return {name: np.asarray(table) for name, table in extract(EXTRACTORS, clips, config).items()}

    clips = folders.read_folder(root, root.name, items, window, features, max_rejected=max_rejected, stop=stop)
    if len(clips) < 2:
        raise ArchipelError(f"{root} gives {len(clips)} clip: a distance between sets needs at least 2")
    frame, arm = _frame(run, data, clips, window)
    facts: dict[str, Any] = {"left_out": [], "pca": {}}
    with one_thread():
        found = list(_scores(frame, arm, clips, facts, embed))
    rows = [score.row() for score in found]
    notes += _notes(frame, clips, facts)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", printable(root.name)).strip("-.") or "folder"
    path = run.scores(f"against-{name}-{frame.inputs.prompts.rpartition(' ')[2][:8]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    extra = {
        "folder": clips.facts(window),
        "run": run.id,
        "pca": facts["pca"],
        "probe": facts.get("probe"),
        "notes": notes,
    }
    store.write_json(path.with_name(f"{path.stem}.extra.json"), extra)
    store.write_json(path, rows)
    return Against(path, rows, notes)


def items_with_captions(root: Path) -> tuple[list[Item], list[str]]:
    """The clips of a folder, with captions from its table or sidecars where it has any, and what to say about that."""
    if find_table(root) is not None:
        items = Folder(str(root)).items()
        named = {item.key for item in items}
        others = [path for path in find_videos(root) if printable(path.as_posix()) not in named]
        if not others:
            return items, []
        return items, [f"{len(others)} clips of {root.name} are not in its table, and were left out"]
    items = folders.items_of(root)
    if not any((root / item.key).with_suffix(".txt").exists() for item in items):
        return items, []
    captions = {item.key: item for item in Folder(str(root)).items()}
    found = [captions.get(item.group, item) for item in items]
    bare = [replace(item, error=None) if (item.error or "").startswith("no caption") else item for item in found]
    return bare, []


# --- what is compared ------------------------------------------------------------------------------------------------


def _read_run(run: Run) -> Inputs:
    """The run's real clips as an evaluation's inputs without arms."""
    split = run.config.evaluate.split
    run.need(run.clips, "prepare")
    clips = read_manifest(run.manifest)
    entry = open_kind(run.cache, "features")
    features = {name: entry[name] for name in EXTRACTORS}
    text = open_kind(run.cache, "text")["pooled"]
    for name, table in {**features, "text": text}.items():
        if len(table) != len(clips):
            raise DamagedError(
                f"the cached {name} has {len(table)} rows, {run.manifest} has {len(clips)}: run `archipel prepare` again"
            )
    none = np.empty(0, np.int64)
    if len(rows_of(clips, split)) < 2:
        raise ArchipelError(f"the {split} split of {run.root} has fewer than 2 clips: there is nothing to compare with")
    reference = reference_rows(clips, split, none, run.config.clips_seed)
    train = np.array(rows_of(clips, "train"), np.int64)
    identity = real_identity(run, clips, reference)
    return Inputs(run, split, clips, {}, none, [], "", identity, reference, train, features, text, {}, [])


def _frame(run: Run, data: Inputs, clips: ClipSet, window: Window) -> tuple[Frame, str]:
    """The folder as the only arm of an evaluation.

    A clip whose caption is that of a real clip of the split belongs to that clip's content group, as generated clips do;
    every other clip has the group that its table gives it, or is its own.
    """
    known = {clip.caption: clip.group for clip in data.clips if clip.split == data.split}
    names = [known.get(item.caption or "") or f"folder: {item.group}" for item in clips.items]
    (group, reference), count = intervals.number_groups(names, data.groups(data.reference))
    captions = [item.caption or "" for item in clips.items]
    content = sorted(zip(clips.sha256, captions, names, strict=True))
    digest = store.sha256_json({"clips": content, "window": window.spec()})
    arm = f"folder {clips.root.name}"
    inputs = replace(
        data,
        rows=np.full(len(clips), -1),  # no row of the manifest: these clips are strangers
        captions=captions,
        prompts=f"clips of a folder, {digest}",
        arms={arm: Arm(arm, np.empty(0, np.uint8), clips.features)},
    )
    unit, plan = _units(group, count, run.config.run.seed)
    n = min(len(clips), len(data.reference))
    order = np.random.Generator(np.random.PCG64([run.config.run.seed, len(clips)])).permutation(len(clips))
    passes = [np.sort(order[begin : begin + n]) for begin in range(0, len(clips) - n + 1, n)]
    return Frame(inputs, group, reference, count, passes, unit, plan), arm


def _units(group: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, distances.HalfPlan | None]:
    """The Frechet unit of each content group (count,), and halves of the units (None below 4 units).

    Groups of the folder and of the reference are dealt out one after the other, so that every half has its share of both.
    """
    own = np.unique(group)
    rest = np.setdiff1d(np.arange(count), own)
    most = min(sides.UNITS, len(own))
    unit = np.empty(count, np.int64)
    unit[own], unit[rest] = (intervals.pack_units(len(part), most, seed) for part in (own, rest))
    return unit, distances.HalfPlan.make(most, sides.HALVINGS, seed) if most >= 4 else None


# --- scores ----------------------------------------------------------------------------------------------------------


def _scores(frame: Frame, arm: str, clips: ClipSet, facts: dict[str, Any], embed: Embed | None) -> Iterator[Score]:
    for extractor in EXTRACTORS:
        yield from measure.kid_scores(frame, extractor, facts)
        yield from _frechet(frame, arm, extractor, facts)
    real = np.array([frame.inputs.clips[row].motion for row in frame.inputs.reference])
    for name, values, group in ((arm, clips.motion, frame.group), (REAL, real, frame.reference_group)):
        said = frame.protocol("mean absolute difference of consecutive frames, 0 to 1", n=len(values))
        value = intervals.mean_interval(values, group)
        yield Score(name, "motion", value, len(values), len(np.unique(group)), said)
    if len(frame.inputs.train):
        yield from measure.copying_scores(frame, verdicts.crossing(frame.inputs.run.config)["primary_extractor"])
    yield from _probe(frame, arm, facts, embed)


def _frechet(frame: Frame, arm: str, extractor: str, facts: dict[str, Any]) -> Iterator[Score]:
    """FD and excess FD of the folder, and the real floor at the same N: real clips, as many as a pass has."""
    inputs, config = frame.inputs, frame.inputs.run.config
    n = len(frame.passes[0])
    if frame.plan is None or len(inputs.train) < 3:
        facts["left_out"].append(f"FD-{extractor}: {frame.count} content groups are too few for two halves")
        return
    table = inputs.features[extractor]
    pca = distances.fit_pca(table[sides.fitted_rows(inputs.train)], sides.pca_dims(config.evaluate.pca, n))
    facts["pca"][extractor] = {"dims": pca.dims, "asked": config.evaluate.pca, "explained": pca.explained}
    reference = (table[inputs.reference], frame.reference_group)
    draw = np.random.Generator(np.random.PCG64([config.run.seed, len(inputs.reference), n]))
    own = np.sort(draw.permutation(len(inputs.reference))[:n])
    side = sides.FrechetSide(pca, frame.unit, frame.plan, reference, (reference[0][own], reference[1][own]))
    raw = side.distances(inputs.arms[arm].features[extractor], frame.group, frame.passes)
    half = {"n": n // 2, "reference": len(inputs.reference) // 2, "pca": pca.dims}
    used, said = n * len(frame.passes), frame.protocol("frechet, disjoint halves of groups", extractor, **half)
    real_groups = len(np.unique(frame.reference_group[own]))
    for name, values, count, groups in ((arm, raw, used, frame.groups), (REAL, side.floor, n, real_groups)):
        if not np.isfinite(values).all():
            facts["left_out"].append(f"FD-{extractor} of {name}: a half of the clips holds fewer than two")
            return
        bounds = intervals.jackknife(values)
        bounds = Interval(bounds.value, max(bounds.low, 0.0), bounds.high)
        yield Score(name, f"FD-{extractor}", bounds, count, groups, said, values)
    excess = raw - side.floor
    said = frame.protocol("frechet less its real floor, jackknife bias correction", extractor, **half)
    value = intervals.jackknife(excess, correct=True)
    yield Score(arm, f"excess-FD-{extractor}", value, used, frame.groups, said, excess, True)


def _probe(frame: Frame, arm: str, facts: dict[str, Any], embed: Embed | None) -> Iterator[Score]:
    """Text-video probe and retrieval, where every clip has a caption and the probe can tell real clips' captions apart."""
    inputs, config = frame.inputs, frame.inputs.run.config
    bare = sum(not caption for caption in inputs.captions)
    train = sides.fitted_rows(inputs.train)
    train_groups = intervals.number_groups(inputs.groups(train))[0][0]
    if bare or len(np.unique(train_groups)) < 2:
        why = f"{bare} of {len(inputs.captions)} clips have no caption" if bare else "too few training clips"
        facts["probe"] = {"withheld": True, "reason": why}
        return
    extractors = probe_extractors(inputs.run)

    def joined(features: Mapping[str, Any], rows: np.ndarray | None = None) -> np.ndarray:
        return probe.join([features[name] if rows is None else features[name][rows] for name in extractors])

    fitted = probe.fit(joined(inputs.features, train), inputs.text[train], train_groups, config.run.seed)
    spoken = [inputs.clips[row].caption for row in inputs.reference]
    own, first = _pool(spoken)
    real = probe.retrieve(fitted, joined(inputs.features, inputs.reference), own, inputs.text[inputs.reference[first]])
    facts["probe"] = {"withheld": not probe.trusted(real), "reason": "", "features": list(extractors)}
    facts["probe"]["real"] = {"retrieval@1": float(real.top1.mean()), "chance": real.chance1}
    if facts["probe"]["withheld"]:
        facts["probe"]["reason"] = (
            f"retrieval@1 of real clips is {real.top1.mean():.1%}, under {probe.TIMES_CHANCE:g} times chance"
        )
        return
    own, first = _pool(inputs.captions)
    pool = (embed or _embedder(inputs.run))([inputs.captions[row] for row in first])
    found = probe.retrieve(fitted, joined(inputs.arms[arm].features), own, pool)
    protocol = frame.protocol(
        f"ridge probe to caption embeddings, {len(pool)} captions", "+".join(extractors), reference=len(inputs.train)
    )
    terms = {"text-video-probe": found.similarity, "retrieval@1": found.top1, "retrieval@5": found.top5}
    for metric, values in terms.items():
        make = intervals.mean_interval if metric == "text-video-probe" else intervals.share_interval
        left = intervals.leave_out_means(values, frame.group, frame.count)
        yield Score(arm, metric, make(values, frame.group), len(values), frame.groups, protocol, left)


def _pool(captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Place of every caption (n,) in the list of different ones, and the row where each of these first stands (Q,)."""
    place = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    own = np.array([place[caption] for caption in captions], np.int64)
    return own, np.array([list(captions).index(caption) for caption in place], np.int64)


def _embedder(run: Run) -> Embed:
    from archipel.encoders.text import open_text

    encoder = open_text(run.config.text, run.text)
    return lambda captions: encoder.encode(captions).pooled.numpy()


def _notes(frame: Frame, clips: ClipSet, facts: dict[str, Any]) -> list[str]:
    inputs, said = frame.inputs, []
    if verdicts.few(frame.groups):
        said.append(f"{verdicts.TOO_FEW}: {frame.groups} content groups, at least {FEW_GROUPS} are needed")
    said.append(
        f"{len(clips)} clips of {clips.root.name} against {len(inputs.reference)} real clips of the {inputs.split} split; "
        "not to be compared with arms of the run, which have prompts of their own"
    )
    own = {inputs.clips[row].sha256 for row in range(len(inputs.clips))} & set(clips.sha256)
    if own:
        said.append(f"{len(own)} of the clips are the run's own real clips, byte for byte")
    if clips.rejected:
        said.append(f"{len(clips.rejected)} clips could not be used: {folders.naming(clips.rejected)}")
    if facts.get("probe", {}).get("withheld"):
        said.append(f"text-video probe withheld: {facts['probe']['reason']}")
    return [*said, *(f"left out: {one}" for one in facts["left_out"])]


def rich_table(done: Against, width: int = 80) -> Table:
    """The rows for a terminal: a line per metric, the folder's clips beside the real floor."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from archipel.evaluation.stage import cell

    cells = {(row["arm"] == REAL, row["metric"]): cell(row) for row in done.rows}
    arm = next(row["arm"] for row in done.rows if row["arm"] != REAL)
    shown = Table(box=box.SIMPLE_HEAD, caption=escape("\n".join(done.notes[:3])), caption_justify="left")
    shown.add_column("metric", no_wrap=True)
    for head in (arm, "real (floor)"):
        shown.add_column(escape(head), justify="right", no_wrap=True, max_width=max(12, width // 2))
    for metric in dict.fromkeys(row["metric"] for row in done.rows):
        shown.add_row(metric, cells.get((False, metric), ""), cells.get((True, metric), ""))
    return shown
