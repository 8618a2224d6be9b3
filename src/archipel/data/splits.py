"""Train, validation, test: dealt out by content group, so that nothing is tested that was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from archipel.errors import ArchipelError
from archipel.manifest import SPLITS, Split


def assign_splits(
    groups: Sequence[str], given: Sequence[str | None], shares: tuple[float, float, float], seed: int
) -> list[Split]:
    """The split of every clip.

    groups: content group of each clip (N,); given: split that the source fixes, or None (N,); shares: of content
    groups, for train, validation, test (they sum to 1). A group with a given split keeps it as a whole; the others are
    dealt out in an order that is a hash of (seed, group), so that shares come out as asked, to whole groups. From three
    groups on, validation and test get at least one each where their share is above 0.

    Raises ArchipelError naming a group whose clips are given two splits.
    """
    fixed: dict[str, Split] = {}
    for group, split in zip(groups, given, strict=True):
        if split is None:
            continue
        place = next(s for s in SPLITS if s == split)
        if fixed.setdefault(group, place) != place:
            raise ArchipelError(
                f"group {group!r} is in two splits, {fixed[group]} and {place}: a content group lies in one split, "
                "or the test would see what training saw. Correct the split column, or give the clips other groups"
            )
    free = sorted(set(groups) - set(fixed), key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest())
    counts = _counts(len(set(groups)), shares, {s: sum(v == s for v in fixed.values()) for s in SPLITS}, len(free))
    chosen = dict(fixed)
    start = 0
    for split in ("test", "validation", "train"):
        place = next(s for s in SPLITS if s == split)
        end = start + counts[place]
        chosen |= dict.fromkeys(free[start:end], place)
        start = end
    return [chosen[group] for group in groups]


def _counts(total: int, shares: tuple[float, float, float], fixed: Mapping[Split, int], free: int) -> dict[Split, int]:
    """How many free groups go to each split, so that fixed and free together come near the shares of ``total``."""
    wanted: dict[Split, int] = {}
    for split, share in zip(SPLITS, shares, strict=True):
        whole = int(share * total + 0.5)
        if total >= 3 and share > 0:
            whole = max(whole, 1)
        wanted[split] = max(whole - fixed[split], 0)
    # Rounding (and fixed groups beyond a share) must not add up to more than there are: training takes what is left,
    # and keeps at least one group of its own.
    room = free - (1 if fixed["train"] == 0 and free > 0 else 0)
    test = min(wanted["test"], room)
    if wanted["validation"] and test == room and test > 1:
        test -= 1
    validation = min(wanted["validation"], room - test)
    return {"test": test, "validation": validation, "train": free - test - validation}
