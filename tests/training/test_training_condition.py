"""A monolith that is told the cluster: how it is built, trained, counted, and what it hears where no text is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from archipel import config, store
from archipel.backbones import flops
from archipel.backbones.base import Denoiser
from archipel.backbones.cluster import add_cluster, with_cluster
from archipel.backbones.registry import build_expert, load_denoiser
from archipel.contracts import Conditioning
from archipel.errors import DamagedError
from archipel.run import MONOLITH, Run
from archipel.training import budget, heldout
from archipel.training.batches import open_shard
from archipel.training.budget import write_ledger
from archipel.training.objective import FlowObjective
from archipel.training.stage import train

TOLD = {"condition": "cluster"}


def build(run: Run, *, clusters: int, shaken: bool = True) -> Denoiser:
    model = build_expert(run.config, seed=0, clusters=clusters)
    if shaken:  # a network that has learned something: fresh ones answer zero
        g = torch.Generator().manual_seed(1)
        for p in model.parameters():
            p.data += 0.1 * torch.randn(p.shape, generator=g)
    return model.eval()


def asked(run: Run, rows: int = 4) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    g = torch.Generator().manual_seed(2)
    L, D, P = flops.text_shape(run.config)
    mask = torch.ones(rows, L, dtype=torch.bool)
    cond = Conditioning(torch.randn(rows, L, D, generator=g), mask, torch.randn(rows, P, generator=g))
    return torch.randn(rows, *flops.latent_shape(run.config), generator=g), torch.rand(rows, generator=g), cond


@torch.no_grad()
def test_its_answer_depends_on_the_cluster_and_that_of_the_null_branch_does_not(small_run: Run) -> None:
    model = build(small_run, clusters=2)
    x, t, cond = asked(small_run)
    one, two = (with_cluster(model, torch.full((4,), k)) for k in (0, 1))
    assert (one(x, t, cond) - two(x, t, cond)).abs().amax((1, 2, 3, 4)).min() > 1e-4
    assert torch.equal(one(x, t, cond.null()), two(x, t, cond.null()))
    plain = model.velocity(x, t, Conditioning(cond.tokens * 0, cond.mask & False, torch.zeros(4, 386)))
    assert torch.equal(one(x, t, cond.null()), plain)
    mixed = with_cluster(model, torch.tensor([0, 1, 1, 0]))
    both = mixed(torch.cat([x, x]), torch.cat([t, t]), Conditioning.cat([cond, cond.null()]))  # as guidance asks
    alone = torch.stack([(one, two, two, one)[i](x, t, cond)[i] for i in range(4)])
    torch.testing.assert_close(both[:4], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both[4:], plain, rtol=1e-4, atol=1e-5)


def test_the_cluster_is_told_in_the_scale_of_the_text() -> None:
    cond = Conditioning(torch.zeros(3, 2, 1), torch.ones(3, 2, dtype=torch.bool), torch.zeros(3, 5))
    told = add_cluster(cond, torch.tensor([0, 1, 2]), 3).pooled[:, 5:]
    assert told.square().mean().item() == pytest.approx(1) and told.argmax(1).tolist() == [0, 1, 2]


def test_wrong_uses_of_clusters_are_refused(small_run: Run) -> None:
    x, t, cond = asked(small_run)
    told = build(small_run, clusters=2)
    with pytest.raises(ValueError, match="takes no cluster"):
        with_cluster(build(small_run, clusters=0), torch.zeros(4))
    with pytest.raises(ValueError, match="0 to 1"):
        with_cluster(told, torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="4 rows for 3 clusters"):
        with_cluster(told, torch.zeros(3))(x, t, cond)


def test_it_begins_as_every_other_arm(small_run: Run) -> None:
    plain, told = build(small_run, clusters=0, shaken=False), build(small_run, clusters=2, shaken=False)
    state, wide = plain.network.state_dict(), told.network.state_dict()
    for name, value in state.items():
        assert torch.equal(wide[name][:, :384] if wide[name].shape != value.shape else wide[name], value)
    assert not wide["time_text_embed.text_embedder.linear_1.weight"][:, 384:].any()


def test_dropped_text_drops_the_cluster_in_training(small_run: Run) -> None:
    model, shard = build(small_run, clusters=2), open_shard(small_run.shard(MONOLITH))
    seen: list[Conditioning] = []
    predict = model.predict
    model.predict = lambda x, t, cond: (seen.append(cond), predict(x, t, cond))[1]  # type: ignore[method-assign]
    objective = FlowObjective(model, shard, seed=0, batch=12, text_dropout=0.5)
    batch = objective.batch(0)
    objective.loss(batch)
    told, dropped = seen[0].pooled[:, 384:], ~batch.cond.mask.any(1)
    assert 0 < int(dropped.sum()) < 12
    assert not told[dropped].any() and torch.equal(told[~dropped].argmax(1), batch.cluster[~dropped])


def test_it_is_trained_counted_and_measured_like_the_others(tmp_path: Path, make_run: Callable[..., Run]) -> None:
    run = make_run(tmp_path / "run", monolith=TOLD)
    plain = make_run(tmp_path / "plain")
    train(run, MONOLITH, threads=1)
    card = store.read_card(run.expert(MONOLITH))
    assert card is not None and card["network"]["condition"] == "cluster" and card["network"]["clusters"] == 2
    forward = flops.monolith_forward_flops(run.config)
    assert card["forward_flops"] == forward > flops.monolith_forward_flops(plain.config)
    assert card["flops"] == run.config.compute.monolith_flops
    ratio = run.config.compute.archipelago_flops / run.config.compute.monolith_flops
    assert abs(ratio - 1) < 0.5 / run.config.monolith.steps + 1e-9  # the nearest whole number of steps
    model = load_denoiser(run.expert(MONOLITH))
    assert model.clusters == 2
    x, t, cond = asked(run, 2)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        with_cluster(model, torch.zeros(2))(x, t, cond)
    assert counter.get_total_flops() / 2 == pytest.approx(forward, rel=0.01)
    found = heldout.measure(run.config, run.expert(MONOLITH), run.shard(MONOLITH) / "validation.safetensors")
    assert found.loss == pytest.approx(card["validation"]["ema"]["loss"], rel=1e-5)
    sampling = write_ledger(run)["sampling"]["per_clip"]
    assert sampling["monolith"]["router"] == sampling["ancestral"]["router"] > 0
    assert write_ledger(plain)["sampling"]["per_clip"]["monolith"]["router"] == 0


def test_steps_are_resolved_so_that_flops_match() -> None:
    told = budget.resolve(config.build({"monolith": {"condition": "cluster", "batch": 1}, "partition": {"k": 64}}))
    assert told.compute.monolith_flops / told.compute.archipelago_flops == pytest.approx(1, abs=1e-5)
    again = budget.resolve(
        told.model_copy(update={"monolith": told.monolith.model_copy(update={"condition": "none", "steps": 0})})
    )
    assert again.monolith.steps > told.monolith.steps


def test_a_card_that_does_not_fit_the_weights_is_refused(tmp_path: Path, make_run: Callable[..., Run]) -> None:
    run = make_run(tmp_path / "run", monolith=TOLD)
    train(run, MONOLITH, threads=1)
    card = store.read_card(run.expert(MONOLITH)) or {}
    store.write_sealed(run.expert(MONOLITH) / "card.json", card | {"network": card["network"] | {"clusters": 3}})
    with pytest.raises(DamagedError, match="do not fit its weights"):
        load_denoiser(run.expert(MONOLITH))
