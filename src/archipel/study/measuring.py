"""What a study's scores are computed from, and every measure of one arm's clips of one seed.

The real clips' side of every measure is computed once per prompt set (``evaluation.sides``) and held against all arms and
seeds; the estimates over seeds are made from these parts in ``study.scores``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from archipel.errors import ArchipelError
from archipel.evaluation import distances, intervals, probe, sides
from archipel.evaluation.inputs import REVERSED, STATIC, reference_rows
from archipel.evaluation.intervals import Interval
from archipel.evaluation.protocol import Protocol
from archipel.evaluation.sides import CopyingSide, FrechetSide, KernelSide, ProbeSide, WholeFrechetSide
from archipel.manifest import Clip
from archipel.study import statistics

TRAIN = "train"
WHOLE = "FVD"  # titles that begin so promise the usual formula, in all dimensions
UNITS = {"motion": "share of full scale per frame", "flow": "px/frame"}  # of scalars whose identity names no unit
Kind = Literal["mean", "share", "raw", "excess"]


@dataclass(frozen=True)
class PromptSet:
    """One set of captions and the real clips that what is made from them is held against.

    name; split: of the captions' clips, "train", "validation" or "test"; rows (N,) int64: manifest rows of the captions;
    group (N,) int64; reference (M,) int64: rows of real clips; reference_group (M,); count: content groups G, numbered over
    both; prompts: sha256 of captions and rows. Raises ArchipelError where these do not fit each other.
    """

    name: str
    split: str
    rows: np.ndarray
    group: np.ndarray
    reference: np.ndarray
    reference_group: np.ndarray
    count: int
    prompts: str

    def __post_init__(self) -> None:
        fits = len(self.rows) == len(self.group) and len(self.reference) == len(self.reference_group)
        if not fits or not len(self.rows) or not len(self.reference):
            raise ArchipelError(
                f"prompt set {self.name!r}: {len(self.rows)} captions in {len(self.group)} groups' places and "
                f"{len(self.reference)} real clips in {len(self.reference_group)}: each needs a content group, and none "
                "may be empty"
            )
        if max(int(self.group.max()), int(self.reference_group.max())) >= self.count:
            raise ArchipelError(f"prompt set {self.name!r}: content groups must be numbered below {self.count}")

    @classmethod
    def of(cls, name: str, split: str, rows: np.ndarray, clips: Sequence[Clip], prompts: str, seed: int) -> PromptSet:
        """From manifest rows of captions. Training captions are held against their own clips; others as in an evaluation:
        against the captions' clips and one clip of every other content group of the split."""
        own = np.unique(rows).astype(np.int64)
        reference = own if split == TRAIN else reference_rows(clips, split, rows, seed)
        names = [[clips[row].group for row in part] for part in (rows, reference)]
        (group, reference_group), count = intervals.number_groups(*names)
        return cls(name, split, np.asarray(rows, np.int64), group, reference, reference_group, count, prompts)

    @property
    def groups(self) -> int:
        """Content groups among the captions: the units of chance."""
        return len(np.unique(self.group))

    @property
    def first(self) -> np.ndarray:
        """Places of the first caption of every row, in order: which real clips static and reversed ones stand for."""
        return np.sort(np.unique(self.rows, return_index=True)[1])


@dataclass(frozen=True)
class StudyData:
    """All that a prompt set's scores are computed from. Mappings may read from files when asked.

    features[arm][seed] -> {extractor: (N, D) float32}; scalars[arm][seed] -> {name: (N,)}; N as in the prompt set. The arm
    "codec" has one entry, whatever its key: no seed changes it. real: {extractor: (R, D)} of all manifest rows;
    real_scalars: {name: (R,)}; train (T,) int64: rows of real training clips; groups (R,): labels of content groups of all
    rows (needed for the probe); text (R, P): caption embeddings of all rows, or None; changed: features of the first
    caption's real clips made "static" and "reversed", {kind: {extractor: (n, D)}}; identity: sha256 of the real clips.
    """

    features: Mapping[str, Mapping[int, Mapping[str, np.ndarray]]]
    scalars: Mapping[str, Mapping[int, Mapping[str, np.ndarray]]]
    real: Mapping[str, np.ndarray]
    train: np.ndarray
    real_scalars: Mapping[str, np.ndarray] = field(default_factory=dict)
    groups: np.ndarray | None = None
    text: np.ndarray | None = None
    changed: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    identity: str = ""


