"""Strategies: which experts are kept, what is drawn, who is called on which rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from archipel.contracts import Conditioning
from archipel.ensemble import strategies
from archipel.ensemble.strategies import Fixed, Mixture, Routed, Trace
from archipel.errors import ArchipelError
from archipel.flow import draws, samplers

K = 3


def conditions(rows: int) -> Conditioning:
    """Each row's caption is its number, so that experts can tell which rows they were given."""
    pooled = torch.arange(rows).float()[:, None].expand(rows, 4)
    return Conditioning(torch.zeros(rows, 1, 2), torch.ones(rows, 1, dtype=torch.bool), pooled + 1)


class Counting:
    """An expert that answers with its own number and notes the rows of every call."""

    def __init__(self, number: int) -> None:
        self.number, self.calls = number, list[tuple[int, list[int]]]()

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        named = sorted({int(value) - 1 for value in cond.pooled[:, 0] if value > 0})
        self.calls.append((len(x), named))
        return torch.full_like(x, float(self.number))


def given(p: Tensor) -> strategies.Posterior:
    """A router whose answer for row i is p[i], also for the null caption (rows come twice then)."""
    return lambda x, t, cond: p.repeat(len(x) // len(p), 1)


def step(mixture: Mixture, rows: int) -> Tensor:
    return mixture(torch.zeros(rows, 1, 1, 1, 1), torch.full((rows,), 0.5), conditions(rows)).flatten()


def test_top_k_keeps_the_likeliest_and_breaks_ties_by_number() -> None:
    p = torch.tensor([[0.2, 0.5, 0.3], [1 / 3, 1 / 3, 1 / 3], [0.0, 0.0, 1.0]])
    assert strategies.top_k(1)(p).int().tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]
    assert strategies.top_k(2)(p).int().tolist() == [[0, 1, 1], [1, 1, 0], [1, 0, 1]]
    assert bool(strategies.top_k(9)(p).all())
    with pytest.raises(ValueError, match="1 or more"):
        strategies.top_k(0)


def test_threshold_keeps_what_reaches_it_and_always_the_best() -> None:
    p = torch.tensor([[0.05, 0.55, 0.4], [0.34, 0.33, 0.33], [0.125, 0.125, 0.75]])
    assert strategies.at_least(0.125)(p).int().tolist() == [[0, 1, 1], [1, 1, 1], [1, 1, 1]]
    assert strategies.at_least(0.9)(p).int().tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    "select", [strategies.top_k(1), strategies.top_k(2), strategies.at_least(0.3), strategies.everyone]
)
def test_kept_weights_are_renormalised(select: strategies.Select) -> None:
    p = torch.softmax(3 * torch.randn(50, K, generator=torch.Generator().manual_seed(1)), 1)
    kept = select(p)
    w = strategies.renormalise(p, kept)
    torch.testing.assert_close(w.sum(1), torch.ones(50))
    assert bool((w[~kept] == 0).all())
    ratio = (w / p)[kept]  # within a row all kept weights grow by one factor
    rows = kept.nonzero()[:, 0]
    for row in range(50):
        torch.testing.assert_close(ratio[rows == row], ratio[rows == row][:1].expand(int(kept[row].sum())))


def test_a_posterior_that_gives_the_kept_experts_nothing_falls_back_to_equal_shares() -> None:
    p = torch.tensor([[1.0, 0.0, 0.0]])
    w = strategies.renormalise(p, torch.tensor([[False, True, True]]))
    torch.testing.assert_close(w, torch.tensor([[0.0, 0.5, 0.5]]))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_each_expert_is_called_once_and_on_its_own_rows_only(guidance: float) -> None:
    p = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7], [0.5, 0.4, 0.1], [0.2, 0.1, 0.7], [0.9, 0.1, 0.0]])
    experts = [Counting(k) for k in range(K)]
    trace = Trace()
    found = step(Mixture(experts, Routed(given(p), strategies.top_k(1)), guidance, trace=trace), 5)
    assert found.tolist() == pytest.approx([0, 2, 0, 2, 0])
    branches = 1 if guidance == 1 else 2
    assert experts[0].calls == [(3 * branches, [0, 2, 4])]
    assert experts[1].calls == []
    assert experts[2].calls == [(2 * branches, [1, 3])]
    assert trace.rows == {0: 3 * branches, 2: 2 * branches}, "top-1 costs what one expert costs: 5 rows a branch"
    assert trace.weights[0].argmax(1).tolist() == [0, 2, 0, 2, 0] and trace.times == [0.5]


def test_two_experts_a_row_and_their_weighted_sum() -> None:
    p = torch.tensor([[0.6, 0.2, 0.2], [0.0, 0.25, 0.75]])
    experts = [Counting(k) for k in range(K)]
    found = step(Mixture(experts, Routed(given(p), strategies.top_k(2))), 2)
    assert found.tolist() == pytest.approx([0.25 * 1, 0.25 * 1 + 0.75 * 2])
    assert [expert.calls for expert in experts] == [[(1, [0])], [(2, [0, 1])], [(1, [1])]]


