"""All head-to-heads, one after the other.

    python -m bench [--only NAME ...] [--goals] [--long] [--small] [--out docs/benchmarks]

Writes OUT/<date>.json and OUT/<date>.md. What the day's file already holds of other benchmarks stays. A benchmark whose
contenders differ, or that lacks a package, is named on the page with the reason and stops no other.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from archipel import store
from bench.common import BUSY, BUSY_CORES, AbsentError, DifferentError

GOALS = (
    "startup",
    "training_step",
    "checkpoint_stall",
    "backbone_loop",
    "top1",
    "sampling",
    "cache_reading",
    "clip_decoding",
    "frechet",
)
QUICK = (
    *GOALS,
    "lora_experts",
    "moments_memory",
    "plan_memory",
    "intervals",
    "islands",
)
ENGINES = ("first_step",)  # needs Ray (make setup-ray)
CARDS = ("gpu",)  # needs a CUDA GPU
LONG = ("representation",)  # hours; needs the emoji's package


def number(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {number(one)}" for key, one in value.items())
    return str(value)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown table of rows that have the same keys."""
    heads = list(rows[0])
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    return lines + ["| " + " | ".join(number(row.get(head)) for head in heads) + " |" for row in rows]


def line(row: dict[str, Any]) -> dict[str, Any]:
    """One row of a record as a row of the page."""

    def spread(ratios: dict[str, float]) -> str:
        return f"{ratios['median']:.3f} ({ratios['p10']:.3f} to {ratios['p90']:.3f})"

    judged_by_cpu = row["met"] is not None and row["judged_by"] == "cpu"
    return {
        "case": row["case"],
        "against": row["against"],
        "ours, s": row["seconds"],
        "theirs, s": row["seconds_against"],
        "ratio, wall": spread(row["wall"]),
        "ratio, CPU": spread(row["cpu"]),
        "rounds": row["rounds"],
        "aim": f"at most {row['aim']:.4g}" if row["aim"] is not None else "",
        "met": {None: "", True: "yes", False: "**no**"}[row["met"]] + (" (CPU)" if judged_by_cpu else ""),
    }


def overview(records: dict[str, dict[str, Any]]) -> list[str]:
    """All rows that have an aim, in one table."""
    rows = []
    for name, record in records.items():
        for row in record["rows"]:
            if row["aim"] is None:
                continue
            ratio = row[row["judged_by"]]["median"]
            full = line(row)
            rows.append(
                {
                    "benchmark": name,
                    "case": row["case"],
                    "against": row["against"],
                    "ratio": f"{ratio:.3f}",
                    "aim": full["aim"],
                    "met": full["met"],
                }
            )
    met = sum(not row["met"].startswith("**") for row in rows)
    return ["", "## Goals", "", f"{met} of {len(rows)} are met.", "", *table(rows)] if rows else []


def page(date: str, records: dict[str, dict[str, Any]]) -> str:
    """The Markdown page of a day's records."""
    lines = [
        f"# Head-to-heads of {date}",
        "",
        "Made by `make bench`. A ratio is our seconds over theirs in neighbouring turns: median (10th to 90th percentile)",
        "over the rounds; below 1 we are faster. Contenders take turns on one thread and must give equal results first.",
        f"Where other work kept the machine busy (more than {BUSY_CORES:g} cores meanwhile, or a load beyond ours above {BUSY:g}",
        "where the system does not say), the CPU ratio is judged instead of the wall-clock one.",
        *overview(records),
    ]
    for name, record in records.items():
        lines += ["", f"## {name}: {record['what']}", ""]
        if "failed" in record:
            lines += [f"**Nothing is reported: {record['failed']}.**"]
            continue
        facts, load = record["machine"], record["load"]
        if record["busy"]:
            lines += ["**The machine was busy with other work: wall-clock numbers are not to be trusted.**", ""]
        if record["rows"]:
            lines += [*table([line(row) for row in record["rows"]]), ""]
        for title, rows in record["tables"].items():
            lines += [f"### {title}", "", *table(rows), ""]
        lines += [f"- {key}: {number(value)}" for key, value in record["facts"].items()]
        lines += [f"- not installed, so not compared: {', '.join(record['absent'])}"] if record.get("absent") else []
        versions = ", ".join(f"{key} {value}" for key, value in facts["versions"].items())
        lines += [
            f"- {facts['cpu']}, {facts['cores']} cores, {facts['threads']} thread used; {facts['system']}; {versions}",
            f"- load beyond ours {load['beyond_ours_before']} before, {load['beyond_ours_after']} after"
            + (f", cores kept busy by others {load['cores_of_others']}" if "cores_of_others" in load else "")
            + (f"; took {record['took']:.0f} s" if "took" in record else "")
            + f"; {record['date']}, commit {record['commit'] or 'unknown'}",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", action="append", choices=(*QUICK, *CARDS, *ENGINES, *LONG), help="may be given several times"
    )
    parser.add_argument(
        "--goals", action="store_true", help=f"only {', '.join(GOALS)}: what there are goals of speed for"
    )
    parser.add_argument("--long", action="store_true", help=f"also {', '.join(LONG)}, which takes hours")
    parser.add_argument("--small", action="store_true", help="only to see that all works; prints, writes nothing")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    date, failed = time.strftime("%Y-%m-%d"), []
    path = options.out / f"{date}.json"
    records = store.read_json(path) if path.exists() and not options.small else {}
    usual = GOALS if options.goals else QUICK
    for name in options.only or (*usual, *(ENGINES if options.long else ()), *(LONG if options.long else ())):
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            records[name] = importlib.import_module(f"bench.{name}").run(options.small)
        except (AbsentError, DifferentError, ModuleNotFoundError) as error:
            print(f"{name}: {error}: nothing is reported", file=sys.stderr)
            records[name] = {"benchmark": name, "what": "not measured", "rows": [], "failed": str(error)}
            failed.append(name)
        if not options.small:
            store.write_json(path, records)
            store.write_text(path.with_suffix(".md"), page(date, records))
    print(page(date, records))
    print(json.dumps({"written": str(path)} if not options.small else {"small": True}), file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
