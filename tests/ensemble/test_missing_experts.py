"""Missing and late experts: the exact sub-mixture, what is said, what is refused, and picking up late ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from archipel import store
from archipel.backbones import base
from archipel.contracts import Conditioning
from archipel.ensemble import strategies
from archipel.ensemble.pipeline import Archipelago
from archipel.ensemble.stage import generate_arms
from archipel.ensemble.strategies import Mixture, Routed, Trace
from archipel.errors import ArchipelError, DamagedError, MissingStageError
from archipel.flow import draws, samplers
from archipel.flow.exact import GaussianMixture
from archipel.run import Run

K = 3
PROMPTS = ["a red ball", "two green cats", "one blue square turns", "rain"]


# --- against the closed form -----------------------------------------------------------------------------------------


def absent(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    raise AssertionError("a missing expert was called")


def world() -> tuple[GaussianMixture, dict[str, Tensor]]:
    """Six components in three clusters; captions speak for components."""
    g = torch.Generator().manual_seed(5)
    parts = {
        "means": 1.2 * torch.randn(6, 1, 1, 2, 2, generator=g),
        "variances": 0.1 + torch.rand(6, generator=g),
        "weights": 0.2 + torch.rand(6, generator=g),
    }
    return GaussianMixture(**parts, clusters=[0, 0, 1, 1, 2, 2]), parts


def captions(rows: int, components: int = 6) -> Conditioning:
    pooled = torch.randn(rows, components, generator=torch.Generator().manual_seed(9))
    return Conditioning(torch.zeros(rows, 1, 2), torch.ones(rows, 1, dtype=torch.bool), pooled)


@pytest.mark.parametrize("present", [[0, 1], [0, 2], [1, 2], [1]])
@pytest.mark.parametrize("composition", ["mixture-of-guided", "guided-mixture"])
def test_the_masked_mixture_is_the_closed_form_of_what_is_left(present: list[int], composition: str) -> None:
    whole, parts = world()
    kept = [m for m in range(6) if m // 2 in present]
    left = GaussianMixture(**{name: value[kept] for name, value in parts.items()}, clusters=[0] * len(kept))
    experts = [whole.expert(k) if k in present else absent for k in range(K)]
    cond, x = captions(8), torch.randn(8, 1, 1, 2, 2, generator=torch.Generator().manual_seed(2))
    only = Conditioning(cond.tokens, cond.mask, cond.pooled[:, kept])
    for time in (0.02, 0.3, 0.7, 1.0):
        t = torch.full((8,), time)
        trace = Trace()
        plain = Mixture(experts, Routed(whole.posterior, strategies.everyone, present), trace=trace)
        torch.testing.assert_close(plain(x, t, cond), left.velocity(x, t, only), atol=2e-5, rtol=2e-5)
        gone = [k for k in range(K) if k not in present]
        assert bool((trace.weights[0][:, gone] == 0).all())
        if composition == "guided-mixture":  # guides the exact marginals, so it too has a closed form
            mixed = Mixture(experts, Routed(whole.posterior, strategies.everyone, present), 3.0, "guided-mixture")
            null = left.velocity(x, t, only.null())
            exact = null + 3.0 * (left.velocity(x, t, only) - null)
            torch.testing.assert_close(mixed(x, t, cond), exact, atol=1e-4, rtol=1e-4)


def test_the_path_of_a_masked_ensemble_ends_where_the_sub_mixture_s_own_path_ends() -> None:
    whole, parts = world()
    left = GaussianMixture(**{name: value[2:] for name, value in parts.items()}, clusters=[0, 0, 1, 1])
    cond, noise = captions(16), torch.from_numpy(draws.clip_noise(range(16), (1, 1, 2, 2)))
    only = Conditioning(cond.tokens, cond.mask, cond.pooled[:, 2:])
    mixture = Mixture([absent, whole.expert(1), whole.expert(2)], Routed(whole.posterior, strategies.everyone, [1, 2]))
    found = samplers.sample(mixture, noise, cond, steps=20, solver="heun")
    torch.testing.assert_close(
        found, samplers.sample(left.velocity, noise, only, steps=20, solver="heun"), atol=1e-4, rtol=1e-4
    )


def test_ancestral_draws_follow_the_posterior_of_those_present() -> None:
    def router(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return torch.tensor([[0.6, 0.1, 0.3]]).expand(len(x), K)

    count = 4000
    fixed = strategies.ancestral(router, captions(count), (1, 1, 1, 1), range(count), [1, 2])
    w, _ = fixed(torch.zeros(count, 1), torch.ones(count), captions(count), False)
    assert bool(((w == 0) | (w == 1)).all()) and bool((w[:, 0] == 0).all())
    assert w.mean(0).tolist() == pytest.approx([0, 0.25, 0.75], abs=0.02)
    everyone = strategies.ancestral(router, captions(count), (1, 1, 1, 1), range(count))
    again = strategies.ancestral(router, captions(count), (1, 1, 1, 1), range(count), [0, 1, 2])
    x = torch.zeros(count, 1)
    assert torch.equal(everyone(x, x[:, 0], captions(count), False)[0], again(x, x[:, 0], captions(count), False)[0])


SURE = torch.tensor([[0.98, 0.02, 0.0], [0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("select", "present", "wanted"),
    [
        (strategies.top_k(1), [1, 2], [[0, 1, 0], [0, 0, 1], [0, 1, 0]]),
        (strategies.top_k(2), [2], [[0, 0, 1]] * 3),
        (strategies.top_k(2), [0, 2], [[1, 0, 0], [2 / 7, 0, 5 / 7], [1, 0, 0]]),
        (strategies.at_least(0.9), [1, 2], [[0, 1, 0], [0, 0, 1], [0, 0.5, 0.5]]),
        (strategies.at_least(0.999), [1, 2], [[0, 1, 0], [0, 0, 1], [0, 1, 0]]),
        (strategies.everyone, [1], [[0, 1, 0]] * 3),
    ],
)
def test_selections_are_among_those_present_and_never_empty(
    select: strategies.Select, present: list[int], wanted: list[list[float]]
) -> None:
    """Row 3: the router gives those present nothing at all; they share equally before the selection."""
    if wanted[-1] == [0, 0.5, 0.5]:
        wanted[-1] = [0, 1, 0]  # equal shares of 0.5 do not reach 0.9: the first of the likeliest
    routed = Routed(lambda x, t, cond: SURE.repeat(len(x) // 3, 1), select, present)
    for null in (False, True):
        w, n = routed(torch.zeros(3, 1), torch.ones(3), captions(3), null)
        torch.testing.assert_close(w, torch.tensor(wanted, dtype=w.dtype), atol=1e-6, rtol=0)
        torch.testing.assert_close(n.sum(1), torch.ones(3))
        assert bool((n[:, [k for k in range(K) if k not in present]] == 0).all())


def test_controls_under_a_mask() -> None:
    x, t, cond = torch.zeros(600, 1), torch.ones(600), captions(600)
    w, _ = strategies.uniform(600, K, [0, 2])(x, t, cond, False)
    assert w[0].tolist() == [0.5, 0.0, 0.5]
    w, _ = strategies.random_expert(range(600), K, [0, 2])(x, t, cond, False)
    assert w.mean(0).tolist() == pytest.approx([0.5, 0.0, 0.5], abs=0.07)
    same, _ = strategies.random_expert(range(600), K, [0, 1, 2])(x, t, cond, False)
    assert torch.equal(same, strategies.random_expert(range(600), K)(x, t, cond, False)[0])


# --- a run with missing experts --------------------------------------------------------------------------------------


class Letters:
    """A text encoder that makes numbers of a caption's letters."""

    name, tokens, width, pooled_width = "letters", 5, 384, 384

    def encode(self, captions: Sequence[str]) -> Conditioning:
        rows = [torch.from_numpy(draws.normals(sum(map(ord, caption)), range(5), (384,))) for caption in captions]
        tokens = torch.stack(rows).float()
        return Conditioning(tokens, torch.ones(len(captions), 5, dtype=torch.bool), tokens.mean(1))


