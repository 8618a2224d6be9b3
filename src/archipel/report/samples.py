"""Section 'moving samples' and the traces of the router's weights that were saved with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from archipel.report import media
from archipel.report.reading import ARM_NOTES, Reader, arm_label, arm_tone, finite, mapping
from archipel.report.svg import Series, line_chart, stacked_area, trace
from archipel.run import MONOLITH

ROWS = 12  # prompts of the main comparison: the first ones, whatever they look like
OTHER_ROWS = 6  # prompts of the other arms
HERO = 8
BUDGET = 2_600_000  # bytes of pictures in the main comparison; the other arms have half of it
TRACES = 8


def arms_present(reader: Reader) -> list[str]:
    """Arms with samples: real, codec, the primary strategy, the monolith, then the others in the order of run.toml."""
    config = reader.run.config
    wanted = dict.fromkeys(["real", "codec", config.sample.strategy, MONOLITH, *config.evaluate.arms])
    return [arm for arm in wanted if _has(reader, reader.protocol, arm)]


def _has(reader: Reader, split: str, arm: str) -> bool:
    return (reader.run.samples(split) / f"{arm}.safetensors").is_file()


def _cell(clips: np.ndarray, row: int, fps: float, alt: str, longest: int) -> dict[str, Any]:
    clip = np.asarray(clips[row])
    return {
        "clip": media.clip_uri(clip, fps, longest=longest),
        "still": media.still_uri(clip, longest=longest),
        "alt": alt,
    }


def grid(
    clips: Mapping[str, np.ndarray],
    arms: Sequence[str],
    prompts: Sequence[Mapping[str, Any]],
    names: Mapping[str, str],
    fps: float,
    rows: int,
    budget: int,
) -> list[dict[str, Any]]:
    """One entry per prompt with one picture per arm, from the first prompt on, until ``rows`` or ``budget`` is used up."""
    side = max((int(clips[arm].shape[2]) for arm in arms), default=32)
    longest = min(side, 160)
    done: list[dict[str, Any]] = []
    used = 0
    for row, prompt in enumerate(prompts[:rows]):
        caption = str(prompt.get("caption", f"clip {row}"))
        cells = [
            _cell(clips[arm], row, fps, f"{names[arm]}: {caption}", longest) if row < len(clips[arm]) else None
            for arm in arms
        ]
        used += sum(len(cell["clip"]) + len(cell["still"]) for cell in cells if cell)
        if used > budget and done:
            break
        done.append({"caption": caption, "cluster": prompt.get("cluster"), "cells": cells})
    return done


def _columns(arms: Sequence[str], names: Mapping[str, str], primary: str) -> list[dict[str, str]]:
    return [
        {"arm": arm, "label": names[arm], "note": ARM_NOTES.get(arm, ""), "tone": arm_tone(arm, primary)}
        for arm in arms
    ]


def _read(reader: Reader, split: str, arms: Sequence[str]) -> tuple[list[Mapping[str, Any]], dict[str, np.ndarray]]:
    """Prompts of ``samples/<split>/`` and the clips uint8 (N, F, H, W, 3) of those arms that are there."""
    folder = reader.run.samples(split)
    prompts = reader.json(folder / "prompts.json")
    clips: dict[str, np.ndarray] = {}
    for arm in arms:
        tensors = reader.tensors(folder / f"{arm}.safetensors")
        if tensors is not None and "clips" in tensors and tensors["clips"].ndim == 5 and len(tensors["clips"]):
            clips[arm] = tensors["clips"]
    return [mapping(prompt) for prompt in prompts] if isinstance(prompts, list) else [], clips


def seen(reader: Reader) -> dict[str, Any]:
    """Context: captions that training saw, drawn with new noise. What the experts know, not how well they generalise."""
    primary = reader.run.config.sample.strategy
    present = [arm for arm in dict.fromkeys(["real", primary, MONOLITH]) if _has(reader, "train", arm)]
    prompts, clips = _read(reader, "train", present) if present else ([], {})
    if not clips or not prompts:
        return {"main": []}
    names = {arm: arm_label(arm, primary) for arm in clips}
    main = grid(clips, list(clips), prompts, names, reader.run.config.clips.fps, ROWS, BUDGET // 2)
    return {"main": main, "columns": _columns(list(clips), names, primary)}


def begun(reader: Reader) -> dict[str, Any]:
    """Context: the real clips of the split, and what was made of their first frames and captions."""
    primary = reader.run.config.sample.strategy
    folder, arms = reader.run.begun(reader.protocol).name, list(dict.fromkeys([primary, MONOLITH]))
    present = [arm for arm in arms if _has(reader, folder, arm)]
    prompts, clips = _read(reader, folder, present) if present else ([], {})
    if not clips or not prompts:
        return {"main": []}
    shown = _read(reader, reader.protocol, ["real"])[1] | clips
    names = {arm: arm_label(arm, primary) for arm in shown}
    main = grid(shown, list(shown), prompts, names, reader.run.config.clips.fps, ROWS, BUDGET // 2)
    return {"main": main, "columns": _columns(list(shown), names, primary)}


def samples(reader: Reader) -> dict[str, Any]:
    """Context of the section: hero strip, main comparison, other arms; every picture a data URI."""
    run = reader.run
    primary = run.config.sample.strategy
    prompts, clips = _read(reader, reader.protocol, arms_present(reader))
    if not clips or not prompts:
        return {"missing": reader.command("generate", "--arms"), "hero": [], "main": [], "other": []}
    names = {arm: arm_label(arm, primary) for arm in clips}
    first = [arm for arm in dict.fromkeys(["real", "codec", primary, MONOLITH]) if arm in clips]
    rest = [arm for arm in clips if arm not in first]
    fps = run.config.clips.fps
    main = grid(clips, first, prompts, names, fps, ROWS, BUDGET)
    other = grid(clips, rest, prompts, names, fps, OTHER_ROWS, BUDGET // 2) if rest else []
    shown = primary if primary in clips else MONOLITH
    hero = (
        [
            row["cells"][first.index(shown)] | {"caption": row["caption"]}
            for row in main[:HERO]
            if row["cells"][first.index(shown)]
        ]
        if shown in first
        else []
    )
    wanted = dict.fromkeys([primary, MONOLITH, *run.config.evaluate.arms])
    absent = [arm for arm in wanted if arm not in clips]
    return {
        "missing": reader.command("generate", "--arms") if absent else "",
        "absent": [arm_label(arm, primary) for arm in absent],
        "split": reader.protocol,
        "count": len(next(iter(clips.values()))),
        "hero": hero,
        "hero_label": names.get(shown, ""),
        "columns": _columns(first, names, primary),
        "main": main,
        "other_columns": _columns(rest, names, primary),
        "other": other,
        "seen": seen(reader),
        "begun": begun(reader),
        "settings": run.config.sample,
    }


def entropy(weights: np.ndarray) -> np.ndarray:
    """Entropy in nats over the last axis of weights >= 0 that sum to 1 there."""
    safe = np.clip(weights, 1e-12, 1.0)
    return np.asarray(-(weights * np.log(safe)).sum(-1))


def _weights(reader: Reader, arm: str) -> np.ndarray | None:
    tensors = reader.tensors(reader.run.samples(reader.protocol) / f"{arm}.safetensors")
    if tensors is None or "weights" not in tensors:
        return None
    weights = np.asarray(tensors["weights"], np.float64)
    if weights.ndim != 3 or weights.size == 0 or not np.isfinite(weights).all():
        return None
    return weights


def router_weights(reader: Reader) -> dict[str, Any]:
    """Context: per routed arm, mean weights and entropy along the sampling steps, and a few clips' own traces."""
    run = reader.run
    primary = run.config.sample.strategy
    prompts = reader.json(run.samples(reader.protocol) / "prompts.json")
    captions = [str(mapping(prompt).get("caption", "")) for prompt in prompts] if isinstance(prompts, list) else []
    arms = []
    curves = []
    for arm in dict.fromkeys([primary, "full"]):
        weights = _weights(reader, arm)
        if weights is None or arm in (MONOLITH, "oracle"):
            continue
        n, steps, k = weights.shape
        x = list(range(1, steps + 1))
        mean = weights.mean(0)
        labels = [f"expert {i}" for i in range(k)]
        spread = entropy(weights).mean(0) / np.log(k) if k > 1 else np.zeros(steps)
        curves.append(Series(arm_label(arm, primary), x, spread.tolist(), "arch" if arm == primary else "t2"))
        switched = float((weights.argmax(-1) != weights.argmax(-1)[:, :1]).any(1).mean())
        arms.append(
            {
                "label": arm_label(arm, primary),
                "area": stacked_area(
                    x,
                    mean.T.tolist(),
                    labels,
                    f"Mean router weight per expert over {steps} sampling steps, {arm}",
                    "sampling step (noise → clip)",
                ),
                "traces": [
                    {
                        "caption": captions[i] if i < len(captions) else f"clip {i}",
                        "svg": trace(weights[i].tolist(), f"Router weights of one clip, {arm}"),
                    }
                    for i in range(min(TRACES, n))
                ],
                "switched": switched,
                "n": n,
            }
        )
    chart = (
        line_chart(
            curves,
            "Entropy of the router's weights over the sampling steps",
            "sampling step (noise → clip)",
            "entropy / log K",
            zero=True,
        )
        if curves
        else ""
    )
    return {"missing": "" if arms else reader.command("generate", "--arms"), "arms": arms, "entropy": chart}


