"""The trained archipelago that ships with the package: where it lies and what it says of itself. Reads small files only.

A box is a folder beside this file, made by ``archipel pack`` (``archipel.exchange.pack``): a run's folder with what generating
needs and nothing more, in half precision, ``box.json`` with what it is, and its model card. No network, no cache.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from archipel import FORMAT
from archipel.errors import ArchipelError

ADDRESS = "box:"
"""``box:`` or ``box:NAME`` stands for a shipped model wherever a run's folder can be given."""
FACTS, CARD = "box.json", "README.md"
KIND = "box"


def root() -> Path | None:
    """The folder of the shipped models; None where the package is not installed as plain files."""
    import importlib.resources  # here and below: the command line's help must not wait for them

    found = importlib.resources.files(__name__)
    return found if isinstance(found, Path) else None


def names() -> list[str]:
    """Shipped models, in order; the first is the one that is used where none is named."""
    folder = root()
    return [] if folder is None else sorted(path.parent.name for path in folder.glob(f"*/{FACTS}"))


def folder(name: str = "") -> Path:
    """The folder of a shipped model ("": the first). Raises ArchipelError where there is none, or none of that name."""
    there, top = names(), root()
    if top is None or not there:
        raise ArchipelError(
            "this installation has no model of its own: give a run (its folder, or the URL of a bucket)"
        )
    if name and name not in there:
        near = difflib.get_close_matches(name, there, 1)
        raise ArchipelError(f"{ADDRESS}{name} is not here: {near[0] if near else 'there is ' + ', '.join(there)}")
    return top / (name or there[0])


def is_address(where: object) -> bool:
    return isinstance(where, str) and where.startswith(ADDRESS) and "/" not in where


def locate(where: Path | str | None) -> Path | str:
    """A run's folder or URL as it is; None and ``box:NAME`` as the shipped model's folder. Raises ArchipelError."""
    if where is None:
        return folder()
    return folder(where.removeprefix(ADDRESS)) if isinstance(where, str) and is_address(where) else where


def is_box(where: Path | str) -> bool:
    """Whether a folder was made by ``archipel pack``, shipped or not."""
    return "://" not in str(where) and (Path(where) / FACTS).is_file()


def facts(where: Path) -> dict[str, Any]:
    """``box.json`` of a box. Raises ArchipelError where it is none or of a newer format, DamagedError."""
    from archipel import store

    value = store.read_json(where / FACTS)
    if not isinstance(value, dict) or value.get("kind") != KIND or not isinstance(value.get("format"), int):
        raise ArchipelError(f"{where / FACTS} does not describe a model that `archipel pack` made")
    if value["format"] > FORMAT:
        raise ArchipelError(
            f"{where / FACTS} has format {value['format']}, this Archipel reads format {FORMAT}: install a newer Archipel"
        )
    return value


def summary(where: Path, facts: dict[str, Any]) -> list[str]:
    """What a box is, in a few lines for people."""
    experts = [name for name in facts["admitted"] if name.isdigit()]
    size = sum(int(entry["bytes"]) for entry in facts["files"].values())
    said = [f"{facts['name']}: {len(experts)} experts and a router, {size / 1e6:.1f} MB, run {facts['run'][:12]}"]
    said += [f"  made by {facts['made_by']}" + (f", commit {facts['commit'][:12]}" if facts["commit"] else "")]
    said += [f"  licence of the weights: {facts['licence']}"] if facts["licence"] else []
    said += [f"  admitted {name}: {told}" for name, told in facts["admitted"].items()]
    said += ["  captions to try: " + "; ".join(facts["examples"]["captions"][:10])]
    return [*said, f"  model card: {where / CARD}, or `archipel model --card`"]


def home() -> Path:
    """Where a server of a shipped model keeps its jobs and clips: in the user's data folder, never in the package's."""
    import platformdirs

    return Path(platformdirs.user_data_dir("archipel")) / "serving"
