"""The evaluation stage: samples and real clips -> ``scores/<split>.json`` and ``scores/<split>.extra.json``.

``<split>.json`` is a list of {"arm", "metric", "value", "low", "high", "n", "groups", "protocol"}. ``<split>.extra.json``
holds what does not fit into rows: "comparisons" (primary arm against monolith: difference, ratio or null, verdict),
"probe" (withheld or not, table of real, codec, static and reversed clips beside chance), "copying" (table, verdict),
"clusters" (shares of the data and of every arm), "floors", "extractors" (which made the partition, which is primary),
"pca", "uncorrected_excess" and "notes".
"""

from __future__ import annotations

import difflib
import logging
import time
from collections.abc import Callable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

from archipel import store
from archipel.errors import ConfigError, MissingStageError
from archipel.evaluation import first_frame, measure, verdicts
from archipel.evaluation.inputs import (
    CODEC,
    EXTRACTORS,
    REAL,
    Extract,
    Inputs,
    default_extract,
    features_identity,
    probe_extractors,
    read_inputs,
)
from archipel.evaluation.intervals import FEW_GROUPS
from archipel.evaluation.measure import Frame, Score
from archipel.partition.kmeans import one_thread
from archipel.progress import Progress, StopFlag, log_to
from archipel.run import MONOLITH, Run

if TYPE_CHECKING:
    from pathlib import Path

    from rich.table import Table

logger = logging.getLogger("archipel")
CODE = 2  # raised whenever the same inputs give other scores
# What can decide: distances that are unbiased in the number of clips, and for which a paired difference is computed.
PRIMARY = tuple(f"{kind}-{name}" for kind in ("KID", "excess-FD") for name in EXTRACTORS)


def evaluate(run: Run, stop: StopFlag | None = None, *, extract: Extract = default_extract) -> None:
    """Score every arm of the configured split; what is done already is left as it is.

    Features of generated clips are kept beside the samples, so that interrupted work continues and a second evaluation is
    quick. Raises MissingStageError before *generate* has finished, ConfigError for an unknown primary metric, Stopped.
    """
    check_primary(run.config.evaluate.primary)
    began = time.monotonic()
    with log_to(run.log("evaluate")):
        run.need(run.samples(run.config.evaluate.split), "generate")
        run.need(run.partition, "partition")
        if first_frame.gives_first_frames(run):
            run.need(first_frame.folder(run), "generate")
        key = _key(run)
        if _finished(run, key):
            return
        inputs = read_inputs(run, stop, extract)
        rows, extra = score(inputs, stop)
        path = run.scores(inputs.split)
        path.parent.mkdir(parents=True, exist_ok=True)
        store.write_json(extra_path(run), {**extra, "key": key, "seconds": round(time.monotonic() - began, 2)})
        store.write_json(path, rows)  # last: its presence says that the stage is done
        logger.info("evaluate: %d scores of %d arms in %.1f s", len(rows), len(inputs.arms), time.monotonic() - began)


def check_primary(metric: str) -> None:
    """Refuse a primary metric that cannot decide a comparison, naming the nearest that can."""
    if metric not in PRIMARY:
        near = difflib.get_close_matches(metric, PRIMARY, n=1, cutoff=0.0)
        raise ConfigError(
            f"evaluate.primary = {metric!r} cannot decide a comparison (one of {', '.join(PRIMARY)} can); "
            f"the nearest is {near[0]!r}"
        )


def extra_path(run: Run) -> Path:
    path = run.scores(run.config.evaluate.split)
    return path.with_name(f"{path.stem}.extra.json")


def _key(run: Run) -> str:
    card = store.read_card(run.samples(run.config.evaluate.split)) or {}
    decides = {"run": run.id, "samples": card.get("files", {}), "code": CODE}
    if first_frame.gives_first_frames(run):
        decides["begun"] = (store.read_card(first_frame.folder(run)) or {}).get("files", {})
    return store.sha256_json({**decides, **features_identity(run.config.evaluate)})


def _finished(run: Run, key: str) -> bool:
    if not (run.scores(run.config.evaluate.split).exists() and extra_path(run).exists()):
        return False
    return bool(store.read_json(extra_path(run)).get("key") == key)


