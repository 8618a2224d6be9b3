"""The stage *report*: one self-contained page from whatever files of a run there are."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from archipel import __version__, store
from archipel.report import scores as scoring
from archipel.report.checks import copying, probe, shares
from archipel.report.flow import flow_picture
from archipel.report.html import HERE, fill, guarded, stylesheet
from archipel.report.partition import partition
from archipel.report.reading import Reader, finite, mapping
from archipel.report.routing import routing
from archipel.report.samples import router_weights, samples, source
from archipel.report.training import isolation, ledger, training
from archipel.report.verdict import verdict
from archipel.run import Run

logger = logging.getLogger("archipel")
SECTIONS = (
    ("samples", "Samples"),
    ("scores", "Scores"),
    ("router", "Router"),
    ("training", "Training"),
    ("ledger", "Ledger"),
    ("partition", "Partition"),
    ("isolation", "Isolation"),
    ("source", "Run"),
    ("limits", "Limits"),
)


def report(run: Run) -> Path:
    """Write RUN/report/index.html (aside, then renamed) and return its path.

    Works at any time: a part whose files are missing says so and names the command that makes them; a file that cannot
    be read is listed and left out. Raises ArchipelError where jinja2 (extra ``eval``) is not installed.
    """
    path = run.report / "index.html"
    store.write_text(path, render(run))
    logger.info("report: %s (%.2f MB)", path, path.stat().st_size / 1e6)
    return path


def render(run: Run) -> str:
    """The page as text: no address outside of it, every value escaped, scripts and styles pinned by hash."""
    return fill(HERE, stylesheet(), context(run), SECTIONS)


def context(run: Run) -> dict[str, Any]:
    """Everything that the template shows, section by section."""
    reader = Reader(run)
    facts = scoring.extra(reader)
    cost = guarded("ledger", lambda: ledger(reader))
    parts = {
        "ledger": cost,
        "samples": {"main": [], "hero": [], **guarded("samples", lambda: samples(reader))},
        "scores": {"copying": None, **guarded("scores", lambda: scoring.scores(reader, facts))},
        "probe": {"tables": [], "withheld": "", **guarded("probe", lambda: probe(facts, run.config.sample.strategy))},
        "copying": {"verdict": "", **guarded("copying", lambda: copying(facts))},
        "router": guarded("router", lambda: routing(reader)),
        "weights": guarded("weights", lambda: router_weights(reader)),
        "training": guarded("training", lambda: training(reader)),
        "partition": guarded("partition", lambda: partition(reader, shares(facts, run.config.sample.strategy))),
        "isolation": guarded("isolation", lambda: isolation(reader)),
        "source": guarded("source", lambda: source(reader)),
    }
    judged = verdict(reader, facts, cost)
    return {
        **parts,
        "verdict": judged,
        "name": reader.name,
        "page_title": f"{reader.name} · Archipel report",
        "preset": run.config.run.preset,
        "k": run.config.partition.k,
        "run_id": run.id,
        "flow": flow_picture(run.config.partition.k, _clip_count(reader), cost.get("matched") is True, reader.protocol),
        "problems": reader.problems,
        "complete": not any(part.get("missing") for part in parts.values()),
        "run_command": reader.command("run"),
        "verify_command": reader.command("verify"),
        "evaluate_command": reader.command("evaluate"),
        "versions": _versions(reader),
        "toml": _toml(run),
        "limits": limits(run),
    }


def _clip_count(reader: Reader) -> str:
    counts = mapping((reader.card(reader.run.clips) or {}).get("counts"))
    total = finite(counts.get("used"))
    return f"{total:.0f} with captions" if total else "with captions"


def _toml(run: Run) -> str:
    """run.toml as it is, except that a path of this machine is shortened to its last part."""
    text = (run.root / "run.toml").read_text(encoding="utf-8", errors="replace")
    path = run.config.clips.path
    return text.replace(path, "…/" + Path(path).name) if path and Path(path).is_absolute() else text


def _versions(reader: Reader) -> list[tuple[str, str]]:
    """Run id and what built the first trained network that says so."""
    pairs = [("run id", reader.run.id[:16]), ("Archipel", __version__)]
    for name in reader.run.job_names:
        card: Mapping[str, Any] = reader.card(reader.run.expert(name)) or {}
        build = card.get("build")
        if isinstance(build, str):
            pairs.append(("build of the experts", build))
        elif isinstance(build, Mapping):
            pairs += [(str(key), str(value)) for key, value in build.items() if isinstance(value, (str, int, float))]
        if build:
            threads = finite(card.get("threads"))
            return pairs + ([("threads", f"{threads:.0f}")] if threads is not None else [])
    return pairs


def limits(run: Run) -> list[str]:
    """What this page does not show, in plain words."""
    config = run.config
    clips, k = config.clips, config.partition.k
    return [
        f"One training run per arm, seed {config.run.seed}: the intervals cover the choice of clips, "
        "not what another seed would have given.",
        "Distances are taken in the feature spaces named beside them and cannot be compared with numbers from other "
        "extractors; nothing here is FVD.",
        f"Clips are {clips.size} × {clips.size} pixels and {clips.frames} frames: what holds here need not hold at other sizes.",
        f"Held-out clips come from the same source as the training clips; the captions are those of the "
        f"{config.evaluate.split} split.",
        f"All experts together have {k} times the monolith's parameters; at top-1 they use as many per step. "
        "A gain is not proof that routing alone made it.",
        "What a process touched is what its own audit saw; native code can do things that Python's audit does not see.",
    ]
