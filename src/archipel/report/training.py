"""Sections 'training', 'ledger' and 'isolation': loss curves, what every arm cost, what every process touched."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from archipel.progress import seconds_text
from archipel.report.reading import Reader, finite, floats, mapping
from archipel.report.svg import Series, line_chart, number, tone
from archipel.run import MONOLITH, ROUTER

POINTS = 160  # points of a curve after averaging
TOUCHED = 40  # names shown per process


def thin(x: Sequence[float], y: Sequence[float], points: int = POINTS) -> tuple[list[float], list[float]]:
    """Averages of consecutive stretches, so that a curve of any length has at most ``points`` points."""
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    size = max(1, math.ceil(len(pairs) / points))
    parts = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    return [part[-1][0] for part in parts], [sum(b for _, b in part) / len(part) for part in parts]


def series_of(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    pairs = [
        (step, value)
        for row in rows
        if (step := finite(row.get("step"))) is not None and (value := finite(row.get(key))) is not None
    ]
    # A resumed process writes lines again for steps after its checkpoint: the last word on a step counts.
    last = dict(pairs)
    return sorted(last), [last[step] for step in sorted(last)]


def validation_of(rows: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """Validation loss over steps: of the averaged weights, which are the ones that generate, else of the raw ones."""
    averaged = series_of(rows, "validation_ema")
    return averaged if averaged[0] else series_of(rows, "validation")


def _by_time(rows: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """The last validation loss by timestep: (t, loss); empty lists where no line has one."""
    for row in reversed(rows):
        detail = mapping(row.get("validation_detail"))
        for part in (mapping(detail.get("ema")), mapping(detail.get("raw")), detail):
            times, losses = _time_pairs(part.get("bins"), floats(part.get("times")))
            if times:
                return times, losses
    return [], []


def _time_pairs(bins: Any, times: Sequence[float]) -> tuple[list[float], list[float]]:
    """(t, loss) of losses at ``times``; equal bins of [0, 1] where the times do not fit."""
    losses = floats(bins)
    own = times if len(times) == len(losses) else [(i + 0.5) / len(losses) for i in range(len(losses))]
    pairs = sorted(zip(own, losses, strict=True))
    return [t for t, _ in pairs], [loss for _, loss in pairs]


def _flops_per_step(card: Mapping[str, Any] | None, ledger: Mapping[str, Any], name: str, steps: float) -> float | None:
    total = finite((card or {}).get("flops"))
    if total is None:
        total = (
            finite(ledger.get(name)) if name in (MONOLITH, ROUTER) else finite(mapping(ledger.get("experts")).get(name))
        )
    return total / steps if total and steps else None


def _job_label(name: str) -> str:
    return name if name in (MONOLITH, ROUTER) else f"expert {name}"


def training(reader: Reader) -> dict[str, Any]:
    """Context: loss against steps, validation loss against steps and FLOPs, validation loss by timestep."""
    run = reader.run
    ledger = mapping(reader.json(run.ledger))
    train, validation, flops, times, states = [], [], [], [], []
    for place, name in enumerate([*run.expert_names, MONOLITH]):
        folder, css = run.expert(name), tone(place) if name != MONOLITH else "mono"
        card, rows = reader.card(folder), reader.lines(folder / "metrics.jsonl")
        x, y = series_of(rows, "loss")
        if x:
            train.append(Series(_job_label(name), *thin(x, y), css))
        seen, losses = validation_of(rows)
        if seen:
            validation.append(Series(_job_label(name), *thin(seen, losses), css, dots=len(seen) <= 30))
            per_step = _flops_per_step(
                card,
                ledger,
                name,
                finite((card or {}).get("steps")) or finite((card or {}).get("step")) or (x[-1] if x else 0.0),
            )
            if per_step:
                spent, kept = thin(seen, losses)
                flops.append(
                    Series(_job_label(name), [step * per_step for step in spent], kept, css, dots=len(seen) <= 30)
                )
        moments, by_time = _by_time(rows)
        if moments:
            times.append(Series(_job_label(name), moments, by_time, css, dots=True))
        state = "finished" if card else f"at step {x[-1]:.0f}" if x else "not started"
        states.append(
            {
                "name": name,
                "label": _job_label(name),
                "state": state,
                "command": "" if card else reader.command("train", name),
            }
        )
    return {
        "missing": "" if train else reader.command("run"),
        "loss": line_chart(
            train, "Training loss against steps for every expert and the monolith", "steps", "training loss", log_y=True
        ),
        "validation": line_chart(validation, "Validation loss against steps", "steps", "validation loss"),
        "flops": line_chart(
            flops, "Validation loss against training FLOPs", "training FLOPs of this network", "validation loss"
        ),
        "times": line_chart(
            times, "Validation loss by timestep", "t (0 = clip, 1 = noise)", "validation loss", zero=True
        ),
        "unfinished": [state for state in states if state["command"]],
    }


# --- ledger ----------------------------------------------------------------------------------------------------------

_COLUMNS = (
    ("flops", "training FLOPs", ("flops",)),
    ("samples", "samples", ("samples",)),
    ("updates", "updates", ("updates",)),
    ("epochs", "epochs", ("epochs",)),
    ("seconds", "wall time", ("seconds",)),
    ("parameters", "parameters", ("parameters",)),
)


def _entry(ledger: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Details of one arm: ledger["arms"][name]; FLOPs alone where there is nothing more."""
    found = mapping(ledger.get("arms")).get(name)
    if isinstance(found, Mapping):
        return found
    flops = ledger.get(name) if name in (MONOLITH, ROUTER) else mapping(ledger.get("experts")).get(name)
    return flops if isinstance(flops, Mapping) else {"flops": flops}


