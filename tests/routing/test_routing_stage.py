"""train_router and route on a small run: files, staleness, determinism, what is said when something is missing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from archipel import config as configuration
from archipel import pipeline, store
from archipel.contracts import Conditioning
from archipel.errors import DamagedError, MissingStageError, Stopped
from archipel.manifest import Clip, write_manifest
from archipel.progress import StopFlag
from archipel.routing.stage import load_router, route, train_router
from archipel.run import MONOLITH, ROUTER, Run

SETTINGS: dict[str, Any] = {
    "clips": {"size": 8, "frames": 2},
    "codec": {"patch": [2, 4, 4], "channels": 6},
    "text": {"tokens": 4},
    "partition": {"k": 2},
    "router": {
        "width": 12,
        "heads": 1,
        "rope_axes": [4, 4, 4],
        "blocks": 1,
        "steps": 40,
        "batch": 16,
        "lr": 1e-2,
        "warmup": 4,
        "validate_every": 10,
        "checkpoint_every": 20,
    },
    "evaluate": {"frames": 2},
}


def make_run(root: Path, validation: int = 16, **router: Any) -> Run:
    """Two clusters that latents tell apart (and captions, where the router reads them only), in ``shards/all`` and the
    manifest; nothing else."""
    run = Run.create(root, configuration.build(configuration.merge(SETTINGS, {"router": router})))
    generator = np.random.default_rng(0)
    count = 48 + validation
    cluster = np.arange(count) % 3 // 2  # shares 2/3 and 1/3
    splits = ["train"] * 48 + ["validation"] * validation
    clips = [
        Clip(f"{i:016x}", f"{i:064x}", f"{i}.mp4", f"clip {i}", f"g{i // 3}", splits[i], 0.0)  # type: ignore[arg-type]
        for i in range(count)
    ]
    write_manifest(run.manifest, clips)
    store.write_card(run.clips, "clips", run.id, ["manifest.parquet"])
    pooled = generator.normal(size=(count, 384)) * 0.1
    if router.get("reads") == "text":
        pooled[:, :192] += 2.0 * cluster[:, None] - 1.0
    arrays = {
        "latents": (generator.normal(size=(count, 6, 1, 2, 2)) * 0.5 + 2.0 * cluster[:, None, None, None, None] - 1.0),
        "tokens": np.zeros((count, 4, 384)),
        "pooled": pooled,
    }
    folder = run.shard(MONOLITH)
    for split, rows in (("train", np.arange(48)), ("validation", np.arange(48, count))):
        tensors = {name: values[rows].astype(np.float32) for name, values in arrays.items()}
        tensors |= {"mask": np.ones((len(rows), 4), bool), "cluster": cluster[rows].astype(np.int64), "row": rows}
        store.write_tensors(folder / f"{split}.safetensors", tensors)
    files = ["train.safetensors", "validation.safetensors"]
    store.write_card(folder, "shard", run.id, files, cluster=None, clusters=2, prior=[2 / 3, 1 / 3])
    return run


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = make_run(tmp_path_factory.mktemp("routing") / "run")
    route(run, threads=1)
    return run


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Run], Run]:
    def copy(run: Run) -> Run:
        shutil.copytree(run.root, tmp_path / "copy")
        return Run.open(tmp_path / "copy")

    return copy


def test_the_router_has_an_experts_shape_and_its_measures(routed: Run) -> None:
    folder = routed.expert("router")
    card = store.read_card(folder, "expert")
    assert card is not None
    assert card["name"] == "router"
    assert card["cluster"] is None
    assert card["best"]["step"] in range(10, 41, 10)
    assert store.check_card(folder) == []
    numbers = store.read_json(folder / "quality.json")
    assert numbers["n"] == 16
    for branch in ("with_text", "without_text"):
        assert numbers[branch]["cross_entropy"] < numbers["prior"]["cross_entropy"]
        assert len(numbers[branch]["bins"]) == 8
        assert set(numbers[branch]["bins"][0]) >= {"t", "cross_entropy", "accuracy", "ece", "uncalibrated"}
    assert numbers["with_text"]["bins"][0]["accuracy"] > 0.9  # nearly clean clips are told apart
    assert np.shape(numbers["confusion"]["with_text"]) == (2, 2)
    fitted = store.read_json(folder / "calibration.json")
    assert fitted["run"] == routed.id
    assert fitted["model_sha256"] == card["sha256"]
    assert fitted["prior"] == [2 / 3, 1 / 3]
    assert "accuracy" in routed.log("route").read_text()


def test_loaded_it_is_a_posterior(routed: Run) -> None:
    router = load_router(routed)
    x = torch.randn(3, 6, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    cond = Conditioning(torch.zeros(3, 4, 384), torch.ones(3, 4, dtype=torch.bool), torch.zeros(3, 384))
    p = router(x, torch.tensor([0.1, 0.5, 1.0]), cond)
    assert p.shape == (3, 2)
    torch.testing.assert_close(p.sum(1), torch.ones(3))
    far = router(torch.stack([x[0] * 0 + 1, x[0] * 0 - 1]), torch.full((2,), 0.05), cond[:2])
    assert far[0, 1] > 0.9
    assert far[1, 0] > 0.9


def _asked(seed: int) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    g = torch.Generator().manual_seed(seed)
    pooled = torch.randn(4, 384, generator=g)
    mask = torch.tensor([[True] * 4, [True] * 4, [True, False, False, False], [False] * 4])
    return (
        torch.randn(4, 6, 1, 2, 2, generator=g),
        torch.rand(4, generator=g),
        Conditioning(torch.zeros(4, 4, 384), mask, pooled),
    )


def test_a_router_of_captions_only_answers_alike_whatever_the_clip(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", reads="text")
    route(run, threads=1)
    router = load_router(run)
    card = store.read_card(run.expert("router"))
    assert card is not None and card["network"]["reads"] == "text" and store.check_card(run.expert("router")) == []
    (x, t, cond), (other, later, _) = _asked(0), _asked(1)
    assert torch.equal(router(x, t, cond), router(other * 100, later, cond))
    assert not torch.allclose(router(x, t, cond), router(x, t, _asked(1)[2]), atol=1e-3)
    numbers = store.read_json(run.expert("router") / "quality.json")
    assert numbers["with_text"]["accuracy"] > 0.9 > numbers["without_text"]["accuracy"]
    assert len({one["accuracy"] for one in numbers["with_text"]["bins"]}) == 1  # noise does not matter to it


def test_a_router_of_latents_only_answers_alike_whatever_the_caption(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", reads="latent")
    route(run, threads=1)
    router = load_router(run)
    (x, t, cond), (other, _, said) = _asked(0), _asked(1)
    assert torch.equal(router(x, t, cond), router(x, t, said))
    assert torch.equal(router(x, t, cond), router(x, t, cond.null()))
    assert not torch.allclose(router(x, t, cond), router(other, t, cond), atol=1e-3)
    numbers = store.read_json(run.expert("router") / "quality.json")
    assert numbers["with_text"] == numbers["without_text"]
    assert numbers["with_text"]["bins"][0]["accuracy"] > 0.9


def test_a_router_that_reads_something_else_is_refused(routed: Run, copy_of: Callable[[Run], Run]) -> None:
    run = copy_of(routed)
    part = run.config.router.model_copy(update={"reads": "text"})
    other = Run(run.root, run.config.model_copy(update={"router": part}), run.id)
    with pytest.raises(DamagedError, match=r"reads both, run.toml has router.reads = 'text'"):
        load_router(other)


def test_again_changes_nothing_and_another_run_of_the_same_gives_the_same(routed: Run, tmp_path: Path) -> None:
    names = ("model.safetensors", "calibration.json", "quality.json")
    folder = routed.expert("router")
    before = {name: (folder / name).stat().st_mtime_ns for name in names}
    route(routed, threads=1)
    assert before == {name: (folder / name).stat().st_mtime_ns for name in names}
    other = make_run(tmp_path / "other")
    train_router(other, threads=1)
    route(other, threads=1)
    for name in names:
        assert (other.expert("router") / name).read_bytes() == (folder / name).read_bytes()


def test_a_calibration_of_other_weights_is_noticed_and_made_again(routed: Run, copy_of: Callable[[Run], Run]) -> None:
    run = copy_of(routed)
    folder = run.expert("router")
    card = store.read_json(folder / "card.json")
    whole = (folder / "calibration.json").read_bytes()
    stale = store.read_json(folder / "calibration.json")
    stale["model_sha256"] = "0" * 64
    store.write_json(folder / "calibration.json", stale)
    with pytest.raises(MissingStageError, match="is not calibrated: run `archipel route"):
        load_router(run)
    route(run, threads=1)
    assert (folder / "calibration.json").read_bytes() == whole
    assert store.read_json(folder / "card.json") == card


def test_a_damaged_calibration_is_named_and_made_again(routed: Run, copy_of: Callable[[Run], Run]) -> None:
    run = copy_of(routed)
    path = run.expert("router") / "calibration.json"
    whole = path.read_bytes()
    value = json.loads(whole)
    value["temperature"][0] *= 1.5
    store.write_json(path, value)
    with pytest.raises(DamagedError, match=r"calibration\.json is damaged"):
        load_router(run)
    path.write_text("{")
    with pytest.raises(DamagedError, match=r"calibration\.json is not readable"):
        load_router(run)
    route(run, threads=1)
    assert path.read_bytes() == whole


def test_route_computes_as_site_toml_says(
    routed: Run, copy_of: Callable[[Run], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, given = copy_of(routed), []
    shutil.rmtree(run.expert(ROUTER))
    (run.root / "site.toml").write_text("[train]\nmicro_batch = 7\n")

    def train(run: Run, **settings: Any) -> None:
        given.append(settings["local"])
        raise Stopped("here")

    monkeypatch.setattr("archipel.routing.stage.train_router", train)
    with pytest.raises(Stopped):
        pipeline.route(run)
    assert given[0].micro_batch == 7


def test_says_which_stage_is_missing(routed: Run, copy_of: Callable[[Run], Run]) -> None:
    run = copy_of(routed)
    (run.expert("router") / "calibration.json").unlink()
    with pytest.raises(MissingStageError, match="archipel route"):
        load_router(run)
    (run.expert("router") / "card.json").unlink()
    with pytest.raises(MissingStageError, match="archipel route"):
        load_router(run)
    (run.shard(MONOLITH) / "card.json").unlink()
    with pytest.raises(MissingStageError, match="archipel partition"):
        route(run)


def test_without_validation_clips_temperature_is_one_and_it_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "bare", validation=0)
    route(run, threads=1)
    assert set(store.read_json(run.expert("router") / "calibration.json")["temperature"]) == {1.0}
    assert "no validation clip" in store.read_json(run.expert("router") / "quality.json")["note"]
    assert load_router(run).experts == 2


def test_a_stop_before_calibration_keeps_the_training(tmp_path: Path) -> None:
    run = make_run(tmp_path / "stopped")
    train_router(run, threads=1)
    stop = StopFlag()
    stop.signal = 2
    with pytest.raises(Stopped):
        route(run, threads=1, stop=stop)
    assert run.done(run.expert("router"))
    assert not (run.expert("router") / "calibration.json").exists()
    route(run, threads=1)
    assert load_router(run).experts == 2


def test_temperatures_that_do_harm_are_not_kept() -> None:
    import numpy as np

    from archipel.routing import stage
    from archipel.routing.calibration import Calibration

    fitted = Calibration(np.array([[3.0, 3.0], [0.5, 0.5]]), np.array([0.2, 0.8]), np.array([0.5, 0.5]))
    numbers = {
        "with_text": {
            "cross_entropy": 0.66,
            "ece": 0.2,
            "uncalibrated": {"cross_entropy": 0.53, "ece": 0.1},
            "bins": [],
        },
        "without_text": {"cross_entropy": 0.80, "uncalibrated": {"cross_entropy": 0.95}, "bins": []},
    }
    kept = stage.first_do_no_harm(fitted, numbers)
    np.testing.assert_array_equal(kept.temperatures, [[1.0, 1.0], [0.5, 0.5]])
    assert numbers["with_text"]["cross_entropy"] == 0.53 and numbers["with_text"]["ece"] == 0.1
    assert numbers["without_text"]["cross_entropy"] == 0.80
    assert (numbers["with_text"]["calibrated"], numbers["without_text"]["calibrated"]) == (False, True)
