"""A bound on memory: held at every moment, the same clips, least recently used out, nothing mixed of two versions."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.ensemble.test_ensemble_pipeline import Words
from torch import nn

from archipel.backbones import base
from archipel.backbones.base import Denoiser
from archipel.ensemble.pipeline import Archipelago
from archipel.ensemble.shelf import Shelf, bytes_of
from archipel.errors import ArchipelError
from archipel.run import Run

PROMPTS = ["a red ball", "two green cats", "one blue square turns", "rain"]


def held() -> int:
    """Bytes of the storages of all weights of networks that are alive."""
    modules = [one for one in gc.get_objects() if isinstance(one, nn.Module)]
    tensors = [p for one in modules for p in one.parameters(recurse=False) if p.device.type == "cpu"]
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in tensors}.values())


def sizes(run: Run) -> dict[str, int]:
    return {name: (run.expert(name) / "model.safetensors").stat().st_size for name in run.job_names}


def bound(run: Run) -> int:
    """Room for the router and two experts of the run."""
    found = sizes(run)
    return found["router"] + 2 * max(found[name] for name in run.expert_names) + 5000


def load(run: Run, **more: Any) -> Archipelago:
    model = Archipelago.load(run.root, **more)
    model.parts.text = Words()  # type: ignore[misc]
    return model


@pytest.mark.parametrize("strategy", ["full", "top1", "uniform"])
def test_the_bound_holds_at_every_call_and_the_clips_are_the_same(
    small_run: Run, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = load(small_run).generate(PROMPTS, strategy=strategy, seed=7)
    gc.collect()
    before, seen = held(), []
    called = Denoiser.velocity
    read = base.read_folder

    def velocity(self: Denoiser, *inputs: Any) -> torch.Tensor:
        seen.append(held() - before)
        return called(self, *inputs)

    def read_folder(*about: Any) -> Any:
        seen.append(held() - before + sizes(small_run)["0"])  # what is about to be read has its place already
        return read(*about)

    monkeypatch.setattr(Denoiser, "velocity", velocity)
    monkeypatch.setattr(Denoiser, "forward", velocity)
    monkeypatch.setattr(base, "read_folder", read_folder)
    most = bound(small_run)
    model = load(small_run, memory=most)
    made = model.generate(PROMPTS, strategy=strategy, seed=7)
    assert np.array_equal(made.clips, wanted.clips)
    assert 0 < max(seen) <= most, (max(seen), most)
    shelf = model.parts.shelf
    assert shelf.used <= most and shelf.used < sum(sizes(small_run).values()) - sizes(small_run)["monolith"]
    if strategy == "full":  # 3 steps, 3 experts, 2 places: those that are there go first, one is fetched per step
        assert sum(count for key, count in shelf.fetched.items() if key[0] != "router") == 3 + 1 + 1  # type: ignore[index]


def test_the_bound_holds_where_experts_are_adapters_on_one_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.exchange.makers import adapted_run

    run = adapted_run(tmp_path / "run")
    whole = load(run).generate(PROMPTS, strategy="full", seed=7)
    gc.collect()
    before, seen, called = held(), [], Denoiser.velocity

    def velocity(self: Denoiser, *inputs: Any) -> torch.Tensor:
        seen.append(held() - before)
        return called(self, *inputs)

    monkeypatch.setattr(Denoiser, "velocity", velocity)
    base, adapter = (folder.joinpath("model.safetensors").stat().st_size for folder in (run.base, run.expert("0")))
    most = sizes(run)["router"] + base + 2 * adapter + 2000  # one adapter at a time, and what is read of another
    model = load(run, memory=most)
    made = model.generate(PROMPTS, strategy="full", seed=7)
    np.testing.assert_allclose(made.clips.astype(int), whole.clips.astype(int), atol=1)
    assert 0 < max(seen) <= most and len(seen) == 9
    assert model.parts.shelf.fetched["base", ""] == 1


def test_too_little_memory_says_how_much_is_needed(small_run: Run) -> None:
    found = sizes(small_run)
    with pytest.raises(ArchipelError, match=r"too little: the router needs \d+; give at least"):
        load(small_run, memory=100).generate(PROMPTS, strategy="full")
    with pytest.raises(ArchipelError, match=r"too little: expert \d needs \d+ beside the \d+ that always stay"):
        load(small_run, memory=found["router"] + found["0"] // 2).generate(PROMPTS, strategy="full")
    with pytest.raises(ArchipelError, match="memory = 0"):
        load(small_run, memory=0)


def test_a_clip_is_never_made_of_two_versions(small_run: Run, retrain: Callable[[Run, str, int], None]) -> None:
    found = sizes(small_run)
    model = load(small_run, memory=found["router"] + found["0"] + 5000)

    def replace(i: int, *_: Any) -> None:
        if i == 1:
            for name in small_run.expert_names:
                retrain(small_run, name, 50 + int(name))

    with pytest.raises(ArchipelError, match="was replaced while a clip was on its way"):
        model.generate(PROMPTS, strategy="full", on_step=replace)
    assert len(model.generate(PROMPTS, strategy="full").clips) == 4  # with the new ones


def test_what_was_used_longest_ago_makes_room() -> None:
    shelf = Shelf(bound=30)

    def get(name: str, size: int = 10, **more: Any) -> Any:
        return shelf.get((name, ""), lambda: object(), lambda: size, **more)

    first = [get("a"), get("b"), get("c")]
    assert get("a") is first[0] and shelf.used == 30
    get("d")  # b is the oldest now
    assert ("b", "") not in shelf and ("a", "") in shelf and ("c", "") in shelf
    get("router", 20, pinned=True)
    assert ("router", "") in shelf and ("d", "") in shelf and shelf.used == 30
    get("e"), get("f")
    assert ("router", "") in shelf and shelf.used == 30
    with pytest.raises(ArchipelError, match="11 beside the 20"):
        get("g", 11)


class Moved(nn.Linear):
    """A network that says where it was sent."""

    def __init__(self) -> None:
        super().__init__(5, 5, bias=False)
        self.places: list[str] = []

    def to(self, *where: Any, **more: Any) -> Moved:
        self.places.append(str(where[0]))
        return self


def test_what_leaves_a_gpu_waits_on_the_host_while_there_is_room() -> None:
    shelf = Shelf(bound=100, host=200, device="cuda")
    made = {name: Moved() for name in "abcd"}
    assert bytes_of(made["a"]) == 100

    def get(name: str) -> Moved:
        found: Moved = shelf.get((name, ""), lambda: made[name], lambda: 100)
        return found

    for name in "abca":
        get(name)
    assert made["a"].places == ["cpu", "cuda"] and shelf.used == 100 and shelf.used_on_host == 200
    assert shelf.fetched == {("a", ""): 1, ("b", ""): 1, ("c", ""): 1}
    get("d")  # b was the first to come to the host: it is read from disk again
    get("b")
    assert shelf.fetched["b", ""] == 2 and shelf.used_on_host <= 200


def test_an_export_takes_no_bound(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ArchipelError, match="is an export, which is loaded whole"):
        Archipelago.load(tmp_path, memory=10)
