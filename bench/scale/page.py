"""The page of the scale curves: tables, power laws and curves from what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from archipel import store
from bench.__main__ import table
from bench.scale import clips, models
from bench.scale.fitting import Law, fit

TARGET = 1_000_000  # clips that laws are asked about
LABELS = ("before", "after")
_WALLS = (
    "| stage | wall | moved to |\n| --- | --- | --- |\n"
    "| shard reading | every shard of a tensor was an open file: 1,024 of them (16,384 clips' features; fewer, where more tensors are "
    'read) ended in "Too many open files" | at most 64 open for each tensor, whatever their number |\n'
    "| shard reading | rows were dealt to shards by a search through all rows for each shard | one sort |\n"
    "| prepare | the list of finished shards was written anew after each: quadratic in shards | one line a shard |\n"
    "| partition | features, points and groups in float64, all in memory: several times N x D x 8 bytes | by block beyond 256 MiB each |\n"
    "| partition | k-means on all groups | on a sample beyond 20,000 groups (256 for each fine centroid, where that is more) |\n"
    "| partition | N x (fine centroids) distances at once | by block |\n"
    "| evaluation | probe: eigenvectors of (training clips)^2 | of (features)^2 beyond 4,096 clips; PCA and probe on at most 20,000 |\n"
    "| evaluation | distances to all training clips at once, all features in memory | by block, features read by row |\n"
    "| evaluation | kernel sums over groups cubic in clips, on the whole split | quadratic, on captions' clips and 4,000 others |\n"
)


def _rows(cases: Mapping[str, Any], points: dict[str, Any], unit: str) -> list[dict[str, Any]]:
    rows = []
    for case in cases:
        for label in LABELS:
            for n, found in sorted(points.get(label, {}).get(case, {}).items(), key=lambda pair: int(pair[0])):
                row = {"case": case, "code": label, unit: f"{int(n):,}"}
                failed = found.get("failed", "")
                row |= {"CPU, s": found.get("cpu"), "wall, s": found.get("wall"), "peak, MiB": found.get("peak")}
                rows.append({**row, "": failed.replace("|", "/")})
    return rows


def _law(points: dict[str, Any], label: str, case: str, key: str) -> Law | None:
    found = [
        (int(n), one[key])
        for n, one in points.get(label, {}).get(case, {}).items()
        if one.get(key) and not one.get("failed")
    ]
    found.sort()
    return fit([x for x, _ in found], [y for _, y in found])


def _laws(cases: Mapping[str, Any], points: dict[str, Any], unit: str, target: int) -> list[dict[str, Any]]:
    rows = []
    for case in cases:
        for label in LABELS:
            for key, name in (("cpu", "CPU, s"), ("peak", "peak, MiB")):
                law = _law(points, label, case, key)
                if law is None:
                    continue
                measured = points[label][case].get(str(target), {}).get(key)
                rows.append(
                    {
                        "case": case,
                        "code": label,
                        "of": name,
                        "law": f"{law.factor:.3g} x {unit}^{law.power:.2f}",
                        "residual": f"{law.residual:.0%} ({law.points} points)",
                        f"at {target:,}": measured if measured is not None else f"{law(target):.3g} (fitted)",
                    }
                )
    return rows


def curves(points: dict[str, Any], cases: Mapping[str, Any], key: str, unit: str, path: Path) -> bool:
    """An SVG of one quantity against ``unit``, both on logarithmic axes; False where nothing was measured."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "archipel"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.2))
    drawn, places = 0, set[int]()
    for number_, case in enumerate(cases):
        for label in LABELS:
            found = points.get(label, {}).get(case, {})
            xy = sorted((int(n), one[key]) for n, one in found.items() if one.get(key) and not one.get("failed"))
            if not xy:
                continue
            style = {
                "color": f"C{number_}",
                "linestyle": ":" if label == "before" else "-",
                "marker": "o",
                "markersize": 3,
            }
            axes.plot(*zip(*xy, strict=True), label=case + (" (before)" if label == "before" else ""), **style)
            drawn += 1
            places |= {n for n, _ in xy}
    if drawn:
        axes.set(
            xscale="log",
            yscale="log",
            xlabel=unit,
            ylabel="CPU seconds" if key == "cpu" else "peak, MiB above the start",
        )
        axes.set_xticks(sorted(places), [f"{n:,}" for n in sorted(places)])  # where it was measured
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
        with store.aside(path) as temporary:
            figure.savefig(temporary, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    return bool(drawn)


_PARTS: tuple[tuple[str, str, Mapping[str, Callable[..., Any]], int], ...] = (
    ("clips", "clips", clips.CASES, TARGET),
    ("experts", "experts", models.EXPERTS, 64),
    ("frames", "frames", models.FRAMES, 128),
    ("resolution", "pixels a side", models.SIZES, 512),
)


def write(record: dict[str, Any], out: Path) -> Path:
    """The page and its curves beside ``out``; returns the page."""
    points, facts = record["points"], record["machine"]
    said = [one for label in points.values() for case in label.values() for one in case.values()]
    dates, loads = sorted({one["date"] for one in said}), [one["load"] for one in said]
    lines = [
        "# Scale curves",
        "",
        "Made by `python -m bench.scale` (a second call goes on where the first ended). Every point is a process of its own on one",
        "thread; peak memory is what it held at most beyond what it began with (VmHWM), mapped pages counted. Laws go through the",
        "last three points in logarithms; the residual is the largest relative error there. Fewer than three points give no law.",
        "",
        f"{facts['cpu']}, {facts['cores']} cores, {facts['system']}; {', '.join(f'{a} {b}' for a, b in facts['versions'].items())}.",
        f"Measured on {' to '.join(dict.fromkeys([dates[0], dates[-1]]))} at a load beyond ours of {min(loads):.0f} to {max(loads):.0f}: "
        "**read CPU seconds, wall seconds say how busy the machine was**.",
        "",
        "## Walls, and where they are now",
        "",
        _WALLS,
    ]
    for name, unit, cases, target in _PARTS:
        rows = _rows(cases, points, unit)
        if not rows:
            continue
        lines += [f"## Against {name}", ""]
        for key in ("cpu", "peak"):
            path = out.with_name(f"scale-{name}-{key}.svg")
            if curves(points, cases, key, unit, path):
                lines += [f"![{key} against {name}]({path.name})", ""]
        known = {row["case"] for row in rows}
        lines += [f"- **{case}**: {' '.join((cases[case].__doc__ or '').split())}" for case in cases if case in known]
        lines += ["", *table(rows), ""]
        laws = _laws(cases, points, unit.replace(" ", "-"), target)
        if laws:
            lines += ["### Laws", "", *table(laws), ""]
    page = out.with_suffix(".md")
    store.write_text(page, "\n".join(lines) + "\n")
    return page


__all__ = ["curves", "write"]
