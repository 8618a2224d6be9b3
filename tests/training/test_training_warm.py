"""The shared start: what begins with it, how it travels, what is said where it is missing, and what it costs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from archipel import config, pipeline, store
from archipel.backbones import flops
from archipel.backbones.registry import load_denoiser
from archipel.errors import ArchipelError, ConfigError, DamagedError, MissingStageError
from archipel.partition.shards import INIT
from archipel.run import MONOLITH, TRUNK, Run
from archipel.training import budget, stage
from archipel.training.batches import Shard
from archipel.training.loop import Trainer
from archipel.training.stage import train

WARM = {"warm_start": "trunk", "trunk_steps": 6}


def carry(run: Run, *names: str) -> dict[str, object]:
    """Put the trunk's weights into shards, as *partition* does."""
    card = store.read_card(run.expert(TRUNK)) or {}
    init = {key: card[key] for key in ("sha256", "flops", "steps")}
    for name in names:
        folder = run.shard(name)
        shutil.copyfile(run.expert(TRUNK) / "model.safetensors", folder / INIT)
        old = store.read_card(folder) or {}
        files = ["train.safetensors", "validation.safetensors", INIT]
        store.write_card(folder, "shard", run.id, files, cluster=old["cluster"], init=init)
    return init


@pytest.fixture
def warm(tmp_path: Path, make_run: Callable[..., Run]) -> Run:
    """A warm run with its trunk trained and its shards carrying it."""
    run = make_run(tmp_path / "run", expert=WARM)
    train(run, TRUNK, threads=1)
    carry(run, *run.expert_names, MONOLITH)
    return run


class Stopping(Exception):  # noqa: N818 - ends a training before its first step
    pass


