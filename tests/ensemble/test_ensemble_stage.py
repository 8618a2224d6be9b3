"""generate_arms: same captions and noise for every arm, what is kept after a stop, what is made again."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from archipel import cache, store
from archipel.config import STRATEGIES
from archipel.ensemble import stage
from archipel.ensemble.pipeline import Archipelago
from archipel.ensemble.stage import choose_rows, generate_arms
from archipel.errors import ArchipelError, MissingStageError, Stopped
from archipel.flow import draws
from archipel.manifest import Clip, read_manifest
from archipel.progress import StopFlag
from archipel.run import Run


def read(run: Run, arm: str) -> dict[str, np.ndarray]:
    return {name: np.array(a) for name, a in store.map_tensors(run.samples("test") / f"{arm}.safetensors").items()}


@pytest.fixture(scope="module")
def finished(_whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose samples were made without a stop; to be read only."""
    run = Run.open(shutil.copytree(_whole, tmp_path_factory.mktemp("finished") / "run"))
    generate_arms(run)
    return run


class StopAfter(StopFlag):
    """Asks to stop once it was looked at so often."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def __bool__(self) -> bool:
        self.looks -= 1
        return self.looks < 0


def test_all_arms_share_captions_and_noise_and_stand_beside_the_real_clips(finished: Run) -> None:
    folder = finished.samples("test")
    prompts = json.loads((folder / "prompts.json").read_text())
    clips = read_manifest(finished.manifest)
    assert len(prompts) == 20
    for prompt in prompts:
        clip = clips[prompt["row"]]
        assert clip.split == "test"
        assert (prompt["caption"], prompt["id"], prompt["group"]) == (clip.caption, clip.id, clip.group)
        assert prompt["cluster"] == prompt["row"] % 12 % 3
    rows = [prompt["row"] for prompt in prompts]
    pixels = cache.open_kind(finished.cache, "pixels")["clips"][np.array(rows)]
    assert np.array_equal(read(finished, "real")["clips"], pixels)
    assert np.abs(read(finished, "codec")["clips"].astype(int) - pixels).max() <= 1, "pixels lose nothing"
    seeds = [prompt["seed"] for prompt in prompts]
    assert len(set(seeds)) == 20
    for arm in STRATEGIES:
        found = read(finished, arm)
        assert found["clips"].shape == (20, 4, 8, 8, 3) and found["clips"].dtype == np.uint8
        assert found["seeds"].tolist() == seeds and found["rows"].tolist() == rows
        assert ("weights" in found) == (arm != "monolith")
        if arm != "monolith":
            assert found["weights"].shape == (20, 3, 3) and found["weights"].dtype == np.float32
    assert read(finished, "oracle")["weights"][:, 0].argmax(1).tolist() == [p["cluster"] for p in prompts]
    repeated = next(i for i in range(20) if rows[i] in rows[:i])
    first = rows.index(rows[repeated])
    monolith = read(finished, "monolith")["clips"].astype(int)
    assert np.abs(monolith[first] - monolith[repeated]).max() > 5, "the same caption again has new noise"
    card = store.read_card(folder, "samples")
    assert card is not None and card["protocol"]["unique"] == len(set(rows)) and card["protocol"]["steps"] == 3
    assert store.check_card(folder) == [] and not (folder / ".parts").exists()
    assert json.loads((folder / "top2.json").read_text())["expert_rows_per_clip"] == 3 * 2 * 2


def test_a_clip_of_an_arm_is_the_clip_of_its_seed(finished: Run) -> None:
    """Captions are read from the cache; with the same conditioning and seed `sample` gives the same clip."""
    plan = stage.plans(finished)[0]
    model = Archipelago.load(finished.root)
    settings = stage.Settings.of(finished.config, strategy="monolith")
    latents, _ = model.sample(settings, plan.cond[3:4], plan.seeds[3:4])
    wanted = read(finished, "monolith")["clips"][3].astype(int)
    assert np.abs(model.decode(latents)[0].astype(int) - wanted).max() <= 1


def test_prompts_take_one_clip_per_group_first_and_repeat_only_when_all_are_used() -> None:
    sizes = {"a": 3, "b": 1, "c": 2}
    clips = [Clip(f"{g}{i}", "", "", "", g, "test", 0.0) for g, n in sizes.items() for i in range(n)]
    clips.insert(2, Clip("t", "", "", "", "z", "train", 0.0))
    rows = choose_rows(clips, "test", 14, seed=1)
    groups = [clips[row].group for row in rows]
    assert sorted(groups[:3]) == ["a", "b", "c"] and sorted(groups[3:5]) == ["a", "c"] and groups[5] == "a"
    assert len(set(rows[:6])) == 6 and rows[6:12] == rows[:6] and rows[12:] == rows[:2]
    assert rows == choose_rows(clips, "test", 14, seed=1) and choose_rows(clips, "test", 2, seed=1) == rows[:2]
    firsts = Counter(choose_rows(clips, "test", 1, seed)[0] for seed in range(40))
    assert len(firsts) > 2, "another seed, another order"
    with pytest.raises(ArchipelError, match=r"evaluate\.split = 'validation'"):
        choose_rows(clips, "validation", 4, seed=1)


def bytes_of(run: Run) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in run.samples("test").iterdir() if p.is_file()}


@pytest.mark.parametrize("looks", [0, 5, 23])
def test_stopped_anywhere_and_started_again_gives_the_same_files(small_run: Run, finished: Run, looks: int) -> None:
    with pytest.raises(Stopped, match="start it again"):
        generate_arms(small_run, StopAfter(looks))
    assert store.read_card(small_run.samples("test")) is None
    generate_arms(small_run)
    assert bytes_of(small_run) == bytes_of(finished)


def count_batches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made: list[str] = []
    before = Archipelago.sample

    def sample(self: Archipelago, settings: Any, *args: Any, **more: Any) -> Any:
        made.append(settings.strategy)
        return before(self, settings, *args, **more)

    monkeypatch.setattr(Archipelago, "sample", sample)
    return made


def test_whole_batches_are_kept_over_a_stop(small_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    made = count_batches(monkeypatch)
    with pytest.raises(Stopped):
        generate_arms(small_run, StopAfter(1 + 2 + 1))  # first batch: one look before, one after each step but the last
    assert made == ["top1", "top1"]
    made.clear()
    generate_arms(small_run)
    assert Counter(made) == {arm: 2 - (arm == "top1") for arm in STRATEGIES}


def test_a_finished_stage_does_nothing_and_a_retrained_expert_only_what_depends_on_it(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, retrain: Callable[[Run, str, int], None]
) -> None:
    small_run = Run.open(shutil.copytree(finished.root, tmp_path / "copy"))
    made = count_batches(monkeypatch)
    before = bytes_of(small_run)
    generate_arms(small_run)
    assert made == [] and bytes_of(small_run) == before
    retrain(small_run, "monolith", 77)
    generate_arms(small_run)
    assert set(made) == {"monolith"}
    after = bytes_of(small_run)
    assert {name for name in before if before[name] != after[name]} == {
        "monolith.safetensors",
        "monolith.json",
        "card.json",
    }
    made.clear()
    retrain(small_run, "1", 78)
    generate_arms(small_run)
    assert set(made) == set(STRATEGIES) - {"monolith"}
    made.clear()
    (small_run.samples("test") / "full.safetensors").unlink()
    generate_arms(small_run)
    assert set(made) == {"full"}


def test_missing_stages_are_named(small_run: Run) -> None:
    (small_run.expert("2") / "card.json").unlink()
    with pytest.raises(MissingStageError, match=r"archipel train .* 2"):
        generate_arms(small_run)
    (small_run.partition / "card.json").unlink()
    with pytest.raises(MissingStageError, match="archipel partition"):
        generate_arms(small_run)
    (small_run.codec / "card.json").unlink()
    with pytest.raises(MissingStageError, match="archipel prepare"):
        generate_arms(small_run)


def test_heun_and_a_validation_protocol_go_to_their_own_folder(build_run: Callable[..., Run]) -> None:
    run = build_run(
        sample={"solver": "heun"},
        evaluate={"split": "validation", "count": 5, "arms": ["full", "monolith"], "showcase": 4},
        run={"seed": 3},
    )
    generate_arms(run)
    folder = run.samples("validation")
    assert store.map_tensors(folder / "full.safetensors")["weights"].shape == (5, 3, 3)
    assert [p["seed"] for p in store.read_json(folder / "prompts.json")] == [3_000_000 + i for i in range(5)]
    assert not (folder / "top1.safetensors").exists()
    shown = run.samples("train")
    manifest = read_manifest(run.manifest)
    assert {manifest[p["row"]].split for p in store.read_json(shown / "prompts.json")} == {"train"}
    assert store.map_tensors(shown / "monolith.safetensors")["clips"].shape[0] == 4
    assert (shown / "top1.safetensors").exists() and not (shown / "full.safetensors").exists()
    noise = draws.clip_noise([3_000_000], (2,))
    assert not np.array_equal(noise, draws.clip_noise([0], (2,)))


def test_runs_that_share_clips_share_captions_and_not_noise(build_run: Callable[..., Run]) -> None:
    first = build_run(run={"seed": 1}, clips={"seed": 4})
    second = Run(
        first.root, first.config.model_copy(update={"run": first.config.run.model_copy(update={"seed": 2})}), ""
    )
    plans = [stage.Plan.of(run, "test", 8, ["top1"]) for run in (first, second)]
    assert plans[0].rows.tolist() == plans[1].rows.tolist() == choose_rows(plans[0].clips, "test", 8, 4)
    assert not set(plans[0].seeds) & set(plans[1].seeds)