def score(inputs: Inputs, stop: StopFlag | None = None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All rows and the extra facts of an evaluation. Raises Stopped between metrics where ``stop`` is set."""
    frame = Frame.of(inputs)
    crossed = verdicts.crossing(inputs.run.config)
    facts: dict[str, Any] = {"left_out": [], "pca": {}, "uncorrected_excess": {}}
    work: list[Callable[[], Iterator[Score]]] = [
        *(lambda name=name: measure.kid_scores(frame, name, facts) for name in EXTRACTORS),
        *(lambda name=name: measure.frechet_scores(frame, name, facts) for name in EXTRACTORS),
        lambda: measure.probe_scores(frame, probe_extractors(inputs.run), facts),
        lambda: measure.motion_scores(frame),
        lambda: first_frame.first_frame_scores(frame),
        lambda: measure.copying_scores(frame, crossed["primary_extractor"]),
        lambda: measure.cluster_scores(frame, facts),
    ]
    found: list[Score] = []
    # On one thread: the numbers do not depend on the machine's cores, and small matrices are no faster on more.
    with one_thread(), Progress("evaluate: scores", len(work)) as bar:
        for part in work:
            if stop:
                raise stop.error("evaluate")
            found += part()
            bar.advance()
    order = {name: place for place, name in enumerate(inputs.arms)}  # the codec first
    found.sort(key=lambda one: order.get(one.arm, len(order)))
    scores = {(one.arm, one.metric): one for one in found}
    return [one.row() for one in found], _extra(inputs, frame, scores, facts, crossed)


def _extra(
    inputs: Inputs, frame: Frame, scores: dict[tuple[str, str], Score], facts: dict[str, Any], crossed: dict[str, Any]
) -> dict[str, Any]:
    arm = inputs.run.config.sample.strategy
    copied = verdicts.copying(scores, arm, crossed["primary_extractor"])
    compared = verdicts.comparisons(scores, arm, crossed["primary"], copied["grew"])
    return {
        "format": 1,
        "run": inputs.run.id,
        "split": inputs.split,
        "clips": len(inputs.rows),
        "groups": frame.groups,
        "extractors": crossed,
        "comparisons": compared,
        "probe": facts.get("probe", {}),
        "copying": copied,
        "clusters": facts.get("clusters", {}),
        "floors": verdicts.floors(scores),
        "pca": facts["pca"],
        "uncorrected_excess": facts["uncorrected_excess"],
        "notes": notes(inputs, frame, facts, crossed, compared),
    }


def notes(
    inputs: Inputs, frame: Frame, facts: dict[str, Any], crossed: dict[str, Any], compared: list[dict[str, Any]]
) -> list[str]:
    """Sentences that belong under the table."""
    said = []
    if verdicts.few(frame.groups):
        said.append(f"{verdicts.TOO_FEW}: {frame.groups} content groups, at least {FEW_GROUPS} are needed")
    said.append(crossed["sentence"])
    for name, pca in facts["pca"].items():
        if pca["dims"] < pca["asked"]:
            said.append(
                f"FD-{name}: {pca['dims']} PCA dimensions instead of {pca['asked']}, which is what "
                f"{len(inputs.train)} training clips and {len(frame.passes[0])} captions support"
            )
    again = len(inputs.rows) - len(frame.passes[0])
    if again:
        said.append(
            f"{again} of {len(inputs.rows)} clips repeat a caption with new noise; a content group stays one unit"
        )
    table = facts.get("probe", {})
    if table.get("withheld"):
        said.append(f"text-video probe withheld: {table['reason']}")
    said += [one["sentence"] for one in table.get("controls", {}).values()]
    said += [f"left out: {one}" for one in facts["left_out"]]
    said += [first_frame.NOTE] if first_frame.gives_first_frames(inputs.run) else []
    said += [f"arm {name} has no samples" for name in inputs.missing]
    if not compared:
        arm = inputs.run.config.sample.strategy
        why = "is the monolith itself" if arm == MONOLITH else "or the monolith has no samples or too few groups"
        said.append(f"no comparison: the primary arm {arm} {why}")
    return said


# --- for the command line --------------------------------------------------------------------------------------------


def table(run: Run) -> list[dict[str, str]]:
    """Rows of a small table, arms down and a few columns with intervals across; every row has the same keys in order.

    Raises MissingStageError before *evaluate* has finished.
    """
    path, config = run.scores(run.config.evaluate.split), run.config
    if not path.exists():
        raise MissingStageError(f"{path} is not there: run `archipel evaluate {run.root}` first")
    rows = store.read_json(path)
    cells = {(row["arm"], row["metric"]): cell(row) for row in rows}
    excess = "excess-FD-" + verdicts.crossing(config)["primary_extractor"]
    wanted = [config.evaluate.primary, excess, first_frame.METRIC, "text-video-probe", "motion", verdicts.JUDGE]
    metrics = [name for name in dict.fromkeys(wanted) if any(metric == name for _, metric in cells)]
    arms = dict.fromkeys([CODEC, REAL, config.sample.strategy, MONOLITH, *(row["arm"] for row in rows)])
    return [
        {"arm": f"{arm} *" if arm == config.sample.strategy else arm, **{m: cells.get((arm, m), "") for m in metrics}}
        for arm in arms
        if any((arm, metric) in cells for metric in metrics)
    ]


def cell(row: dict[str, Any]) -> str:
    """``0.46 [0.34, 0.58]``, short enough for three columns in a terminal; the files have all digits."""
    value, low, high = (_short(row[key]) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]" if low or high else value


def _short(number: float | None) -> str:
    if number is None:
        return ""
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.2g}"


def rich_table(run: Run, width: int = 80) -> Table:
    """``table`` for a terminal of ``width`` characters: the columns that fit, the verdict and the first notes below."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    rows, extra = table(run), store.read_json(extra_path(run))
    primary = [one["verdict"] for one in extra.get("comparisons", []) if one.get("primary")]
    caption = "\n".join(chain(primary, extra.get("notes", [])[:2]))
    shown = Table(
        title=f"{extra.get('clips')} clips per arm, {run.config.evaluate.split} split, 95 % intervals",
        caption=escape(caption),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    left = width - 2  # the edges
    names = []
    for name in rows[0] if rows else ["arm"]:
        left -= max(len(cell) for cell in [*name.split("-"), *(row[name] for row in rows)]) + 3
        if left < 0:
            break
        names.append(name)
        header = "\n".join(name.split("-"))
        shown.add_column(header, justify="left" if name == "arm" else "right", no_wrap=True)
    for row in rows:
        shown.add_row(*(escape(row[name]) for name in names))
    return shown
