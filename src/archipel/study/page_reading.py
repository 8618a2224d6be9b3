"""The files of a study as the page reads them: what is missing is empty, what is damaged is noted, nothing is trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from archipel import store
from archipel.errors import ArchipelError
from archipel.report.reading import ARM_LABELS, finite, mapping

CHOOSING = "validation"
FEW = 100  # content groups under which no conclusion is drawn
FAMILIES = (
    ("real", "References"),
    ("archipelago", "Archipelago"),
    ("monolith", "Monoliths"),
    ("control", "Controls"),
    ("bound", "Bounds: not methods, they use what no prompt gives"),
    ("ablation", "Arms of the ablations"),
)
TONES = {"monolith": "mono", "control": "t1", "bound": "t7", "ablation": "t4"}


def entries(value: Any) -> list[Mapping[str, Any]]:
    """The mappings of a list; [] where ``value`` is none."""
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []


def words(value: Any) -> list[str]:
    """The texts and numbers of a list, as text."""
    found = value if isinstance(value, list) else [value]
    return [str(one) for one in found if isinstance(one, (str, int, float)) and str(one)]


def capital(text: str) -> str:
    """``text`` with a capital at its beginning."""
    return text[:1].upper() + text[1:]


def sentence(text: str) -> str:
    """``text`` as a sentence: a capital at its beginning and a stop at its end."""
    text = capital(text.strip())
    return text if not text or text[-1] in ".!?:…" else text + "."


class StudyFiles:
    """study.json, table.json and kept clips of one study folder. ``problems`` names what could not be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[str] = []
        self.study = mapping(self._json("study.json", dict))
        self.rows = [row for row in entries(self._json("table.json", list)) if finite(row.get("value")) is not None]
        self.written = bool(self.study)
        self.name = str(self.study.get("name") or "RUN")
        primary = mapping(self.study.get("primary"))
        self.arm, self.metric = str(primary.get("arm", "")), str(primary.get("metric", ""))
        self.baseline = str(mapping(self.study.get("baseline")).get("chosen") or "")
        self._by = {(str(r.get("set", "test")), str(r.get("arm")), str(r.get("metric"))): r for r in self.rows}
        self.arms = self._arms()
        self._named = {str(one["name"]): one for one in self.arms}
        scored = dict.fromkeys(where for where, _, _ in self._by)
        self.named = list(dict.fromkeys(mapping(self.study.get("sets"))) | scored)
        # Prompt sets with scores, test captions first; validation clips, which only choose, are not results.
        self.sets = sorted((w for w in scored if w != CHOOSING), key=lambda where: where != "test")

    def _json(self, name: str, kind: type) -> Any:
        path = self.folder / name
        try:
            if not path.is_file():
                raise ArchipelError("is not there")
            value = store.read_json(path)
            if not isinstance(value, kind):
                raise ArchipelError(f"holds no {'list' if kind is list else 'object'}")
        except (ArchipelError, OSError, ValueError) as error:
            self.note(name, error)
            return None
        return value

    def note(self, name: str, error: Exception) -> None:
        """Keep a problem, without paths of this machine."""
        said = str(error).replace(f"{self.folder}/", "").replace(f"{self.folder.resolve()}/", "")
        entry = said if name in said else f"{name}: {said}"
        if entry not in self.problems:
            self.problems.append(entry)

    def _arms(self) -> list[Mapping[str, Any]]:
        """Arms in the order of the table: by family, real clips, codec, the primary arm and the baseline first."""
        listed = [one for one in entries(self.study.get("arms")) if isinstance(one.get("name"), str)]
        names = {one["name"] for one in listed}
        loose = dict.fromkeys(arm for _, arm, _ in self._by if arm not in names)
        listed += [{"name": arm, "family": arm if arm == "real" else "control"} for arm in loose]
        families = [name for name, _ in FAMILIES]
        first = ["real", "codec", self.arm, self.baseline]

        def place(one: Mapping[str, Any]) -> tuple[int, int]:
            name = one["name"]
            return (
                families.index(_family(one)),
                first.index(name) if name in first else len(first),
            )

        return sorted(listed, key=place)

    def family(self, arm: str) -> str:
        return _family(self._named.get(arm, {}))

    def title(self, arm: str) -> str:
        """The name that people read."""
        return capital(str(self._named.get(arm, {}).get("title") or ARM_LABELS.get(arm, arm)))

    def about(self, arm: str) -> str:
        return str(self._named.get(arm, {}).get("about") or "")

    def tone(self, arm: str) -> str:
        """CSS class of an arm's colour."""
        family = self.family(arm)
        if family == "real":
            return "codec" if arm == "codec" else "real"
        if family == "archipelago":
            return "arch" if arm == self.arm else "other"
        return TONES[family]

    def costs(self, arm: str) -> Mapping[str, Any]:
        return mapping(self._named.get(arm, {}).get("costs"))

    def score(self, where: str, arm: str, metric: str) -> Mapping[str, Any] | None:
        return self._by.get((where, arm, metric))

    def metrics(self, where: str) -> list[str]:
        """Metrics of one prompt set, the primary one first."""
        found = list(dict.fromkeys(metric for one, _, metric in self._by if one == where))
        return sorted(found, key=lambda metric: metric != self.metric)

    def unit(self, metric: str) -> str:
        """The unit of a metric where it has one that says more than its name."""
        units = {str(row.get("unit") or "") for row in self.rows if row.get("metric") == metric}
        return next((unit for unit in units if unit not in ("", "score", "cosine")), "")

    def set_title(self, where: str) -> str:
        return capital(str(mapping(mapping(self.study.get("sets")).get(where)).get("title") or where))

    def groups(self, where: str) -> float | None:
        """Content groups of a prompt set."""
        told = finite(mapping(mapping(self.study.get("sets")).get(where)).get("groups"))
        if told is not None:
            return told
        counted = [
            n for row in self.rows if row.get("set", "test") == where and (n := finite(row.get("groups"))) is not None
        ]
        return min(counted, default=None)

    def few(self, where: str) -> bool:
        groups = self.groups(where)
        return groups is not None and groups < FEW

    @property
    def seeds(self) -> list[str]:
        return words(self.study.get("seeds"))

    @property
    def command(self) -> str:
        """What to type to repeat the study. Only the run's name: a page is passed on, a home directory is not."""
        told = self.study.get("command")
        if isinstance(told, str) and told:
            return told
        return f"archipel study {self.name}" + (f" --seeds {len(self.seeds)}" if self.seeds else "")

    def relative(self, arm: str) -> float | None:
        """Training FLOPs of ``arm`` over the baseline's."""
        own, base = (finite(self.costs(one).get("training_flops")) for one in (arm, self.baseline))
        return own / base if own is not None and base else None

    def compared(self) -> Mapping[str, Any] | None:
        """The comparison that decides."""
        deciding = [row for row in entries(self.study.get("comparisons")) if row.get("primary") is True]
        return next((row for row in deciding if row.get("set") == "test"), deciding[0] if deciding else None)

    def first_seed(self, where: str) -> str:
        """The seed whose clips are shown: the one named beside them, else the first that there are clips of."""
        told = words(mapping(mapping(self.study.get("samples")).get(where)).get("seed"))
        if told:
            return told[0]
        folders = self.folder.joinpath("samples", where).glob("s*") if _plain(where) else []
        kept = sorted(int(one.name[1:]) for one in folders if one.name[1:].isdecimal() and one.is_dir())
        return str(kept[0]) if kept else "0"

    def clips(self, where: str, arm: str, seed: str) -> np.ndarray | None:
        """Kept clips uint8 (M, F, H, W, 3) of one arm, or None where there are none (noted where damaged)."""
        if not all(map(_plain, (where, arm, seed))):
            return None
        name = f"samples/{where}/s{seed}/{arm}.safetensors"
        path = self.folder / name
        if not path.is_file():
            return None
        try:
            clips = store.map_tensors(path).get("clips")
        except (ArchipelError, OSError, ValueError) as error:
            self.note(name, error)
            return None
        if clips is None or clips.ndim != 5 or clips.shape[-1] != 3 or clips.dtype != np.uint8 or 0 in clips.shape:
            self.note(name, ValueError("holds no clips of bytes (N, F, H, W, 3)"))
            return None
        return clips


def _plain(name: str) -> bool:
    """Whether ``name`` is the name of a file or folder and nothing more."""
    return name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


def _family(arm: Mapping[str, Any]) -> str:
    """The family of an entry of "arms"; real clips and the codec are references whatever it says."""
    if arm.get("name") in ("real", "codec"):
        return "real"
    found = arm.get("family")
    return found if found in dict(FAMILIES) else "control"


def ends(value: Any) -> tuple[float | None, float | None, float | None]:
    """(value, low, high) of such a mapping, None for what is no finite number."""
    found = mapping(value)
    return finite(found.get("value")), finite(found.get("low")), finite(found.get("high"))


def duration(seconds: float) -> str:
    """'42 s', '7.5 min' or '3.2 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def flat(value: Mapping[str, Any], before: str = "") -> Sequence[tuple[str, Any]]:
    """Leaves of nested mappings with their keys joined by spaces."""
    found: list[tuple[str, Any]] = []
    for key, inner in value.items():
        name = f"{before} {key}".strip().replace("_", " ")
        if isinstance(inner, Mapping):
            found += flat(inner, name)
        elif isinstance(inner, list):
            found.append((name, ", ".join(words(inner))))
        elif isinstance(inner, (str, int, float)):
            found.append((name, inner))
    return found