def test_router_sees_both_branches_in_one_call_and_only_where_they_are_needed() -> None:
    seen: list[int] = []

    def router(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        seen.append(len(x))
        return torch.full((len(x), K), 1 / K)

    experts = [Counting(k) for k in range(K)]
    for guidance, composition, rows in (
        (1.0, "guided-mixture", 4),
        (3.0, "mixture-of-guided", 4),
        (3.0, "guided-mixture", 8),
    ):
        seen.clear()
        step(Mixture(experts, Routed(router, strategies.everyone), guidance, composition), 4)  # type: ignore[arg-type]
        assert seen == [rows]


def test_oracle_uniform_and_random_controls() -> None:
    experts = [Counting(k) for k in range(K)]
    assert step(Mixture(experts, strategies.one_each([2, 0, 1], K)), 3).tolist() == [2, 0, 1]
    torch.testing.assert_close(step(Mixture(experts, strategies.uniform(2, K)), 2), torch.ones(2))
    chosen = step(Mixture(experts, strategies.random_expert(range(600), K)), 600).int()
    assert np.bincount(chosen.numpy(), minlength=K) / 600 == pytest.approx([1 / 3] * 3, abs=0.06)
    assert torch.equal(step(Mixture(experts, strategies.random_expert([5], K)), 1).int(), chosen[5:6])
    assert strategies.one_each([2, 2], K).needed() == [2]
    assert Routed(given(torch.ones(1, K)), strategies.everyone).needed() is None
    for wrong in ([3], [-1]):
        with pytest.raises(ArchipelError, match="experts 0 to 2"):
            strategies.one_each(wrong, K)


def test_weights_that_do_not_fit_the_batch_and_a_broken_router_are_refused() -> None:
    experts = [Counting(k) for k in range(K)]
    with pytest.raises(ValueError, match="4 rows"):
        step(Mixture(experts, strategies.one_each([0], K)), 4)
    with pytest.raises(ArchipelError, match="not finite"):
        step(Mixture(experts, Routed(given(torch.full((2, K), float("nan"))), strategies.top_k(1))), 2)


# --- ancestral -------------------------------------------------------------------------------------------------------


def router_by_caption(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """At pure noise it answers by the caption (with some dependence on the noise); later it would say expert 0."""
    wobble = 0.2 * x.flatten(1).mean(1, keepdim=True)
    logits = torch.log(torch.tensor([[0.1, 0.3, 0.6]])) + wobble * torch.tensor([[1.0, -1.0, 0.0]])
    late = torch.tensor([[20.0, 0.0, 0.0]]).expand(len(x), K)
    return torch.where((t == 1)[:, None], logits, late).softmax(1)


def test_ancestral_shares_are_the_text_posterior() -> None:
    count = 6000
    fixed = strategies.ancestral(router_by_caption, conditions(count), (2, 1, 3, 3), range(count))
    weights, _ = fixed(torch.zeros(count, 1), torch.ones(count), conditions(count), False)
    assert bool(((weights == 0) | (weights == 1)).all()) and bool((weights.sum(1) == 1).all())
    p = strategies.text_posterior(router_by_caption, conditions(1), (2, 1, 3, 3))
    assert weights.mean(0).tolist() == pytest.approx(p[0].tolist(), abs=0.02)
    assert p[0].tolist() == pytest.approx([0.1, 0.3, 0.6], abs=0.03), "the mean over noises takes the noise out"


def test_ancestral_never_changes_its_expert_on_the_way() -> None:
    seeds = [3, 4, 5, 6, 7, 8]
    trace = Trace()
    cond = conditions(6)
    fixed = strategies.ancestral(router_by_caption, cond, (1, 1, 1, 1), seeds)
    mixture = Mixture([Counting(k) for k in range(K)], fixed, 2.0, trace=trace)
    samplers.sample(mixture, torch.zeros(6, 1, 1, 1, 1), cond, steps=5, solver="heun")
    path = trace.per_step("heun")
    assert path.shape == (6, 5, K) and len(trace.weights) == 9
    assert (path == path[:, :1]).all()
    assert len(set(path[:, 0].argmax(1).tolist())) > 1, "different clips follow different experts"


def test_an_ancestral_draw_belongs_to_the_clip_s_seed_and_not_to_its_noise_or_batch() -> None:
    p = torch.tensor([[0.5, 0.5]]).expand(400, 2)
    together = strategies.draw(p, range(400))
    assert strategies.draw(p[:1], [17])[0] == together[17]
    noise = draws.clip_noise(range(400), (1,))[:, 0]
    assert abs(np.corrcoef(noise, together)[0, 1]) < 0.15
    certain = torch.tensor([[0.0, 1.0, 0.0]]).expand(50, 3)
    assert (strategies.draw(certain, range(50)) == 1).all(), "what has no share is never drawn"


def test_per_step_weights_of_euler_and_heun_have_one_row_per_step() -> None:
    def router(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return torch.stack([t, 1 - t], 1)

    for solver in samplers.SOLVERS:
        trace = Trace()
        mixture = Mixture([Counting(0), Counting(1)], Routed(router, strategies.everyone), trace=trace)
        samplers.sample(mixture, torch.zeros(2, 1, 1, 1, 1), conditions(2), steps=4, solver=solver)
        assert trace.per_step(solver)[0, :, 0].tolist() == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_fixed_weights_take_the_dtype_of_the_state() -> None:
    w, _ = Fixed(torch.ones(1, 1))(torch.zeros(1, 1, dtype=torch.float64), torch.ones(1), conditions(1), False)
    assert w.dtype == torch.float64
