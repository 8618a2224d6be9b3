"""Mixtures and guidance against the closed form: an exact router and exact experts give the marginal field."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from archipel.contracts import Conditioning
from archipel.ensemble import strategies
from archipel.ensemble.guidance import COMPOSITIONS, Guided, branch_weights
from archipel.ensemble.strategies import Mixture, Routed, everyone, top_k
from archipel.flow import draws, samplers
from archipel.flow.exact import GaussianMixture

SHAPE = (2, 1, 2, 1)


def sea() -> GaussianMixture:
    """Five components in three clusters; a caption adds to their log-weights, the null caption adds nothing."""
    g = torch.Generator().manual_seed(5)
    means = 1.5 * torch.randn(5, *SHAPE, generator=g)
    return GaussianMixture(means, 0.05 + torch.rand(5, generator=g), torch.tensor([1.0, 2, 3, 2, 1]), [0, 0, 1, 2, 2])


def batch(rows: int = 12) -> tuple[Tensor, Tensor, Conditioning]:
    g = torch.Generator().manual_seed(6)
    cond = Conditioning(
        torch.randn(rows, 2, 3, generator=g),
        torch.ones(rows, 2, dtype=torch.bool),
        2 * torch.randn(rows, 5, generator=g),
    )
    return torch.randn(rows, *SHAPE, generator=g), torch.rand(rows, generator=g), cond


def test_exact_parts_give_the_marginal_field() -> None:
    mix = sea()
    x, t, cond = batch(64)
    found = Mixture(mix.experts(), Routed(mix.posterior, everyone))(x, t, cond)
    torch.testing.assert_close(found, mix.velocity(x, t, cond), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("s", [0.0, 1.0, 2.5])
def test_guided_mixture_of_exact_parts_is_the_guided_marginal(s: float) -> None:
    mix = sea()
    x, t, cond = batch(64)
    wanted = Guided(mix.velocity, s)(x, t, cond)
    null, given = mix.velocity(x, t, cond.null()), mix.velocity(x, t, cond)
    torch.testing.assert_close(wanted, null + s * (given - null), atol=1e-5, rtol=1e-5)
    found = Mixture(mix.experts(), Routed(mix.posterior, everyone), s, "guided-mixture")(x, t, cond)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def test_mixture_of_guided_is_what_it_says() -> None:
    mix = sea()
    x, t, cond = batch()
    guided = torch.stack([Guided(expert, 3.0)(x, t, cond) for expert in mix.experts()], 1)
    wanted = (mix.posterior(x, t, cond)[:, :, None, None, None, None] * guided).sum(1)
    found = Mixture(mix.experts(), Routed(mix.posterior, everyone), 3.0, "mixture-of-guided")(x, t, cond)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_compositions_agree_where_they_must_and_differ_where_they_may() -> None:
    mix = sea()
    x, t, cond = batch()

    def both(select: strategies.Select, s: float, c: Conditioning = cond) -> tuple[Tensor, Tensor]:
        one, two = (Mixture(mix.experts(), Routed(mix.posterior, select), s, kind)(x, t, c) for kind in COMPOSITIONS)
        return one, two

    torch.testing.assert_close(*both(everyone, 1.0), atol=0, rtol=0)  # no null branch at all
    torch.testing.assert_close(*both(top_k(1), 4.0), atol=1e-6, rtol=1e-6)  # one expert has weight 1 on both branches
    torch.testing.assert_close(*both(everyone, 4.0, cond.null()), atol=1e-5, rtol=1e-5)  # equal posteriors
    one, two = both(everyone, 4.0)
    assert float((one - two).abs().max()) > 0.01
    alone = GaussianMixture(torch.zeros(5, *SHAPE), torch.ones(5), torch.ones(5), [0] * 5)
    one, two = (
        Mixture(alone.experts(), Routed(alone.posterior, everyone), 4.0, kind)(x, t, cond) for kind in COMPOSITIONS
    )
    torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-6)


def test_one_set_of_experts_serves_both_branches() -> None:
    """Top-2 by the captions' posterior; the null branch renormalises its own posterior over the same two."""
    mix = sea()
    x, t, cond = batch()
    p, q = mix.posterior(x, t, cond), mix.posterior(x, t, cond.null())
    kept = top_k(2)(p)
    assert bool((kept != top_k(2)(q)).any()), "the test needs rows where the null branch alone would choose others"
    w, n = Routed(mix.posterior, top_k(2))(x, t, cond, True)
    assert torch.equal(n > 0, kept) and torch.equal(w > 0, kept)
    torch.testing.assert_close(n, q * kept / (q * kept).sum(1, keepdim=True))


def test_coefficients_sum_to_one_and_unknown_compositions_are_refused() -> None:
    w, n = torch.tensor([[0.2, 0.8]]), torch.tensor([[0.5, 0.5]])
    for kind in COMPOSITIONS:
        a, b = branch_weights(w, n, 7.5, kind)
        assert float(a.sum() + b.sum()) == pytest.approx(1, abs=1e-5)
    assert torch.equal(branch_weights(w, n, 7.5, "mixture-of-guided")[1], -6.5 * w)
    assert torch.equal(branch_weights(w, n, 7.5, "guided-mixture")[1], -6.5 * n)
    with pytest.raises(ValueError, match="mixture-of-guided"):
        branch_weights(w, n, 2.0, "both")  # type: ignore[arg-type]


def test_branches_share_one_call_and_scale_one_costs_one_branch() -> None:
    calls: list[int] = []

    def velocity(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        assert len(x) == len(t) == len(cond)
        calls.append(len(x))
        return x

    x, t, cond = batch(4)
    for s, rows in ((1.0, 4), (0.0, 4), (2.0, 8)):
        calls.clear()
        Guided(velocity, s)(x, t, cond)
        assert calls == [rows]


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_ensemble_samples_have_the_mixture_s_shares(solver: str) -> None:
    """Full ensemble and ancestral: both sample the mixture; top-1 by argmax without text need not."""
    mix = GaussianMixture(
        torch.tensor([[-4.0, 0.0], [0.0, 3.0], [4.0, 0.0]]),
        torch.tensor([0.1, 0.2, 0.05]),
        torch.tensor([0.2, 0.3, 0.5]),
    )
    count = 1500
    seeds = list(range(count))
    noise = torch.from_numpy(draws.clip_noise(seeds, (2,)))
    cond = Conditioning(torch.zeros(count, 1, 1), torch.zeros(count, 1, dtype=torch.bool), torch.zeros(count, 3))
    for weighting in (Routed(mix.posterior, everyone), strategies.ancestral(mix.posterior, cond, (2,), seeds)):
        found = samplers.sample(Mixture(mix.experts(), weighting), noise, cond, steps=24, solver=solver)
        nearest = torch.cdist(found.double(), mix.means).argmin(1)
        shares = np.bincount(nearest.numpy(), minlength=3) / count
        assert shares == pytest.approx([0.2, 0.3, 0.5], abs=0.04)
        for k in range(3):
            own = found[nearest == k].double()
            torch.testing.assert_close(own.mean(0), mix.means[k], atol=0.1, rtol=0)
            torch.testing.assert_close(own.var(0), mix.variances[k], atol=0.05, rtol=0.2)
