"""Section 'partition': what each cluster is about, its size, and how much the split is worth."""

from __future__ import annotations

from typing import Any

from archipel.manifest import SPLITS
from archipel.report.media import sheet_uri
from archipel.report.reading import Reader, finite, floats, mapping
from archipel.report.svg import bar_chart, number, tone

SHEETS = 16  # clusters whose contact sheet is shown
CAPTIONS = 8


def quality_facts(quality: Any) -> list[tuple[str, str]]:
    facts = []
    silhouette = finite(quality.get("silhouette"))
    if silhouette is not None:
        facts.append(("silhouette (cosine, −1 to 1)", number(silhouette)))
    stability = quality.get("stability")
    agreement = finite(mapping(stability).get("mean")) if not isinstance(stability, (int, float)) else finite(stability)
    if agreement is not None:
        low = finite(mapping(stability).get("min"))
        text = number(agreement) + (f" (lowest {number(low)})" if low is not None else "")
        facts.append(("agreement over seeds (adjusted Rand)", text))
    fine = mapping(quality.get("fine"))
    if finite(fine.get("centroids")) is not None:
        facts.append(("fine centroids", f"{fine['centroids']} (asked for {fine.get('asked', '–')})"))
    largest = finite(quality.get("largest_share"))
    if largest is not None:
        facts.append(("share of the largest cluster", f"{largest:.0%}"))
    moved = finite(quality.get("moved_groups"))
    if moved is not None:
        facts.append(("content groups moved to fill a cluster", number(moved)))
    return facts


def _cards(reader: Reader, captions: Any, counts: dict[str, list[float]]) -> list[dict[str, Any]]:
    folder, k = reader.run.partition, reader.run.config.partition.k
    longest = 640 if k <= 6 else 400
    cards = []
    for which in range(min(k, SHEETS)):
        card: dict[str, Any] = {"cluster": which, "tone": tone(which), "sheet": None, "captions": []}
        path = folder / f"sheet-{which}.png"
        if path.is_file():
            try:
                uri, width, height = sheet_uri(path, longest=longest)
                card["sheet"] = {"src": uri, "width": width, "height": height}
            except (OSError, ValueError) as error:
                reader.note(path, error)
        entries = mapping(captions).get(str(which)) or (
            captions[which] if isinstance(captions, list) and which < len(captions) else []
        )
        for entry in list(entries)[:CAPTIONS]:
            card["captions"].append(str(mapping(entry).get("caption", entry) if not isinstance(entry, str) else entry))
        card["sizes"] = ", ".join(f"{row[which]:.0f} {split}" for split, row in counts.items() if which < len(row))
        cards.append(card)
    return cards


def partition(reader: Reader, shares: dict[str, list[float]]) -> dict[str, Any]:
    """Context of the section. ``shares``: share of generated clips per cluster by arm's label, beside the data's."""
    run = reader.run
    quality = mapping(reader.json(run.partition / "quality.json"))
    if not quality:
        return {"missing": reader.command("partition")}
    sizes = mapping(quality.get("sizes"))
    clips = mapping(sizes.get("clips", sizes))
    counts = {str(split): floats(clips.get(split)) for split in SPLITS if floats(clips.get(split))}
    captions = reader.json(run.partition / "captions.json")
    k = run.config.partition.k
    names = [f"cluster {which}" for which in range(k)]
    tones = ("real", "codec", "arch", "mono")  # training clips, these captions' real clips, primary strategy, monolith
    drawn = [(label, css, row) for (label, row), css in zip(shares.items(), tones, strict=False)]
    chart = bar_chart(names, drawn, "Share of clips per cluster, the data beside generated clips")
    return {
        "missing": "",
        "method": quality.get("method", run.config.partition.method),
        "features": quality.get("features", run.config.partition.features),
        "k": k,
        "facts": quality_facts(quality),
        "cards": _cards(reader, captions, counts),
        "hidden": max(0, k - SHEETS),
        "shares": chart,
        "share_table": {
            "caption": "",
            "columns": ["clips", *names],
            "rows": [[label, *(f"{v:.0%}" for v in row)] for label, row in shares.items()],
        },
    }