def opened(run: Run) -> Archipelago:
    model = Archipelago.load(run.root)
    model.parts.text = Letters()
    return model


ROUTED = ["top1", "top2", "top3", "full", "threshold", "ancestral"]


@pytest.mark.parametrize("strategy", [*ROUTED, "uniform", "random"])
def test_any_strategy_generates_without_an_expert_and_says_so(
    small_run: Run, strategy: str, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(small_run.expert("1"))
    made = opened(small_run).generate(PROMPTS, strategy=strategy, seeds=3)
    assert made.clips.shape == (4, 4, 8, 8, 3) and made.weights is not None
    assert (made.weights[..., 1] == 0).all()
    np.testing.assert_allclose(made.weights.sum(-1), 1, atol=1e-5)
    (warning,) = made.warnings
    assert "1 of 3 experts missing: 1" in warning and f"archipel train {small_run.root} 1" in warning
    assert "goes to experts 0, 2" in warning and warning in caplog.text


def test_one_expert_alone_generates_without_a_router(small_run: Run) -> None:
    for name in ("0", "2", "router"):
        shutil.rmtree(small_run.expert(name))
    model = opened(small_run)
    alone = model.generate(PROMPTS, strategy="expert-1")
    assert alone.warnings == []
    for strategy in (*ROUTED, "uniform", "random"):
        made = model.generate(PROMPTS, strategy=strategy)
        assert np.array_equal(made.clips, alone.clips), "whatever the strategy, there is only this one"
        assert "2 of 3 experts missing: 0, 2" in made.warnings[0]
        assert (strategy in ROUTED) == any("no router" in w and "expert 1" in w for w in made.warnings)


def test_several_experts_without_a_router_are_refused_with_what_to_do(small_run: Run) -> None:
    shutil.rmtree(small_run.expert("router"))
    model = opened(small_run)
    for strategy in ROUTED:
        with pytest.raises(MissingStageError, match=r"experts 0, 1, 2.*archipel route .*expert-0, uniform, random"):
            model.generate("rain", strategy=strategy)
    for strategy in ("uniform", "random", "expert-2", "monolith"):
        assert len(model.generate("rain", strategy=strategy).clips) == 1


def test_what_a_strategy_cannot_do_without_stays_an_error(small_run: Run) -> None:
    shutil.rmtree(small_run.expert("1"))
    shutil.rmtree(small_run.expert("monolith"))
    model = opened(small_run)
    with pytest.raises(MissingStageError, match=r"1: run `archipel train .* 1`"):
        model.generate(["rain", "snow"], strategy="oracle", clusters=[0, 1])
    assert len(model.generate(["rain", "snow"], strategy="oracle", clusters=[0, 2]).clips) == 2
    with pytest.raises(MissingStageError, match=r"archipel train .* 1`"):
        model.generate("rain", strategy="expert-1")
    with pytest.raises(MissingStageError, match=r"archipel train .* monolith`"):
        model.generate("rain", strategy="monolith")
    for name in ("0", "2"):
        shutil.rmtree(small_run.expert(name))
    with pytest.raises(MissingStageError, match="0, 1, 2"):
        model.generate("rain", strategy="top1")


def test_scores_are_never_made_with_a_part_missing(small_run: Run) -> None:
    shutil.rmtree(small_run.expert("2"))
    with pytest.raises(MissingStageError, match=r"archipel train .* 2"):
        generate_arms(small_run)


# --- late and replaced ones ------------------------------------------------------------------------------------------


def test_a_late_expert_is_picked_up_without_restart(small_run: Run, tmp_path: Path) -> None:
    whole = opened(small_run).generate(PROMPTS, strategy="full")
    for name in ("1", "router"):
        shutil.move(small_run.expert(name), tmp_path / name)
    model = opened(small_run)
    assert model.refresh() == []
    with pytest.raises(MissingStageError, match="router"):
        model.generate(PROMPTS, strategy="full")
    shutil.move(tmp_path / "router", small_run.expert("router"))
    assert model.refresh() == ["router"]
    assert "missing: 1" in model.generate(PROMPTS, strategy="full").warnings[0]
    shutil.move(tmp_path / "1", small_run.expert("1"))
    made = model.generate(PROMPTS, strategy="full")  # looks by itself
    assert made.warnings == [] and np.array_equal(made.clips, whole.clips)
    assert model.refresh() == []


def test_a_replaced_expert_is_used_from_the_next_generate_and_let_go(
    small_run: Run, retrain: Callable[[Run, str, int], None]
) -> None:
    model = opened(small_run)
    before = model.generate("rain", strategy="expert-0")
    retrain(small_run, "0", 77)
    assert model.refresh() == ["0"]
    after = model.generate("rain", strategy="expert-0")
    assert not np.array_equal(before.clips, after.clips)
    assert np.array_equal(after.clips, opened(small_run).generate("rain", strategy="expert-0").clips)
    retrain(small_run, "0", 0)
    assert np.array_equal(model.generate("rain", strategy="expert-0").clips, before.clips)


def test_a_batch_ends_with_the_version_it_began_with(small_run: Run, retrain: Callable[[Run, str, int], None]) -> None:
    model = opened(small_run)
    wanted = model.generate("rain", strategy="expert-0").clips

    def replace(i: int, n: int, x: Tensor, t: float) -> None:
        if i == 1:
            retrain(small_run, "0", 5)
            assert model.refresh() == ["0"]

    assert np.array_equal(model.generate("rain", strategy="expert-0", on_step=replace).clips, wanted)
    assert not np.array_equal(model.generate("rain", strategy="expert-0").clips, wanted)


@pytest.mark.parametrize("moment", ["read_card", "check_card", "read_json", "map_tensors"])
def test_a_replacement_in_the_middle_of_loading_gives_one_whole_version(
    small_run: Run, retrain: Callable[[Run, str, int], None], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Another process replaces the expert right after one of the reads that loading consists of."""
    folder, real, replaced = small_run.expert("0"), getattr(store, moment), []

    def and_replace(path: Path, *more: str) -> object:
        found = real(path, *more)
        if not replaced and "0" in path.parts:
            replaced.append(path)
            retrain(small_run, "0", 12)
        return found

    monkeypatch.setattr(store, moment, and_replace)
    _, _, tensors = base.read_folder(folder, "train")
    found = {name: value.numpy().tobytes() for name, value in tensors.items()}
    monkeypatch.undo()
    assert replaced
    _, _, second = base.read_folder(folder, "train")
    assert found == {name: value.numpy().tobytes() for name, value in second.items()}


def test_a_replacement_that_does_not_end_is_refused(small_run: Run, retrain: Callable[[Run, str, int], None]) -> None:
    folder = small_run.expert("0")
    card = (folder / "card.json").read_bytes()
    retrain(small_run, "0", 12)
    (folder / "card.json").write_bytes(card)  # new weights, old card: its writer died in between
    with pytest.raises(DamagedError, match=r"model\.safetensors"):
        opened(small_run).generate("rain", strategy="expert-0")


def test_a_damaged_card_disturbs_only_who_needs_it(small_run: Run) -> None:
    (small_run.expert("1") / "card.json").write_text("{")
    model = opened(small_run)
    assert len(model.generate("rain", strategy="monolith").clips) == 1
    assert len(model.generate("rain", strategy="expert-0").clips) == 1
    with pytest.raises(DamagedError, match=r"1/card\.json"):
        model.generate("rain", strategy="full")


def test_a_run_id_that_was_given_must_be_the_run_s(small_run: Run) -> None:
    assert Archipelago.load(small_run.root, run_id=small_run.id).config == small_run.config
    for wrong in ("0" * 64, small_run.id[:6]):
        with pytest.raises(ArchipelError, match="holds run"):
            Archipelago.load(small_run.root, run_id=wrong)
