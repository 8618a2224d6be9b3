"""Clips of which an expert is elsewhere: the same clips, fewer requests, and what happens when it goes away."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.remote.conftest import TOKEN, Counted, listening, offered

from archipel import Archipelago
from archipel.ensemble.settings import Settings
from archipel.errors import ArchipelError, MissingStageError
from archipel.run import Run
from archipel.serving.island import App, Bounds, Island

Apart = Callable[..., Run]
PROMPTS = ["a red ball", "a blue square turns", "two people", "rain", "a star"]


def _latents(where: Path, strategy: str, prompts: list[str] = PROMPTS, **more: Any) -> tuple[np.ndarray, Any, Any]:
    archipelago = Archipelago.load(where)
    settings = Settings.of(archipelago.config, strategy=strategy, **more)
    cond, _ = archipelago.encode(prompts)
    latents, trace = archipelago.sample(settings, cond, list(range(len(prompts))))
    return latents.numpy(), trace, archipelago


@pytest.mark.parametrize("strategy", ["full", "top1", "expert-2", "ancestral", "random"])
def test_the_same_clips_as_with_the_expert_here(strategy: str, root: Path, served: Counted, apart: Apart) -> None:
    run = apart(served.url)
    here, told, _ = _latents(root, strategy)
    there, trace, _ = _latents(run.root, strategy)
    assert not trace.lost
    assert np.abs(here - there).max() <= 1e-6 * max(1.0, float(np.abs(here).max()))
    assert np.allclose(told.per_step("euler"), trace.per_step("euler"), atol=1e-5) and told.rows == trace.rows


def test_heun_and_the_other_composition(root: Path, served: Counted, apart: Apart) -> None:
    run, more = apart(served.url), {"solver": "heun", "composition": "guided-mixture"}
    here, there = _latents(root, "top2", **more)[0], _latents(run.root, "top2", **more)[0]
    assert np.abs(here - there).max() <= 1e-6 * max(1.0, float(np.abs(here).max()))


def test_half_the_bytes(root: Path, served: Counted, apart: Apart) -> None:
    run = apart(served.url, fp16=True)
    here, there = _latents(root, "full")[0], _latents(run.root, "full")[0]
    difference = float(np.abs(here - there).max())
    assert 0 < difference <= 0.01 * float(np.abs(here).max())


def test_both_branches_of_a_step_are_one_request(served: Counted, apart: Apart) -> None:
    run, before = apart(served.url), len(served.asked)
    _latents(run.root, "full", PROMPTS[:4], steps=3, guidance=5.0)
    assert served.asked[before:] == ["/v1/velocity"] * 3


def test_a_clip_of_one_island_is_one_request(served: Counted, apart: Apart) -> None:
    run, before = apart(served.url), len(served.asked)
    _, trace, _ = _latents(run.root, "ancestral")
    chosen = (trace.per_step("euler")[:, 0, 2] == 1).sum()
    assert 0 < chosen < len(PROMPTS)  # some clips are drawn for the island, others are made here
    assert served.asked[before:] == ["/v1/latents"]
    before = len(served.asked)
    _latents(run.root, "expert-2", PROMPTS[:1])
    assert served.asked[before:] == ["/v1/latents"]


def test_a_clip_of_more_steps_than_the_island_makes_is_made_step_by_step(served: Counted, apart: Apart) -> None:
    run, before = apart(served.url), len(served.asked)
    _latents(run.root, "expert-2", PROMPTS[:1], steps=21)
    assert served.asked[before:] == ["/v1/velocity"] * 21


def test_an_expert_that_is_here_is_not_asked_elsewhere(
    root: Path, served: Counted, apart: Apart, island: Island
) -> None:
    run, before = apart(served.url), len(served.asked)
    (run.root / "experts" / "2").symlink_to(root / "experts" / "2")
    _latents(run.root, "full")
    assert served.asked[before:] == []


# --- what is not admitted --------------------------------------------------------------------------------------------


def test_without_admission_it_is_not_asked(served: Counted, apart: Apart, root: Path) -> None:
    run, before = apart(served.url), len(served.asked)
    (run.root / "remote" / "2.json").unlink()
    made = Archipelago.load(run.root).generate("a", strategy="full", steps=1)
    assert served.asked[before:] == [] and "archipel admit" in made.warnings[0]
    with pytest.raises(MissingStageError, match="was not admitted"):
        Archipelago.load(run.root).generate("a", strategy="expert-2", steps=1)


def test_an_admission_is_for_one_address(served: Counted, apart: Apart) -> None:
    run = apart(served.url)
    site = run.root / "site.toml"
    site.write_text(site.read_text().replace(served.url, "http://127.0.0.1:9"))
    made = Archipelago.load(run.root).generate("a", strategy="full", steps=1)
    assert f"was admitted at {served.url}, not at http://127.0.0.1:9" in made.warnings[0]


def test_the_token_must_be_there(served: Counted, apart: Apart, monkeypatch: pytest.MonkeyPatch) -> None:
    run = apart(served.url)
    monkeypatch.delenv("ISLAND_TOKEN")
    made = Archipelago.load(run.root).generate("a", strategy="full", steps=1)
    assert "ISLAND_TOKEN" in made.warnings[0]


def test_a_changed_card_must_be_admitted_again(served: Counted, apart: Apart, island: Island) -> None:
    run = apart(served.url)
    path = run.root / "remote" / "2.json"
    old = path.read_text()
    from archipel.remote import known

    admission = known.recorded(path.parent, "2")
    assert admission is not None
    known.record(path.parent, known.Admission(**{**vars(admission), "sha256": "0" * 64}))
    made = Archipelago.load(run.root).generate("a", strategy="full", steps=2)
    assert "admit it again" in made.warnings[-1] and old != path.read_text()
    path.write_text(old.replace("ada", "eve"))
    with pytest.raises(ArchipelError, match="no admission"):
        Archipelago.load(run.root)


# --- what goes away --------------------------------------------------------------------------------------------------


def test_a_killed_island_is_left_out_and_said_so(root: Path, apart: Apart, island: Island, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "archipel.cli",
        "serve",
        str(root),
        "--expert",
        "2",
        "--port",
        "0",
        "--threads",
        "1",
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**_environment(), "OMP_NUM_THREADS": "1"}
    )
    try:
        assert process.stderr is not None
        url = next(found[1] for line in process.stderr if (found := re.search(r"listening on (http://\S+)", line)))
        run = apart(url)
        archipelago = Archipelago.load(run.root)

        def on_step(i: int, n: int, x: Any, t: float) -> None:
            if i == 3:
                process.kill()
                process.wait()

        made = archipelago.generate(PROMPTS, strategy="full", steps=8, batch=3, on_step=on_step)
    finally:
        process.kill()
        process.wait()
    weights = made.weights
    assert weights is not None and (weights[:3, :3, 2] > 0).all() and (weights[:3, 3:, 2] == 0).all()
    assert np.allclose(weights.sum(2), 1, atol=1e-5) and (weights[3:, :, 2] == 0).all()
    told = [line for line in made.warnings if "expert 2 was lost at step 4 of 8" in line]
    assert len(told) == 1 and sum("was lost" in line for line in made.warnings) == 1
    assert [note.get("without") for note in made.notes] == [{"2": 4}] * 3 + [None] * 2
    again = archipelago.generate("a", strategy="full", steps=1)  # left out for a while, without a question
    assert "was lost" in again.warnings[0] and "asked again in" in again.warnings[0]
    with pytest.raises(ArchipelError, match="was lost"):
        archipelago.generate("a", strategy="expert-2", steps=1)


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "ARCHIPEL_EXPERT_TOKEN": TOKEN}


class Failing:
    """An island that answers some requests and then is out of order."""

    def __init__(self, app: Any, good: int) -> None:
        self.app, self.left = app, good

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.left -= 1
        if self.left >= 0:
            await self.app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"out of order"})


@pytest.mark.parametrize("strategy", ["top1", "ancestral", "random", "uniform"])
def test_every_strategy_goes_on_with_the_others(strategy: str, island: Island, apart: Apart) -> None:
    with listening(
        Failing(App(island, [TOKEN], Bounds(rows=4)), 0 if strategy in ("ancestral", "random") else 1)
    ) as url:
        latents, trace, _ = _latents(apart(url).root, strategy, steps=4)
    assert np.isfinite(latents).all() and "out of order" in trace.lost[2][1]
    weights = trace.per_step("euler")
    assert np.allclose(weights.sum(2), 1, atol=1e-5) and (weights[:, -1, 2] == 0).all()


def test_where_no_other_expert_is_left_it_is_an_error(island: Island, apart: Apart, served: Counted) -> None:
    import shutil

    with listening(Failing(App(island, [TOKEN], Bounds(rows=4)), 2)) as url:
        run = apart(url)
        for name in ("0", "1"):
            shutil.rmtree(run.expert(name))
        with pytest.raises(ArchipelError, match="no other expert can make these clips"):
            Archipelago.load(run.root).generate("a", strategy="full", steps=4)
    offered(run, island, served.url)
    assert Archipelago.load(run.root).generate("a", strategy="full", steps=2).weights.shape == (1, 2, 3)  # type: ignore[union-attr]


def test_two_clips_at_once_have_connections_of_their_own(served: Counted, apart: Apart) -> None:
    archipelago = Archipelago.load(apart(served.url).root)
    made: dict[int, Any] = {}

    def make(seed: int) -> None:
        made[seed] = archipelago.generate("a", strategy="full", steps=3, seed=seed).clips

    threads = [threading.Thread(target=make, args=(seed,)) for seed in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(
        np.array_equal(made[seed], archipelago.generate("a", strategy="full", steps=3, seed=seed).clips)
        for seed in made
    )
