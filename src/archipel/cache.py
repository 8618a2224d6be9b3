"""Content-addressed, resumable, memory-mapped rows: what *prepare* makes once and every later stage reads.

An entry is a folder ``<kind>-<key>`` of safetensors shards. What it guarantees:

- **Address.** ``key`` is the sha256 of the kind, of everything that made the rows (``spec``: clips, window, encoder,
  hash of its weights, dtype, version of its code) and of the cut into shards. Another spec is another folder; the
  folder of an older spec is never touched.
- **Commit.** A shard is written aside, renamed, and then listed with its sha256: ``partial.json`` has what an earlier attempt
  left, ``partial.jsonl`` a line for each shard since. ``card.json`` comes last. A folder without a card is unfinished and is
  never opened.
- **Resume.** A build that was killed continues at the first shard that is missing, not listed, or not what its sha256
  says. A committed entry whose shard is gone or has another size is taken back and that shard made again.
- **Order.** ``order`` and ``batch_rows`` are functions of their arguments alone, the same for every numpy and every
  machine, so that the position in an endless sequence of epochs is one integer: the step.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archipel import store
from archipel.errors import ArchipelError, DamagedError, MissingStageError
from archipel.progress import Progress, StopFlag

Make = Callable[[int, int], Mapping[str, np.ndarray]]
MakeAll = Callable[[Sequence[tuple[int, int]]], Generator[Mapping[str, np.ndarray], None, None]]
_PARTIAL, _JOURNAL = "partial.json", "partial.jsonl"
OPEN = 64  # shards that one tensor's rows hold open at a time
_INDEX = "index.json"
_WORD = 1 << 64


# --- reading ---------------------------------------------------------------------------------------------------------


class Rows:
    """One named tensor of an entry: rows of one shape and dtype across shards, read through memory maps.

    ``rows[7]`` is one row, ``rows[2:9]`` and ``rows[array([5, 0, 5])]`` are batches in the order asked for. What is
    returned is always a fresh, writable array; nothing but the rows asked for is read. At most ``OPEN`` shards are held open,
    whatever their number: a process may usually have 1,024 open files, which 16,000 clips' features would have used up.
    """

    def __init__(self, name: str, shards: Sequence[tuple[Path, int]], row_shape: tuple[int, ...], dtype: Any) -> None:
        """shards: files and their numbers of rows. Raises DamagedError, once it is touched, where a file does not fit."""
        self._name, self._shards = name, [(path, count) for path, count in shards if count]
        self._ends = np.cumsum([count for _, count in self._shards], dtype=np.int64)
        self._starts = self._ends - [count for _, count in self._shards]
        self._held: OrderedDict[int, np.ndarray] = OrderedDict()
        self.row_shape, self.dtype = row_shape, np.dtype(dtype)

    def _part(self, number: int) -> np.ndarray:
        held = self._held.get(number)
        if held is not None:
            self._held.move_to_end(number)
            return held
        path, count = self._shards[number]
        found = store.map_tensors(path, (self._name,)).get(self._name)
        if found is None or found.dtype != self.dtype or found.shape != (count, *self.row_shape):
            shape = "missing" if found is None else f"{found.dtype} {found.shape}"
            raise DamagedError(f"{path}: {self._name} is {shape}, expected {self.dtype} {(count, *self.row_shape)}")
        while len(self._held) >= OPEN:
            self._held.popitem(last=False)
        self._held[number] = found.view(np.ndarray)  # as a plain array: memmap's own indexing is slower
        return self._held[number]

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self.row_shape)

    def __getitem__(self, rows: int | np.integer[Any] | slice | NDArray[Any] | list[int]) -> np.ndarray:
        """Rows by number, slice, integer array or mask (N,). Raises IndexError outside [-N, N)."""
        if isinstance(rows, (int, np.integer)):
            one: np.ndarray = self._take(np.asarray([rows]))[0].copy()
            return one
        if isinstance(rows, slice):
            return self._take(np.arange(*rows.indices(len(self))))
        wanted = np.asarray(rows)
        if wanted.dtype == np.bool_:
            if wanted.shape != (len(self),):
                raise IndexError(f"a mask of shape {wanted.shape} does not fit {len(self)} rows")
            wanted = np.flatnonzero(wanted)
        if wanted.ndim != 1 or (wanted.size and not np.issubdtype(wanted.dtype, np.integer)):
            raise IndexError("rows are asked for by an int, a slice, or a one-dimensional array of ints or bools")
        return self._take(wanted.astype(np.int64))

    def _take(self, wanted: NDArray[np.int64]) -> np.ndarray:
        count = len(self)
        if wanted.size and (wanted.min() < -count or wanted.max() >= count):
            raise IndexError(f"a row among {wanted[:8].tolist()} is outside the {count} rows there are")
        wanted = np.where(wanted < 0, wanted + count, wanted)
        if not wanted.size:
            return np.empty((0, *self.row_shape), self.dtype)
        taken = np.empty((len(wanted), *self.row_shape), self.dtype)
        owner = np.searchsorted(self._ends, wanted, side="right")
        order = np.argsort(owner, kind="stable")
        numbers, begins = np.unique(owner[order], return_index=True)
        for number, where in zip(numbers.tolist(), np.split(order, begins[1:]), strict=True):
            taken[where] = self._part(number)[wanted[where] - self._starts[number]]
        return taken


@dataclass(frozen=True)
class Entry:
    """A committed entry. ``names`` are its tensors, all of ``rows`` rows; ``entry[name]`` reads one.

    shards: file names in order; counts: rows of each; layout: name -> [dtype, axes of a row].
    """

    folder: Path
    rows: int
    names: tuple[str, ...]
    spec: dict[str, Any]
    shards: tuple[str, ...]
    counts: tuple[int, ...]
    layout: dict[str, list[Any]]

    @classmethod
    def of(cls, folder: Path, card: Mapping[str, Any]) -> Entry:
        shards = tuple(sorted(card["files"]))
        counts = tuple(int(card["shards"][name]["rows"]) for name in shards)
        layout = {name: list(one) for name, one in card["layout"].items()}
        return cls(folder, int(card["rows"]), tuple(card["names"]), dict(card["spec"]), shards, counts, layout)

    def __getitem__(self, name: str) -> Rows:
        if name not in self.names:
            raise KeyError(f"{self.folder} has no tensor {name!r}: it has {', '.join(self.names)}")
        if sum(self.counts) != self.rows:
            raise DamagedError(f"{self.folder}: {name!r} has {sum(self.counts)} rows, card.json says {self.rows}")
        dtype, *shape = self.layout[name]
        files = [(self.folder / shard, count) for shard, count in zip(self.shards, self.counts, strict=True)]
        return Rows(name, files, tuple(int(axis) for axis in shape), dtype)


def open_entry(folder: Path) -> Entry:
    """Open a committed entry. Raises DamagedError where it has no card (unfinished) or a card of something else."""
    card = store.read_card(folder, "cache")
    if card is None:
        raise DamagedError(f"{folder} is unfinished (no card.json): run `archipel prepare` again to finish it")
    return Entry.of(folder, card)


def set_index(root: Path, folders: Mapping[str, str]) -> None:
    """Name the entries a run uses: kind -> folder name. Kinds that are not named keep what they had."""
    before = _read_index(root)
    after = {**before, **folders}
    if after != before:
        store.write_json(root / _INDEX, after)


def _read_index(root: Path) -> dict[str, str]:
    path = root / _INDEX
    if not path.exists():
        return {}
    index = store.read_json(path)
    if not isinstance(index, dict) or any(
        not isinstance(name, str) or Path(name).name != name for name in index.values()
    ):
        raise DamagedError(f"{path} is not an index of cache folders; remove it and run `archipel prepare` again")
    return index


def open_kind(root: Path, kind: str) -> Entry:
    """The run's entry of a kind. Raises MissingStageError naming `archipel prepare` where it is not there, or no longer
    whole (a shard gone or of another size)."""
    name = _read_index(root).get(kind)
    card = _committed(root / name) if name is not None else None
    if name is None or card is None:
        raise MissingStageError(f"{root} holds no finished {kind}: run `archipel prepare {root.parent}` first")
    return Entry.of(root / name, card)


# --- building --------------------------------------------------------------------------------------------------------


def key_of(kind: str, spec: Mapping[str, Any], items: int, per_shard: int = 64) -> str:
    """The address of an entry: sha256 (64 hex digits) of the canonical JSON of all that decides its bytes."""
    return store.sha256_json({"kind": kind, "spec": dict(spec), "items": items, "per_shard": per_shard})


def build(
    root: Path,
    kind: str,
    spec: Mapping[str, Any],
    items: int,
    make: Make,
    *,
    run_id: str,
    label: str,
    stop: StopFlag | None = None,
    per_shard: int = 64,
    make_all: MakeAll | None = None,
) -> Entry:
    """Make, continue or simply open the entry of (kind, spec).

    ``make(begin, end)`` gives the arrays of items [begin, end): the same names each time, all with one number of rows
    (which may be smaller than ``end - begin``, where items were refused). It is called once per missing shard, in
    order, and not at all where the entry is committed. ``items`` is how many there are, at least 1. Where ``make_all`` is
    given it takes the place of ``make``: it is told all ranges at once and yields their arrays in order.

    Raises Stopped after the current shard where ``stop`` is set, LockedError where another process builds the same
    entry, ArchipelError where arrays do not fit together.
    """
    if items < 1:
        raise ArchipelError(f"{label}: there is nothing to make (0 items)")
    folder = root / f"{kind}-{key_of(kind, spec, items, per_shard)[:24]}"
    card = _committed(folder)
    if card is not None:
        return Entry.of(folder, card)
    with store.lock(root / f".{folder.name}.lock", f"{label} of {root.parent}"):
        if _committed(folder) is None:
            shards = _make_shards(folder, items, make_all or _one_by_one(make), label, stop, per_shard)
            _commit(folder, shards, kind, spec, items, run_id, per_shard)
    return open_entry(folder)


def _committed(folder: Path) -> dict[str, Any] | None:
    """The entry's card, where it has one and every shard at the listed size; hashes are `verify`'s work."""
    card = store.read_card(folder, "cache")
    if card is None:
        return None
    sizes = {one.name: one.stat().st_size for one in os.scandir(folder) if one.name in card["files"] and one.is_file()}
    return card if all(sizes.get(name) == entry["bytes"] for name, entry in card["files"].items()) else None


def _known(folder: Path) -> dict[str, dict[str, Any]]:
    """Shards that were finished, by name, with sha256, rows and layout: from an interrupted or a taken-back build."""
    path = folder / _PARTIAL
    try:
        listed = dict(store.read_json(path)["shards"]) if path.exists() else {}
        listed |= {line.pop("name"): line for line in store.read_jsonl(folder / _JOURNAL) if "name" in line}
        return {name: entry for name, entry in listed.items() if set(entry) >= {"sha256", "rows", "layout"}}
    except (DamagedError, KeyError, TypeError, AttributeError, ValueError):
        return {}  # nothing is trusted: every shard is made again


def _one_by_one(make: Make) -> MakeAll:
    def make_all(ranges: Sequence[tuple[int, int]]) -> Generator[Mapping[str, np.ndarray], None, None]:
        for begin, end in ranges:
            yield make(begin, end)

    return make_all


def _make_shards(
    folder: Path, items: int, make_all: MakeAll, label: str, stop: StopFlag | None, per_shard: int
) -> dict[str, dict[str, Any]]:
    """Make what is missing; sha256, rows and layout of every shard by name, in order."""
    folder.mkdir(parents=True, exist_ok=True)
    card = store.read_card(folder, "cache")
    if card is not None:  # committed once, but a shard is missing or torn: back to an unfinished build
        store.write_json(folder / _PARTIAL, {"shards": card["shards"]})
        (folder / "card.json").unlink()
    for torn in folder.glob(".*.tmp*"):  # what a killed build left aside; the lock says that nobody writes it now
        torn.unlink()
    known = _known(folder)
    good: dict[str, dict[str, Any]] = {}
    missing = []
    for number, begin in enumerate(range(0, items, per_shard)):
        name = f"shard-{number:05d}.safetensors"
        entry = known.get(name)
        if entry is not None and (folder / name).is_file() and store.sha256_file(folder / name) == entry["sha256"]:
            good[name] = entry
        else:
            missing.append((name, begin, min(begin + per_shard, items)))
    # One list of what is good, and after it one line a shard: writing the whole list each time is quadratic in shards.
    store.write_json(folder / _PARTIAL, {"shards": good})
    (folder / _JOURNAL).unlink(missing_ok=True)
    done = items - sum(end - begin for _, begin, end in missing)
    ranges = [(begin, end) for _, begin, end in missing]
    with Progress(label, items, start=done) as bar, contextlib.closing(make_all(ranges)) as made:
        for name, begin, end in missing:
            if stop:
                raise stop.error(label)
            arrays = {key: np.asarray(value) for key, value in next(made).items()}
            entry = _describe(arrays, label, begin, end)
            store.write_tensors(folder / name, arrays)
            good[name] = {"sha256": store.sha256_file(folder / name), **entry}
            store.append_jsonl(folder / _JOURNAL, {"name": name, **good[name]})
            bar.advance(end - begin)
    return dict(sorted(good.items()))


def _describe(arrays: dict[str, np.ndarray], label: str, begin: int, end: int) -> dict[str, Any]:
    """Rows and layout of one shard; refuses arrays without rows of their own or with unequal numbers of them."""
    counts = {name: len(array) if array.ndim else -1 for name, array in arrays.items()}
    if len(set(counts.values())) != 1 or -1 in counts.values():
        raise ArchipelError(f"{label}: items {begin} to {end} gave arrays of unequal numbers of rows: {counts}")
    layout = {name: [str(array.dtype), *map(int, array.shape[1:])] for name, array in sorted(arrays.items())}
    return {"rows": next(iter(counts.values())), "layout": layout}


def _commit(
    folder: Path,
    shards: dict[str, dict[str, Any]],
    kind: str,
    spec: Mapping[str, Any],
    items: int,
    run_id: str,
    per_shard: int,
) -> None:
    layouts = [entry["layout"] for entry in shards.values() if entry["rows"]] or [next(iter(shards.values()))["layout"]]
    odd = [name for name, entry in shards.items() if entry["rows"] and entry["layout"] != layouts[0]]
    if odd or any(set(entry["layout"]) != set(layouts[0]) for entry in shards.values()):
        raise ArchipelError(
            f"{folder}: shards do not fit together: {odd[:3]} differ from {layouts[0]} in names, dtype or shape"
        )
    store.write_card(
        folder,
        "cache",
        run_id,
        list(shards),
        hashed={name: entry["sha256"] for name, entry in shards.items()},
        entry=kind,
        key=key_of(kind, spec, items, per_shard),
        spec=dict(spec),
        items=items,
        rows=sum(int(entry["rows"]) for entry in shards.values()),
        names=sorted(layouts[0]),
        layout=layouts[0],
        shards=shards,
    )
    for name in (_PARTIAL, _JOURNAL):
        (folder / name).unlink(missing_ok=True)


# --- order -----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _order(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    # Sorting raw bits instead of Generator.permutation: numpy promises the bit stream, not the methods on top of it.
    bits = np.random.Philox(key=np.array([seed % _WORD, epoch % _WORD], dtype=np.uint64)).random_raw(n)
    permutation = np.argsort(bits, kind="stable").astype(np.int64)
    permutation.setflags(write=False)
    return permutation


def order(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The order in which epoch ``epoch`` visits ``n`` rows: a permutation (n,) int64, read-only, f(seed, epoch, n)."""
    if n < 1 or epoch < 0:
        raise ValueError(f"order needs at least one row and an epoch of 0 or more, not n = {n}, epoch = {epoch}")
    return _order(seed, epoch, n)


def batch_rows(seed: int, step: int, batch: int, n: int) -> NDArray[np.int64]:
    """Rows (batch,) int64 of step ``step``: positions [step * batch, (step + 1) * batch) of the endless epochs.

    Every row is seen once before any is seen again; a batch may cross into the next epoch, and may be larger than n.
    """
    if min(batch, n) < 1 or step < 0:
        raise ValueError(
            f"batch_rows needs a batch and rows of 1 or more and a step of 0 or more, not {batch}, {n}, {step}"
        )
    positions = np.arange(step * batch, (step + 1) * batch)
    epochs = positions // n
    rows = np.empty(batch, np.int64)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        mine = epochs == epoch
        rows[mine] = order(seed, epoch, n)[positions[mine] % n]
    return rows
