"""Prompt sets: captions of a split, the same for all arms and seeds; and captions that mix what clusters know."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from archipel import cache, store
from archipel.contracts import Conditioning
from archipel.ensemble.stage import SEEDS_PER_RUN, choose_rows
from archipel.errors import ArchipelError
from archipel.flow import draws
from archipel.manifest import Clip, Split, read_manifest
from archipel.partition.assignment import load_assignment
from archipel.run import Run
from archipel.study.plan import MIXED, TEST, TRAIN, VALIDATION

MIXED_COUNT = 48
_PERSON = re.compile(r"^(?:man|woman|men|women|person|people|child|boy|girl)\s+(\w+ing\b.*)$", re.IGNORECASE)


@dataclass(frozen=True)
class Prompts:
    """rows (N,) int64 of the manifest, captions and content groups of N prompts.

    For the mixed set a row is the clip that the caption's subject comes from, and ``parts`` its two sources' captions.
    """

    name: str
    split: Split
    rows: np.ndarray
    captions: list[str]
    groups: list[str]
    parts: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, run: Run, name: str) -> Prompts:
        """One of test, train, validation (captions of that split, one per content group first) and mixed.

        Raises ArchipelError where the split is empty, MissingStageError before *prepare* (mixed: *partition*).
        """
        clips = read_manifest(run.manifest)
        if name == MIXED:
            return mixed(run, clips)
        split: Any = name
        wanted = run.config.study.count or run.config.evaluate.count
        if name != TEST:  # only what is scored first is repeated with new noise to make up the number
            wanted = min(wanted, sum(clip.split == split for clip in clips))
        rows = np.array(choose_rows(clips, split, max(wanted, 1), data_seed(run)), np.int64)
        return cls(name, split, rows, [clips[row].caption for row in rows], [clips[row].group for row in rows])

    def cond(self, run: Run) -> Conditioning:
        """The captions as training saw them; mixed ones, which no clip has, from the text encoder."""
        if self.name == MIXED:
            from archipel.encoders.text import open_text

            return open_text(run.config.text, run.text).encode(self.captions)
        text = cache.open_kind(run.cache, "text")
        parts = [torch.from_numpy(np.array(text[name][self.rows])) for name in ("tokens", "mask", "pooled")]
        return Conditioning(*parts)

    def seeds(self, run: Run, seed: int) -> list[int]:
        """Noise seeds of the study's ``seed``-th seed: the same for all arms, others for other seeds."""
        first = (run.config.run.seed + seed) * SEEDS_PER_RUN
        return [first + number for number in range(len(self.rows))]

    @property
    def digest(self) -> str:
        return store.sha256_json([self.name, self.rows.tolist(), self.captions])


def data_seed(run: Run) -> int:
    """The seed of split and prompts."""
    return run.config.clips.seed if run.config.clips.seed >= 0 else run.config.run.seed


def there_are(run: Run) -> list[str]:
    """The splits that hold clips, of those that a study asks for."""
    splits = {clip.split for clip in read_manifest(run.manifest)}
    return [name for name in (TEST, TRAIN, VALIDATION) if name in splits]


def mixed(run: Run, clips: list[Clip]) -> Prompts:
    """Captions that put together what different clusters know: a thing of one doing what people of another do.

    Where the captions name nobody who does anything, two things of different clusters side by side. Test captions only.
    """
    cluster = load_assignment(run)
    stream = draws.generator(data_seed(run), draws.CHOICE, item=11)
    test = [row for row, clip in enumerate(clips) if clip.split == TEST]
    actions = [(row, found[1]) for row in test if (found := _PERSON.match(clips[row].caption))]
    people = {row for row, _ in actions} | {row for row in test if _PERSON.match(clips[row].caption + " being")}
    plain = [row for row in test if row not in people]
    things = [row for row in plain if len(clips[row].caption.split()) <= 2] or plain
    pairs: list[tuple[int, str, str]] = []
    others = actions or [(row, "and " + clips[row].caption) for row in things]
    order = [(thing, *other) for thing in things for other in others if cluster[thing] != cluster[other[0]]]
    for place in stream.permutation(len(order)):
        thing, other, words = order[place]
        if sum(row == thing for row, _, _ in pairs) < 2:
            pairs.append((thing, words, clips[other].caption))
        if len(pairs) == MIXED_COUNT:
            break
    if len(pairs) < 2:
        raise ArchipelError(
            "the test captions cannot be mixed: they need things in at least two clusters. Leave the ablations out, with --only "
            "table and the other parts you want"
        )
    captions = [f"{clips[row].caption} {words}" for row, words, _ in pairs]
    rows = np.array([row for row, _, _ in pairs], np.int64)
    parts = tuple((clips[row].caption, second) for row, _, second in pairs)
    return Prompts(MIXED, "test", rows, captions, [clips[row].group for row in rows], parts)