def rejected(reader: Reader, counted: Any) -> dict[str, Any]:
    """Reasons and counts of what could not be used, most frequent first: from the card, else from clips/rejected.csv."""
    import csv
    from collections import Counter

    path = reader.run.clips / "rejected.csv"
    found: Counter[str] = Counter()
    if isinstance(counted, Mapping):
        found.update({str(reason): int(count) for reason, count in counted.items() if finite(count) is not None})
    elif path.is_file():
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            found.update(
                str(row.get("reason") or "no reason given").split(":")[0].strip()[:80] for row in csv.DictReader(file)
            )
    else:
        return {"total": None, "reasons": []}
    return {"total": sum(found.values()), "reasons": found.most_common(12)}


def source(reader: Reader) -> dict[str, Any]:
    """Context: where the clips came from, their licence, counts, what was refused."""
    card = mapping(reader.card(reader.run.clips))
    settings = reader.run.config.clips
    provenance, counts = mapping(card.get("provenance")), mapping(card.get("counts"))
    facts: list[tuple[str, str]] = [("source", settings.source)]
    for key, value in {**provenance, **counts}.items():
        if key in ("license", "source", "rejected"):
            continue
        if isinstance(value, Mapping):
            facts.append((str(key), ", ".join(str(name) for name in value)[:300]))
        elif isinstance(value, str) or finite(value) is not None:
            facts.append((str(key).replace("_", " "), str(value)))
    window = f"{settings.frames} frames at {settings.fps:g} per second, {settings.size} × {settings.size} pixels"
    facts.append(("window", window))
    return {
        "missing": "" if card else reader.command("prepare"),
        "facts": facts,
        "license": str(provenance.get("license") or settings.license or "not stated by the source"),
        "rejected": rejected(reader, counts.get("rejected")),
        "codec": codec(reader),
    }


def codec(reader: Reader) -> list[dict[str, str]]:
    """Context: what the codec alone costs on train and validation clips, one row each; empty where it is not fitted."""
    card = mapping(reader.card(reader.run.codec))
    rows = []
    for split, numbers in mapping(card.get("round_trip")).items():
        found = mapping(numbers)
        row = {"split": str(split)}
        for key in ("psnr", "seam_space", "seam_space_original", "seam_time", "seam_time_original"):
            value = finite(found.get(key))
            row[key] = "" if value is None else f"{value:.1f}" if key == "psnr" else f"{value:.2f}"
        rows.append(row)
    return rows
