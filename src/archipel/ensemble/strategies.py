"""Which experts speak, how loudly, and their mixture as one velocity.

A strategy is a ``Weighting``: (x, t, cond) -> weights (B, K) whose rows sum to 1. Weights that follow the posterior at
every step are ``Routed`` (top-k, threshold, full); weights that are settled before the first step are ``Fixed`` (oracle,
ancestral, one expert, uniform, random, the monolith as an ensemble of one). The mixture knows velocities and a
posterior, never networks, so exact ones, remote ones and other ensembles fit as well.

Source: Decentralized Diffusion Models (arXiv 2501.05450), eq. 4 and its test-time strategies (Table 1); renormalised
over the kept experts, v = sum_{k in S} w_k v_k / sum_{k in S} w_k. Drawing a new expert at every step broke that
paper's samples; drawing one per clip for the whole path ("ancestral") does not, since p(x | c) = sum_k p(k | c) p_k(x | c).

Where experts are missing (not trained yet, not admitted), ``present`` names those that are there. The posterior is
restricted to them and renormalised before a strategy looks at it: p(k | x, t, c, k in present), the exact posterior of the
mixture that the present clusters make up by themselves. The missing ones have weight 0 and are never called. An expert that
is lost in the middle of a clip (a remote one that answers no more) is missing from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from archipel.contracts import Conditioning, Posterior, Velocity
from archipel.ensemble.guidance import Composition, branch_weights, combine, doubled
from archipel.ensemble.together import in_one_pass
from archipel.ensemble.trace import Trace
from archipel.errors import ArchipelError, LostExpertError
from archipel.flow import draws

__all__ = ["Fixed", "Mixture", "Routed", "Select", "Trace", "Weighting"]

Select = Callable[[Tensor], Tensor]
"""Posterior (B, K) -> bool (B, K): the experts that are kept, at least one per row."""


# --- choosing a set of experts ---------------------------------------------------------------------------------------


def top_k(count: int) -> Select:
    """Keep the ``count`` likeliest experts (all, where there are fewer); of equal ones those with lower numbers."""
    if count < 1:
        raise ValueError(f"top-k needs k of 1 or more, got {count}")

    def select(p: Tensor) -> Tensor:
        best = torch.sort(p, dim=1, descending=True, stable=True).indices[:, :count]
        return torch.zeros_like(p, dtype=torch.bool).scatter_(1, best, True)

    return select


def at_least(threshold: float) -> Select:
    """Keep every expert with p >= ``threshold``, and always the likeliest."""
    best = top_k(1)
    return lambda p: (p >= threshold) | best(p)


def everyone(p: Tensor) -> Tensor:
    """Keep all experts: the exact ensemble, if router and experts are exact."""
    return torch.ones_like(p, dtype=torch.bool)


def renormalise(p: Tensor, kept: Tensor) -> Tensor:
    """p over the kept experts, rows summing to 1, (B, K); equal shares where p gives the kept ones nothing at all.

    The last case is real: the null branch's posterior over a set that the conditional branch chose.
    """
    share = p * kept
    total = share.sum(1, keepdim=True)
    equal = kept.to(p.dtype) / kept.sum(1, keepdim=True)
    return torch.where(total > torch.finfo(p.dtype).tiny, share / total.clamp(min=torch.finfo(p.dtype).tiny), equal)


def restrict(p: Tensor, present: Sequence[int] | None) -> Tensor:
    """Posterior (B, K) over the experts that are there, rows summing to 1; ``p`` itself where all are (None)."""
    return p if present is None else renormalise(p, _mask(present, p))


def _mask(present: Sequence[int], p: Tensor) -> Tensor:
    """bool (1, K), on the device of ``p`` (B, K)."""
    mask = torch.zeros(1, p.shape[1], dtype=torch.bool, device=p.device)
    mask[0, list(present)] = True
    return mask


# --- weightings ------------------------------------------------------------------------------------------------------


class Weighting(Protocol):
    """``weights(x, t, cond, null) -> (w, n)``: (B, K) each, rows sum to 1; n (for the null branch) has w's support.

    ``null`` says whether n is wanted; where it is not, n may be w itself.
    """

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning, null: bool) -> tuple[Tensor, Tensor]: ...

    def needed(self) -> list[int] | None:
        """Experts that can get weight, or None where all can."""
        ...

    # and where experts may be lost, ``lose(k) -> bool``: no weight for expert k from now on; False where a clip then has no other


class Routed:
    """Weights from the posterior at every step, restricted to the experts that ``select`` keeps.

    ``present``: numbers of the experts that are there, at least one; None: all.
    """

    def __init__(self, router: Posterior, select: Select, present: Sequence[int] | None = None) -> None:
        self._router, self._select, self._present = router, select, present
        self.asked = 0  # rows that went through the router, both branches counted
        self._k = 0  # experts that the router knows, once it was asked

    def _kept(self, p: Tensor) -> Tensor:
        kept = self._select(p)  # top-k of more experts than are there would keep some with weight 0
        return kept if self._present is None else kept & _mask(self._present, p)

    def posteriors(self, x: Tensor, t: Tensor, cond: Conditioning, null: bool) -> tuple[Tensor, Tensor | None]:
        """(p(k | x, t, c) over the experts that are there, p(k | x, t, null) or None where it is not wanted), (B, K) each."""
        self.asked += len(x) * (2 if null else 1)
        if not null:
            p = _checked(self._router(x, t, cond))
            self._k = p.shape[1]
            return restrict(p, self._present), None
        doubled = Conditioning.cat([cond, cond.null()])
        p, q = _checked(self._router(torch.cat([x, x]), torch.cat([t, t]), doubled)).chunk(2)
        self._k = p.shape[1]
        return restrict(p, self._present), q

    def weights(self, p: Tensor, q: Tensor | None) -> tuple[Tensor, Tensor]:
        """(w, n) of what ``posteriors`` gives. One set of experts, chosen by p alone, serves both branches."""
        kept = self._kept(p)
        w = renormalise(p, kept)
        return w, w if q is None else renormalise(q, kept)

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning, null: bool) -> tuple[Tensor, Tensor]:
        return self.weights(*self.posteriors(x, t, cond, null))

    def needed(self) -> list[int] | None:
        return None

    def lose(self, k: int) -> bool:
        there = range(self._k) if self._present is None else self._present
        self._present = [one for one in there if one != k]
        return bool(self._present)


def _checked(p: Tensor) -> Tensor:
    if not bool(torch.isfinite(p).all()):
        raise ArchipelError("the router's weights are not finite numbers: train the router again")
    return p


class Fixed:
    """Weights (B, K) that are the same at every time.

    ``again(others)``: new weights (B, K) among the experts ``others``, for clips that lost the only one they had; None where
    there are none. Without it such a clip cannot be made.
    """

    def __init__(self, weights: Tensor, again: Callable[[list[int]], Tensor | None] | None = None) -> None:
        self.weights, self._again = weights, again
        self._gone: set[int] = set()

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning, null: bool) -> tuple[Tensor, Tensor]:
        w = self.weights.to(x)
        return w, w

    def needed(self) -> list[int] | None:
        return [k for k in range(self.weights.shape[1]) if bool((self.weights[:, k] > 0).any())]

    def lose(self, k: int) -> bool:
        """Clips that had others keep these, with more weight; those that had none but ``k`` are given new weights."""
        self._gone.add(k)
        kept = self.weights.clone()
        kept[:, k] = 0
        alone = kept.sum(1) == 0
        others = [one for one in range(kept.shape[1]) if one not in self._gone]
        if bool(alone.any()):
            drawn = None if self._again is None else self._again(others)
            if drawn is None:
                return False
            kept[alone] = drawn.to(kept)[alone]
        self.weights = kept / kept.sum(1, keepdim=True)
        return True

    def of(self, rows: Tensor) -> Fixed:
        """The same for some of the clips."""
        again = self._again

        def some(others: list[int]) -> Tensor | None:
            drawn = None if again is None else again(others)
            return None if drawn is None else drawn[rows]

        found = Fixed(self.weights[rows], some)
        found._gone = self._gone
        return found


def one_each(chosen: Sequence[int] | np.ndarray | Tensor, k: int) -> Fixed:
    """One given expert per clip: the oracle (a clip's true cluster), one fixed expert, a drawn one.

    Raises ArchipelError for a number outside 0 to k - 1.
    """
    numbers = torch.as_tensor(np.asarray(chosen), dtype=torch.int64)
    wrong = [int(n) for n in numbers if not 0 <= int(n) < k]
    if wrong:
        raise ArchipelError(f"there is no expert {wrong[0]}: this run has experts 0 to {k - 1}")
    return Fixed(torch.nn.functional.one_hot(numbers, k).float())


def uniform(clips: int, k: int, present: Sequence[int] | None = None) -> Fixed:
    """Every expert (that is there) with the same weight: a control that ignores the router."""
    return Fixed(restrict(torch.full((clips, k), 1 / k), present))


def random_expert(seeds: Sequence[int], k: int, present: Sequence[int] | None = None) -> Fixed:
    """One expert (of those there) per clip drawn evenly from the clip's seed: a control for the router's choice."""
    u = np.concatenate([draws.uniforms(seed, [1]) for seed in seeds]) if seeds else np.empty(0)

    def among(those: Sequence[int]) -> Tensor:
        there = np.array(sorted(those), dtype=np.int64)
        return one_each(there[np.minimum((u * len(there)).astype(np.int64), len(there) - 1)], k).weights

    return _drawn(among, range(k) if present is None else present)


def _drawn(among: Callable[[Sequence[int]], Tensor], present: Sequence[int]) -> Fixed:
    """Weights that ``among(experts)`` draws; once more among those that are left, where one is lost."""

    def again(others: list[int]) -> Tensor | None:
        left = [one for one in present if one in others]
        return among(left) if left else None

    return Fixed(among(present), again)


def text_posterior(
    router: Posterior, cond: Conditioning, shape: Sequence[int], noises: int = draws.ROUTE_NOISES
) -> Tensor:
    """p(k | c), (B, K) on the CPU: what the captions alone say about the cluster.

    At t = 1 the state is pure noise, x_1 = eps, and carries nothing of the clip, so p(k | x_1, 1, c) = p(k | c): the router
    is its own text-only posterior there and no second one has to be trained. A trained router still looks a little at
    the noise; the mean over ``noises`` fixed noises (the same for every caption and seed) takes that out, and makes the
    answer a function of the caption only.
    """
    rows, device = len(cond), cond.pooled.device
    total = torch.zeros(())
    for noise in draws.normals(0, range(noises), shape, purpose=draws.ROUTE):
        x = torch.from_numpy(noise).to(device).expand(rows, *shape)
        total = total + _checked(router(x, torch.ones(rows, device=device), cond)).double().cpu()
    return total / noises


def draw(p: Tensor, seeds: Sequence[int]) -> np.ndarray:
    """One k ~ p[i] per row of p (B, K), int64 (B,), by inversion of a uniform that belongs to the clip's seed only."""
    u = np.array([draws.uniforms(seed, [0])[0] for seed in seeds])
    below = np.cumsum(p.double().cpu().numpy(), axis=1)
    passed = (u[:, None] * below[:, -1:] >= below).sum(1)
    return np.asarray(np.minimum(passed, p.shape[1] - 1))


def ancestral(
    router: Posterior,
    cond: Conditioning,
    shape: Sequence[int],
    seeds: Sequence[int],
    present: Sequence[int] | None = None,
) -> Fixed:
    """Draw k ~ p(k | c) once per clip and follow expert k alone to t = 0: exact for a mixture, one expert per clip.

    The posterior needs the caption and no noisy latent; the draw needs the clip's seed, in a stream of its own, so it
    is independent of the clip's noise and of its batch mates. With some experts missing: k ~ p(k | c, k in present).
    """
    p = text_posterior(router, cond, shape)
    k = p.shape[1]

    def among(those: Sequence[int]) -> Tensor:
        there = sorted(those)
        if len(there) == k:
            return one_each(draw(p, seeds), k).weights
        return one_each(np.array(there)[draw(restrict(p, there)[:, there], seeds)], k).weights

    return _drawn(among, range(k) if present is None else present)


# --- the mixture -----------------------------------------------------------------------------------------------------


class Mixture:
    """Experts under a weighting as one ``Velocity``, with guidance in either composition.

    Rows are grouped by expert: each expert is called at most once per time, on the rows that give it weight and (for
    s other than 0 and 1) on both branches of them at once. So top-1 costs what one expert costs, plus the router.
    """

    def __init__(
        self,
        experts: Sequence[Velocity],
        weighting: Weighting,
        guidance: float = 1.0,
        composition: Composition = "mixture-of-guided",
        trace: Trace | None = None,
    ) -> None:
        self.experts, self.weighting = list(experts), weighting
        self.scale, self.composition, self._trace = guidance, composition, trace
        self._doubled: tuple[Conditioning, Conditioning] | None = None  # a batch's, and what both branches read of it

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        null_wanted = self.scale != 1 and self.composition == "guided-mixture"
        while True:
            w, n = self.weighting(x, t, cond, null_wanted)
            if w.shape != (x.shape[0], len(self.experts)):
                raise ValueError(
                    f"weights of shape {tuple(w.shape)} for {x.shape[0]} rows and {len(self.experts)} experts"
                )
            a, b = branch_weights(w, n, self.scale, self.composition)
            v = self._mixed(x, t, cond, a, b)
            if v is not None:
                break  # else an expert was lost, and the others are weighed anew
        if self._trace is not None:
            self._trace.times.append(float(t[0]) if len(t) else 0.0)
            self._trace.weights.append(w.detach().float().cpu())
            self._trace.router_rows = int(getattr(self.weighting, "asked", 0))
        return v

    def _mixed(self, x: Tensor, t: Tensor, cond: Conditioning, a: Tensor, b: Tensor) -> Tensor | None:
        """sum_k a_k v_k(c) + b_k v_k(null), like x; None where an expert was lost on the way."""
        groups = [(k, ((a[:, k] != 0) | (b[:, k] != 0)).nonzero()[:, 0]) for k in range(len(self.experts))]
        asked = [(k, rows) for k, rows in groups if len(rows)]
        later: dict[int, Callable[[], Tensor]] = {}  # remote experts work while those here do
        for number, (k, rows) in enumerate(asked):
            if (ask := getattr(self.experts[k], "ask", None)) is not None:
                later[number] = ask(x[rows], t[rows], cond[rows], a[rows, k], b[rows, k])
        together = in_one_pass(self.experts, asked, x, t, cond, a, b) if not later else None
        parts: list[Tensor | None] = [None] * len(asked) if together is None else [*together]
        # Those in memory first, so that experts that take turns there (see ``shelf``) are not fetched twice a step, and remote
        # ones last; the sum is in the order of their numbers always, for the same bits.
        for number, (k, rows) in sorted(
            enumerate(asked),
            key=lambda one: (one[0] in later, not getattr(self.experts[one[1][0]], "ready", True)),
        ):
            if number in later:
                try:
                    parts[number] = later[number]()
                except LostExpertError as error:
                    self.lose(k, float(t[0]), error.reason)
                    return None
            elif parts[number] is None:
                parts[number] = self._of(k, rows, x, t, cond, a[:, k], b[:, k])
            if self._trace is not None:
                self._trace.rows[k] = self._trace.rows.get(k, 0) + len(rows) * (1 if self.scale in (0, 1) else 2)
        v = torch.zeros_like(x)
        for (_, rows), part in zip(asked, parts, strict=True):
            assert part is not None
            v.index_add_(0, rows, part.to(v.dtype))
        return v

    def _of(self, k: int, rows: Tensor, x: Tensor, t: Tensor, cond: Conditioning, a: Tensor, b: Tensor) -> Tensor:
        """What expert ``k`` gives for the ``rows`` (ascending): for all of them nothing is copied that every step has again."""
        if len(rows) < len(x):
            return combine(self.experts[k], x[rows], t[rows], cond[rows], a[rows], b[rows])
        if self.scale in (0, 1):
            return combine(self.experts[k], x, t, cond, a, b)
        if self._doubled is None or self._doubled[0] is not cond:
            self._doubled = (cond, doubled(cond))
        return combine(self.experts[k], x, t, cond, a, b, self._doubled[1])

    def lose(self, k: int, t: float, reason: str) -> None:
        """Go on without expert ``k``, which failed at time t. Raises ArchipelError where there is no other."""
        lose = getattr(self.weighting, "lose", None)
        if lose is None or not lose(k):
            raise ArchipelError(
                f"expert {k} was lost ({reason}), and no other expert can make these clips: try again, or choose another strategy"
            )
        if self._trace is not None:
            self._trace.lost[k] = (t, reason)