def _value(entry: Mapping[str, Any], keys: Sequence[str]) -> float | None:
    return next((value for key in keys if (value := finite(entry.get(key))) is not None), None)


def _show(key: str, value: float | None) -> str:
    if value is None:
        return "–"
    return seconds_text(value) if key == "seconds" else number(value)


def ledger(reader: Reader) -> dict[str, Any]:
    """Context: one row per job, the archipelago's sum, the ratio, and whether the word 'matched' may be used."""
    run = reader.run
    found = mapping(reader.json(run.ledger))
    if not found:
        return {"missing": reader.command("run"), "matched": False, "ratio": None, "rows": []}
    rows, sums = [], dict.fromkeys((key for key, _, _ in _COLUMNS), 0.0)
    trunk = {
        "flops": finite(mapping(found.get("trunk")).get("flops")),
        "updates": mapping(found.get("trunk")).get("steps"),
    }
    if trunk["flops"]:
        cells = [_show(key, _value(trunk, keys)) for key, _, keys in _COLUMNS]
        rows.append({"name": "shared start (once in each)", "cells": cells, "css": ""})
        sums["flops"] += trunk["flops"]
    imported = [str(name) for name in found.get("imported") or []]
    for name in [*run.expert_names, ROUTER]:
        entry = _entry(found, name)
        values = {key: _value(entry, keys) for key, _, keys in _COLUMNS}
        label = _job_label(name) + (" (imported)" if name in imported else "")
        rows.append({"name": label, "cells": [_show(key, values[key]) for key, _, _ in _COLUMNS], "css": ""})
        for key in sums:
            sums[key] = math.nan if values[key] is None else sums[key] + (values[key] or 0.0)
    total = [_show(key, finite(sums[key])) if key not in ("epochs", "updates") else "" for key, _, _ in _COLUMNS]
    rows.append({"name": "archipelago (sum)", "cells": total, "css": "sum"})
    entry = dict(_entry(found, MONOLITH))
    if trunk["flops"] and entry.get("flops"):
        entry["flops"] += trunk["flops"]
    rows.append(
        {"name": MONOLITH, "cells": [_show(key, _value(entry, keys)) for key, _, keys in _COLUMNS], "css": "sum"}
    )
    ratio = finite(found.get("ratio"))
    matched = found.get("matched") is True
    return {
        "missing": "" if ratio is not None or imported else reader.command("run"),
        "imported": imported,
        "columns": [title for _, title, _ in _COLUMNS],
        "rows": rows,
        "ratio": ratio,
        "ratio_text": number(ratio, 4) if ratio is not None else "not known yet",
        "matched": matched,
        "tolerance": run.config.compute.tolerance,
        "sampling": _sampling(found),
        "traffic": _traffic(found),
    }