def first_weights(run: Run, name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[dict, dict]:
    """Weights and average of a job before its first step."""
    seen: list[Trainer] = []

    def stop(self: Trainer) -> None:
        seen.append(self)
        raise Stopping

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", stop)
        with pytest.raises(Stopping):
            train(run, name, threads=1)
    weights = {key: p.detach().clone() for key, p in seen[0].named}
    return weights, {key: value.clone() for key, value in seen[0].ema.tensors.items()}


def test_the_trunk_is_a_job_of_its_own_and_none_of_the_islands(warm: Run) -> None:
    card = store.read_card(warm.expert(TRUNK))
    assert card is not None and card["cluster"] is None and "warm_start" not in card
    assert card["steps"] == 6 and card["batch"] == warm.config.monolith.batch
    assert card["flops"] == flops.training_flops(flops.expert_forward_flops(warm.config), 6, warm.config.monolith.batch)
    assert warm.expert(TRUNK) == warm.root / "trunk" and TRUNK not in warm.job_names
    assert {one.split("/")[1] for one in card["touched"]["read"] if one.startswith("shards/")} == {"all"}


@pytest.mark.parametrize("name", ["0", "1", MONOLITH])
def test_every_arm_begins_with_its_weights_and_so_does_the_average(
    warm: Run, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = load_denoiser(warm.expert(TRUNK)).network.state_dict()
    for found in first_weights(warm, name, monkeypatch):
        assert {key.removeprefix("network.") for key in found} == set(wanted)
        assert all(torch.equal(value, wanted[key.removeprefix("network.")]) for key, value in found.items())


def test_a_monolith_that_is_told_the_cluster_begins_with_the_same_function(
    tmp_path: Path, make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", expert=WARM, monolith={"condition": "cluster"})
    train(run, TRUNK, threads=1)
    carry(run, MONOLITH)
    wanted, (found, _) = (
        load_denoiser(run.expert(TRUNK)).network.state_dict(),
        first_weights(run, MONOLITH, monkeypatch),
    )
    for key, value in wanted.items():
        mine = found[f"network.{key}"]
        same = mine if mine.shape == value.shape else mine[:, :384]
        assert torch.equal(same, value)
    assert not found["network.time_text_embed.text_embedder.linear_1.weight"][:, 384:].any()


def test_the_card_names_the_start_and_the_island_touched_its_own_shard_only(warm: Run) -> None:
    train(warm, "0", threads=1)
    card, trunk = store.read_card(warm.expert("0")), store.read_card(warm.expert(TRUNK))
    assert card is not None and trunk is not None
    assert card["warm_start"] == {"sha256": trunk["sha256"], "flops": trunk["flops"], "steps": 6}
    assert card["touched"]["read"] == ["run.toml", *(f"shards/0/{one}" for one in sorted(
        ["card.json", INIT, "train.safetensors", "validation.safetensors"]
    ))]  # fmt: skip
    assert store.read_card(warm.expert("0"))["steps"] == warm.config.expert.steps  # type: ignore[index]


def test_the_trunk_s_order_and_noise_do_not_come_back(warm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, torch.Tensor] = {}

    def look(run: Run, name: str, plan: object, make: Callable[[Shard, str], stage.FlowObjective], **_: object) -> None:
        seen[name] = make(stage_shard, "cpu").batch(0).noise

    from archipel.training.batches import open_shard

    stage_shard = open_shard(warm.shard(MONOLITH))
    monkeypatch.setattr(stage, "train_job", look)
    train(warm, TRUNK)
    train(warm, MONOLITH)
    assert not torch.equal(seen[TRUNK], seen[MONOLITH])


def test_without_it_people_are_told_what_makes_it(tmp_path: Path, make_run: Callable[..., Run]) -> None:
    run = make_run(tmp_path / "run", expert=WARM)
    with pytest.raises(
        MissingStageError, match=r"shards/0 does not carry the shared start .* `archipel train RUN trunk"
    ):
        train(run, "0", threads=1)
    with pytest.raises(ConfigError, match=r"expert.trunk_steps = 0, but expert.warm_start = 'trunk'"):
        config.build({"expert": {"warm_start": "trunk"}})


def test_weights_of_another_network_are_refused(warm: Run) -> None:
    folder = warm.shard("0")
    tensors = {
        name: array[:1] if name == "proj_out.bias" else array
        for name, array in store.map_tensors(folder / INIT).items()
    }
    store.write_tensors(folder / INIT, tensors)
    card = store.read_card(folder) or {}
    store.write_card(folder, "shard", warm.id, list(card["files"]), cluster=0, init=card["init"])
    with pytest.raises(DamagedError, match=r"proj_out.bias is \(1,\), expected \(6,\)"):
        train(warm, "0", threads=1)
    with (folder / INIT).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    with pytest.raises(DamagedError, match=r"init.safetensors"):
        train(warm, "0", threads=1)


def test_a_run_without_one_has_no_such_job(small_run: Run) -> None:
    with pytest.raises(ArchipelError, match="'trunk' is not a job of this run: it has 0, 1, monolith, router"):
        train(small_run, TRUNK)


def test_its_flops_are_counted_once_on_either_side(warm: Run) -> None:
    for name in ("0", "1", MONOLITH):
        train(warm, name, threads=1)
    own = {name: (store.read_card(warm.expert(name)) or {})["flops"] for name in ("0", "1", MONOLITH)}
    trunk = (store.read_card(warm.expert(TRUNK)) or {})["flops"]
    found = budget.write_ledger(warm)
    assert found["trunk"]["flops"] == trunk and found["experts"] == {"0": own["0"], "1": own["1"]}
    assert found["training"]["archipelago"]["flops"] == own["0"] + own["1"] + trunk
    assert found["training"]["monolith"]["flops"] == own[MONOLITH] + trunk
    card = {"run": warm.id, **(store.read_card(warm.expert("0")) or {})}
    del card["warm_start"]
    store.write_sealed(warm.expert("router") / "card.json", card | {"flops": 0})  # a router that cost nothing
    ratio = (own["0"] + own["1"] + trunk) / (own[MONOLITH] + trunk)
    assert budget.write_ledger(warm)["ratio"] == pytest.approx(ratio)
    planned = warm.config.compute
    assert planned.monolith_flops == own[MONOLITH] + trunk
    assert planned.archipelago_flops > own["0"] + own["1"] + trunk  # and the router
    cold = budget.resolve(config.build(config.merge(warm.config.model_dump(), {"expert": {"warm_start": ""}})))
    assert cold.monolith.steps == warm.config.monolith.steps and cold.compute.monolith_flops == own[MONOLITH]


def test_the_pipeline_makes_it_before_all_jobs_and_once(
    tmp_path: Path, make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, cuts = make_run(tmp_path / "run", expert=WARM), []

    def partition(one: Run, stop: object = None) -> None:
        """As *partition*: shards without it where it is not trained, else shards that carry it."""
        cuts.append(one.done(one.expert(TRUNK)))
        if cuts[-1]:
            carry(one, *one.expert_names, MONOLITH)

    monkeypatch.setattr(pipeline, "partition", partition)
    pipeline.train_trunk(run, threads=1)
    assert cuts == [False, True] and run.done(run.expert(TRUNK))
    pipeline.train_trunk(run, threads=1)
    assert len(cuts) == 2
    first = pipeline.status(run)["jobs"][0]
    assert (first["name"], first["state"], first["steps"]) == (TRUNK, "done", 6)