@dataclass(frozen=True)
class Part:
    """One measure of one arm's clips of one seed: leave-out values (1 + U,), clips, groups, protocol."""

    metric: str
    left: np.ndarray
    n: int
    groups: int
    protocol: dict[str, Any]
    kind: Kind = "mean"
    unit: str = ""


class Bench:
    """The real side of every measure of a prompt set.

    ``facts`` gathers what does not fit into rows; ``probe`` is the fitted text-video probe, None where it is withheld.
    """

    def __init__(
        self,
        prompts: PromptSet,
        data: StudyData,
        identity: Mapping[str, Mapping[str, Any]],
        *,
        copying: str,
        probed: Sequence[str],
        pca: int,
        seed: int,
    ) -> None:
        """copying: the extractor that copying and coverage are judged by; probed: those that the text-video probe reads."""
        self.prompts, self.data, self.identity = prompts, data, identity
        self.facts: dict[str, Any] = {"left_out": [], "pca": {}, "uncorrected_excess": {}, "probe": {}}
        self.passes = sides.caption_passes(prompts.rows)
        self.unit, self._plan = sides.half_plan(prompts.count, seed)
        self._seed, self._asked = seed, pca
        self.extractors = tuple(data.real)
        self._kernel = {name: self._kernel_side(name) for name in self.extractors}
        self._frechet = {name: side for name in self.extractors if (side := self._frechet_side(name)) is not None}
        self._whole = {
            name: WholeFrechetSide(self.unit, seed, self._reference(name), self._own(name))
            for name in self._frechet
            if self.title(name).startswith(WHOLE)
        }
        self._copying_by = copying
        train = None if prompts.split == TRAIN else data.real[copying][data.train]
        self._copying = CopyingSide(*self._reference(copying), prompts.split, train)
        self._probed = tuple(probed)
        self.probe = self._probe_side()

    # --- the real side -----------------------------------------------------------------------------------------------

    def title(self, extractor: str) -> str:
        """What the raw Frechet distance of an extractor may be called: "FVD" with I3D only, else "FD-<extractor>"."""
        return str(self.identity.get(extractor, {}).get("metric") or f"FD-{extractor}")

    def _reference(self, extractor: str) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(self.data.real[extractor][self.prompts.reference]), self.prompts.reference_group

    def _own(self, extractor: str) -> tuple[np.ndarray, np.ndarray]:
        one = self.passes[0]
        return np.asarray(self.data.real[extractor][self.prompts.rows[one]]), self.prompts.group[one]

    def _kernel_side(self, extractor: str) -> KernelSide:
        return KernelSide(*self._reference(extractor), self.prompts.count)

    def _frechet_side(self, extractor: str) -> FrechetSide | None:
        train = np.asarray(self.data.real[extractor][self.data.train])
        if self._plan is None or len(train) < 3:
            said = f"{self.title(extractor)}: {self.prompts.count} content groups are too few for two halves"
            self.facts["left_out"].append(said)
            return None
        pca = distances.fit_pca(train, sides.pca_dims(self._asked, len(self.passes[0])))
        self.facts["pca"][extractor] = {"dims": pca.dims, "asked": self._asked, "explained": pca.explained}
        return FrechetSide(pca, self.unit, self._plan, self._reference(extractor), self._own(extractor))

    def _probe_side(self) -> ProbeSide | None:
        data, prompts = self.data, self.prompts
        reason = ""
        if data.text is None or data.groups is None or not self._probed:
            reason = "no caption embeddings, or no extractor that did not make the partition"
        elif prompts.split == TRAIN:
            reason = "it is fitted on the real clips of these very captions"
        elif len(np.unique(data.groups[data.train])) < 2:
            reason = "fewer than two content groups to train on"
        if reason or data.text is None or data.groups is None:
            self.facts["probe"] = {"withheld": True, "reason": reason, "table": []}
            return None
        pool, own = np.unique(data.text[prompts.rows], axis=0, return_inverse=True)
        train = self.join({name: table[data.train] for name, table in data.real.items()})
        side = ProbeSide(
            train, data.text[data.train], data.groups[data.train], np.ravel(own), np.asarray(pool), self._seed
        )
        real = side.retrieve(self.join({name: table[prompts.rows] for name, table in data.real.items()}))
        reason = sides.withheld(real)
        self.facts["probe"] = {
            "withheld": bool(reason),
            "reason": reason,
            "features": list(self._probed),
            "penalty": side.fitted.penalty,
            "train_cosine": side.fitted.score,
            "pool": len(pool),
            "chance": {"retrieval@1": real.chance1, "retrieval@5": real.chance5},
            "table": self._probe_table(side, real),
        }
        return None if reason else side

    def _probe_table(self, side: ProbeSide, real: probe.Retrieval) -> list[dict[str, Any]]:
        """Real, static and reversed clips beside chance: what the probe can tell."""
        first, group = self.prompts.first, self.prompts.group
        shown = {"real": (real, np.arange(len(group)))}
        for name in (STATIC, REVERSED):
            if name in self.data.changed:
                shown[name] = (side.retrieve(self.join(self.data.changed[name]), first), first)
        return [
            {
                "clips": name,
                "n": len(pick),
                "similarity": intervals.mean_interval(found.similarity, group[pick]).as_dict(),
                "retrieval@1": intervals.share_interval(found.top1, group[pick]).as_dict(),
                "retrieval@5": intervals.share_interval(found.top5, group[pick]).as_dict(),
            }
            for name, (found, pick) in shown.items()
        ]

    def join(self, features: Mapping[str, np.ndarray]) -> np.ndarray:
        """The features that the probe reads, side by side: (n, D)."""
        return probe.join([features[name] for name in self._probed])

    # --- one arm, one seed -------------------------------------------------------------------------------------------

    def parts(self, arm: str, seed: int, features: Mapping[str, np.ndarray]) -> Iterator[Part]:
        """All measures from features of an arm's clips. Raises ArchipelError where features are missing or do not fit."""
        for name in self.extractors:
            found = features.get(name)
            if found is None or found.shape != (len(self.prompts.rows), self.data.real[name].shape[1]):
                shape = "none" if found is None else str(found.shape)
                raise ArchipelError(
                    f"{arm}, seed {seed}, prompts {self.prompts.name!r}: features of {name} are {shape}, expected "
                    f"{(len(self.prompts.rows), self.data.real[name].shape[1])}: sample the arm again"
                )
            if not np.isfinite(found).all():
                raise ArchipelError(f"{arm}, seed {seed}: {name} holds numbers that are not finite")
            yield self._kid(name, found)
            yield from self._frechets(name, found)
        yield from self.clip_parts(features)

    def clip_parts(self, features: Mapping[str, np.ndarray]) -> Iterator[Part]:
        """Measures that are means over clips: copying, coverage, the probe. Real clips have them too."""
        terms = self._copying.terms(features[self._copying_by], self.prompts.group)
        for metric, term in terms.items():
            protocol = self._protocol(f"{metric}: {term.rule}", self._copying_by, reference=len(self.prompts.reference))
            yield self._mean(metric, term.values, term.group, protocol, share=term.share)
        if self.probe is None:
            return
        found = self.probe.retrieve(self.join(features))
        rule = f"ridge probe to caption embeddings, {found.pool} captions"
        protocol = self._protocol(rule, *self._probed, reference=len(self.data.train))
        for metric, values in (("retrieval@1", found.top1), ("retrieval@5", found.top5)):
            yield self._mean(metric, values, self.prompts.group, protocol, share=True)
        yield self._mean("text-video-probe", found.similarity, self.prompts.group, protocol)

    def similarity(self, features: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """The text-video probe's cosine of each clip with its own caption (N,); None where the probe is withheld."""
        return None if self.probe is None else self.probe.retrieve(self.join(features)).similarity

    def scalar_parts(self, arm: str, seed: int, scalars: Mapping[str, np.ndarray]) -> Iterator[Part]:
        """Means of scalars (N,) of an arm's clips, under the titles that their judges give them."""
        for name, values in scalars.items():
            if np.shape(values) != (len(self.prompts.rows),) or not np.isfinite(values).all():
                raise ArchipelError(
                    f"{arm}, seed {seed}, prompts {self.prompts.name!r}: {name} must be {len(self.prompts.rows)} finite "
                    f"numbers, one per clip; these are of shape {np.shape(values)}"
                )
            about = self.identity.get(name, {})
            unit = str(about.get("unit") or UNITS.get(name, ""))
            protocol = self._protocol(f"mean over clips, {unit or 'no unit'}", name)
            yield self._mean(str(about.get("metric") or name), values, self.prompts.group, protocol, unit=unit)

    def _mean(
        self,
        metric: str,
        values: np.ndarray,
        group: np.ndarray,
        protocol: dict[str, Any],
        *,
        share: bool = False,
        unit: str = "",
    ) -> Part:
        left = statistics.leave_out(values, group)
        return Part(metric, left, len(values), len(left) - 1, protocol, "share" if share else "mean", unit)

    def _kid(self, name: str, features: np.ndarray) -> Part:
        protocol = self._protocol(
            "kid, unbiased, pairs of different groups", name, reference=len(self.prompts.reference)
        )
        left = self._kernel[name].distances(features, self.prompts.group)
        return Part(f"KID-{name}", left, len(features), self.prompts.groups, protocol)

    def _frechets(self, name: str, features: np.ndarray) -> Iterator[Part]:
        side = self._frechet.get(name)
        if side is None:
            return
        raw = side.distances(features, self.prompts.group, self.passes)
        used = sum(len(one) for one in self.passes)
        common = (used, self.prompts.groups)
        rule = "frechet less its real floor, jackknife bias correction"
        excess = self._halves(rule, name, pca=side.pca.dims)
        yield Part(f"excess-{self.title(name)}", raw - side.floor, *common, excess, "excess")
        if name in self._whole:
            raw = self._whole[name].distances(features, self.prompts.group, self.passes)
        yield Part(self.title(name), raw, *common, self._raw_protocol(name), "raw")

    def floors(self) -> Iterator[tuple[Part, Interval | None]]:
        """Real clips' own distances. With KID comes its interval: the spread over halvings, which is not a jackknife's."""
        size = len(self.prompts.reference)
        groups = len(np.unique(self.prompts.reference_group))
        for name in self.extractors:
            value = self._kernel[name].floor(self._seed)
            if value is not None:
                rule = "kid, unbiased, between halves of the real clips; bounds: spread over halvings"
                protocol = self._protocol(rule, name, n=size // 2, reference=size // 2)
                yield Part(f"KID-{name}", np.array([value.value]), size, groups, protocol), value
            if name in self._frechet:
                floor = self._whole[name].floor if name in self._whole else self._frechet[name].floor
                protocol = self._raw_protocol(name)
                yield Part(self.title(name), floor, len(self.passes[0]), self.prompts.groups, protocol, "raw"), None

    # --- protocols ---------------------------------------------------------------------------------------------------

    def _raw_protocol(self, name: str) -> dict[str, Any]:
        if name in self._whole:
            return self._halves("frechet in all dimensions, disjoint halves of groups", name, pca=0)
        return self._halves("frechet, disjoint halves of groups", name, pca=self._frechet[name].pca.dims)

    def _halves(self, estimator: str, name: str, *, pca: int) -> dict[str, Any]:
        half, other = len(self.passes[0]) // 2, len(self.prompts.reference) // 2
        return self._protocol(estimator, name, n=half, reference=other, pca=pca)

    def _protocol(self, estimator: str, *judges: str, n: int = 0, reference: int = 0, pca: int = 0) -> dict[str, Any]:
        """An evaluation's protocol, with the judge's code version and the prompt set; the seeds come with the estimate."""
        about = [self.identity.get(name, {}) for name in judges]

        def words(key: str) -> str:
            return "+".join(dict.fromkeys(str(one.get(key, "")) for one in about))

        base = Protocol(
            estimator=estimator,
            extractor="+".join(judges),
            weights=words("weights"),
            layer=words("layer"),
            resize=int(about[0].get("resize") or 0) if about else 0,
            frames=int(about[0].get("frames") or 0) if about else 0,
            n=n or len(self.prompts.rows),
            clips=self.data.identity,
            reference=reference,
            groups=self.prompts.groups,
            divisor=distances.DIVISOR if estimator.startswith("frechet") else "",
            split=self.prompts.split,
            prompts=self.prompts.prompts,
            pca=pca,
        )
        return {**base.as_dict(), "code": words("code"), "set": self.prompts.name}