def _sampling(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Sampling cost per clip by arm, where the ledger has it."""
    part = mapping(found.get("sampling"))
    bounds = mapping(part.get("bounds"))
    costs = []
    for arm, value in mapping(part.get("per_clip")).items():
        total = finite(mapping(value).get("total"))
        if total is not None:
            costs.append((str(arm), f"{bounds[arm]} {number(total)}" if arm in bounds else number(total)))
    return costs


def _traffic(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What islands moved, and what other ways to train on as many machines would have; empty without islands."""
    part = mapping(found.get("traffic"))
    rows = []
    for name, value in mapping(part.get("islands")).items():
        row = mapping(value)
        sent, received = (finite(row.get(key)) or 0.0 for key in ("sent", "received"))
        rows.append((_job_label(str(name)), f"{sent / 1e6:,.1f} MB sent, {received / 1e6:,.1f} MB received"))
    every = {"data_parallel": "data-parallel training would move", "diloco": "DiLoCo-style training would move"}
    for key, label in every.items() if rows else ():
        way = mapping(part.get(key))
        total, times = finite(way.get("total")), finite(way.get("times_ours"))
        if total is not None and times is not None:
            bare = finite(way.get("times_needed"))
            alone = f", {number(bare)} times our shards and results alone" if bare is not None else ""
            said = f"{total / 1e6:,.1f} MB without checkpoints: {number(times)} times all of ours{alone}"
            rows.append((label, f"{said} ({way.get('formula')} bytes)"))
    return rows


# --- isolation -------------------------------------------------------------------------------------------------------


def _names(value: Any) -> list[str]:
    """Names in a card's field, whatever its shape: list, mapping of lists, single text."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [f"{key}: {entry}" for key, part in value.items() for entry in _names(part)]
    if isinstance(value, (list, tuple)):
        return [entry for part in value for entry in _names(part)]
    return []


def foreign(name: str, touched: Sequence[str]) -> list[str]:
    """What an expert's process touched of other shards, experts or the router: nothing, if it was isolated."""
    own = (f"shards/{name}/", f"experts/{name}/")
    return [
        one
        for one in touched
        if one.startswith(("shards/", "experts/", "router/", "trunk/")) and not one.startswith(own)
    ]


def isolation(reader: Reader) -> dict[str, Any]:
    """Context: per trained job what its process opened and where it connected, as its card tells."""
    rows = []
    for name in reader.run.job_names:
        card = reader.card(reader.run.expert(name))
        if card is None:
            continue
        touched = mapping(card.get("touched"))
        read, wrote, net = (_names(touched.get(key)) for key in ("read", "wrote", "connected"))
        rows.append(
            {
                "label": _job_label(name),
                "foreign": foreign(name, [*read, *wrote]) if name not in (MONOLITH, ROUTER) else None,
                "read": read[:TOUCHED],
                "more": max(0, len(read) - TOUCHED),
                "written": wrote[:TOUCHED],
                "connected": net[:TOUCHED],
                "knows_net": "connected" in touched,
                "resumed": finite(card.get("resumed")),
                "threads": finite(card.get("threads")),
                "sha256": str(card.get("sha256") or "")[:12],
                "evidence": str(touched.get("evidence") or ""),
            }
        )
    return {"missing": "" if rows else reader.command("run"), "rows": rows}
