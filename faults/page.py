"""The tables of docs/reliability.md from the records of a day: between markers, so that prose around them stays.

python -m faults.page docs/reliability.md docs/reliability/<date>.json
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from archipel import store
from faults.common import plain

ORDER = ("races", "kills", "damage", "proxied", "stopped", "network", "disk", "clocks")
SHOWN = 40  # refusals quoted of each fault


def cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {cell(part)}" for key, part in value.items())
    return str(value).replace("|", "\\|").replace("\n", " ")


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown table; heads in the order in which rows bring them."""
    if not rows:
        return []
    heads = list(dict.fromkeys(head for row in rows for head in row))
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    return lines + ["| " + " | ".join(cell(row.get(head, "")) for head in heads) + " |" for row in rows]


def summary(records: dict[str, Any]) -> str:
    """One line per fault: how many were made and whether all ended as promised."""
    rows = [
        {
            "fault": name,
            "what was done": record["what"],
            "made": record["made"],
            "as promised": "all" if record["ok"] else f"**no: {len(record['problems'])} problems**",
            "seconds": f"{record['seconds']:.0f}",
            "seed": record["seed"],
            "date, commit": f"{record['date']}, {record['commit'] or 'unknown'}",
        }
        for name in ORDER
        if (record := records.get(name))
    ]
    return "\n".join(table(rows))


def section(name: str, record: dict[str, Any]) -> str:
    """A fault's own tables, facts and refusals."""
    lines = [*table(_totalled(record["rows"])), ""]
    lines += [f"- {key}: {cell(value)}" for key, value in record["facts"].items()]
    lines += [f"- problem: {cell(text)}" for text in record["problems"]]
    quoted = sorted(record["refusals"].items())
    if name == "damage":  # one of each kind of file
        quoted = list({kind.rpartition(", ")[0]: (kind, text) for kind, text in reversed(quoted)}.values())[::-1]
    quoted = list(
        {_alike(_said(text)[1:]) if name != "damage" else kind: (kind, text) for kind, text in quoted}.values()
    )[:SHOWN]
    if quoted:
        lines += ["", "What was said, one of each kind:" if name != "damage" else "What was said, for example:", ""]
        lines += [f"- {_said(text)}" + (f" ({kind})" if name == "damage" else "") for kind, text in quoted]
    command = f"python -m faults --only {name}" + ("" if record["share"] == 1 else f" --share {record['share']:g}")
    lines += ["", f"Repeat: `{command} --seed {record['seed']}`"]
    return "\n".join(lines).strip()


def _said(text: str) -> str:
    return "`" + plain(text).replace("`", "'")[:280] + "`"


def _alike(text: str) -> str:
    """What two sayings have in common that differ in numbers, names of jobs, or in how they were printed."""
    return re.sub(r"\d+|job \w+|^(WARNING|ERROR|error): |jobs/\S+|[0-9a-f]{12,}", "#", text)[:100].lstrip("# ")


def _totalled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with a last one of sums, where they hold counts."""
    if len(rows) < 2:
        return rows
    first = next(iter(rows[0]))
    sums: dict[str, Any] = {first: "**all**"}
    for row in rows:
        for key, value in row.items():
            if key != first and isinstance(value, int) and not isinstance(value, bool) and key in SUMMED:
                sums[key] = sums.get(key, 0) + value
    return [*rows, sums] if len(sums) > 1 else rows


SUMMED = {
    "races", "runs", "one winner", "several", "none", "losers who did not know the winner", "errors", "kills", "islands",
    "went on from a checkpoint", "accepted work lost", "requests", "faults made", "times", "read as before", "healed",
    "refused by name", "killed while holding a job", "killed while sending its result", "killed while between jobs",
    "killed while starting or waiting", "ends with a sentence and code 2",
}  # fmt: skip


def renew(path: Path, records: dict[str, Any]) -> None:
    """Put the tables between their markers, <!-- faults:NAME --> ... <!-- end -->. A page without markers is an error."""
    text = path.read_text(encoding="utf-8")
    parts = {"summary": summary(records)} | {name: section(name, record) for name, record in records.items()}
    for name, part in parts.items():
        marker = re.compile(rf"(<!-- faults:{name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not (found := marker.search(text)):
            raise ValueError(f"{path} has no place for {name}: <!-- faults:{name} --> ... <!-- end -->")
        text = text[: found.end(1)] + part + "\n" + text[found.start(2) :]
    store.write_text(path, text)


if __name__ == "__main__":
    renew(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
