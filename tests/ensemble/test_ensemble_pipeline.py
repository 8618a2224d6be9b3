"""generate(): same bytes again, clips that do not depend on their batch, only what is needed is loaded, bad input."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from archipel.config import STRATEGIES
from archipel.contracts import Conditioning
from archipel.ensemble.pipeline import MAX_PROMPT, Archipelago, parse_strategy
from archipel.errors import ArchipelError, DamagedError, MissingStageError
from archipel.flow import draws
from archipel.run import Run


class Words:
    """A text encoder that makes up numbers from a caption's letters; five words are all it takes."""

    name, tokens, width, pooled_width = "words", 5, 384, 384

    def truncated(self, captions: Sequence[str]) -> list[int]:
        return [row for row, caption in enumerate(captions) if len(caption.split()) > self.tokens]

    def encode(self, captions: Sequence[str]) -> Conditioning:
        rows = [[draws.normals(sum(map(ord, word)), [0], (384,))[0] for word in c.split()[:5]] for c in captions]
        tokens = torch.zeros(len(captions), 5, 384)
        mask = torch.zeros(len(captions), 5, dtype=torch.bool)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.from_numpy(np.stack(row))
            mask[i, : len(row)] = True
        return Conditioning(tokens, mask, tokens.sum(1) / mask.sum(1, keepdim=True))


@pytest.fixture
def model(small_run: Run) -> Archipelago:
    loaded = Archipelago.load(small_run.root)
    loaded.parts.text = Words()
    return loaded


PROMPTS = ["a red ball", "two green cats", "one blue square turns", "rain"]


@pytest.mark.parametrize("strategy", [*STRATEGIES, "top3", "uniform", "random", "expert-1"])
def test_every_strategy_generates_and_repeats_to_the_byte(model: Archipelago, strategy: str) -> None:
    clusters = [0, 1, 2, 0] if strategy == "oracle" else None
    made = model.generate(PROMPTS, strategy=strategy, seeds=7, clusters=clusters)
    assert made.clips.shape == (4, 4, 8, 8, 3) and made.clips.dtype == np.uint8 and made.fps == 4.0
    assert made.seeds == [7, 8, 9, 10] and made.warnings == []
    assert len({clip.tobytes() for clip in made.clips}) == 4
    again = model.generate(PROMPTS, strategy=strategy, seeds=[7, 8, 9, 10], clusters=clusters)
    assert np.array_equal(again.clips, made.clips)
    if strategy == "monolith":
        assert made.weights is None
    else:
        assert made.weights is not None and made.weights.shape == (4, 3, 3)
        np.testing.assert_allclose(made.weights.sum(-1), 1, atol=1e-5)
        kept = (made.weights > 0).sum(-1)
        wanted = {"top2": 2, "full": 3, "top3": 3, "uniform": 3}.get(strategy, 1)
        assert (kept == wanted).all() or strategy == "threshold"
    if strategy == "oracle":
        assert made.weights[:, 0].argmax(1).tolist() == [0, 1, 2, 0]  # type: ignore[index]
    cost = {"top2": 2, "full": 3, "top3": 3, "uniform": 3}.get(strategy, 1)
    assert strategy == "threshold" or made.expert_rows == 4 * 3 * 2 * cost  # clips, steps, branches


def test_a_clip_does_not_depend_on_its_batch_mates(model: Archipelago) -> None:
    for strategy in ("top1", "ancestral", "monolith"):
        together = model.generate(PROMPTS, strategy=strategy, seeds=3).clips.astype(int)
        apart = model.generate(PROMPTS, strategy=strategy, seeds=3, batch=1).clips.astype(int)
        alone = model.generate(PROMPTS[2], strategy=strategy, seeds=5).clips.astype(int)
        assert np.abs(together - apart).max() <= 1 and np.abs(together[2] - alone[0]).max() <= 1
        assert np.abs(together[2] - model.generate(PROMPTS[2], strategy=strategy, seeds=6).clips[0]).max() > 5


def test_the_prompt_and_the_guidance_matter(model: Archipelago) -> None:
    def clip(prompt: str, **settings: Any) -> np.ndarray:
        return model.generate(prompt, strategy="monolith", **settings).clips[0].astype(int)

    assert np.abs(clip("a red ball") - clip("two green cats")).max() > 0
    assert np.abs(clip("a red ball") - clip("a red ball", guidance=8.0)).max() > 0
    assert np.array_equal(clip("a red ball", guidance=0.0), clip("two green cats", guidance=0.0)), "0 is unconditional"


def test_compositions_give_the_same_clips_where_one_expert_speaks(model: Archipelago) -> None:
    for strategy in ("top1", "ancestral"):
        one, two = (
            model.generate(PROMPTS, strategy=strategy, guidance=6.0, composition=kind).clips.astype(int)
            for kind in ("mixture-of-guided", "guided-mixture")
        )
        assert np.abs(one - two).max() <= 1


def test_defaults_come_from_run_toml(model: Archipelago) -> None:
    made = model.generate("a red ball")
    assert vars(made.settings) == {
        "strategy": "top1",
        "steps": 3,
        "guidance": 2.0,
        "solver": "euler",
        "shift": 1.0,
        "composition": "mixture-of-guided",
        "threshold": 0.1,
        "router_every": 1,
        "router_until": None,
    }
    seen: list[int] = []
    model.generate("a red ball", steps=5, solver="heun", on_step=lambda i, n, x, t: seen.append(n))
    assert seen == [5] * 5


def test_only_what_a_strategy_needs_is_read(small_run: Run) -> None:
    for name in ("1", "2", "router"):
        shutil.rmtree(small_run.expert(name))
    model = Archipelago.load(small_run.root)
    model.parts.text = Words()
    for strategy, clusters in (("monolith", None), ("expert-0", None), ("oracle", [0])):
        assert len(model.generate("a red ball", strategy=strategy, clusters=clusters).clips) == 1
    shutil.rmtree(small_run.expert("0"))
    with pytest.raises(MissingStageError, match=r"0, 1, 2, router: run `archipel train .* 0`; .*`archipel route"):
        model.generate("a red ball", strategy="top1")
    with pytest.raises(MissingStageError, match=r"archipel train .* 2"):
        model.generate("a red ball", strategy="oracle", clusters=[2])


def test_an_uncalibrated_router_and_damaged_weights_are_named(model: Archipelago, small_run: Run) -> None:
    (small_run.expert("router") / "calibration.json").unlink()
    with pytest.raises(MissingStageError, match="archipel route"):
        model.generate("a red ball", strategy="full")
    weights = small_run.expert("monolith") / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(DamagedError, match=r"model\.safetensors"):
        model.generate("a red ball", strategy="monolith")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompts": ""}, "the prompt is empty"),
        ({"prompts": ["a cat", " \n\t"]}, "prompt 2 is empty"),
        ({"prompts": []}, "no prompt"),
        ({"prompts": "x" * 10_000}, f"10000 characters, at most {MAX_PROMPT}"),
        ({"prompts": "a \ud800 cat"}, "not text"),
        ({"steps": 0}, "steps = 0"),
        ({"steps": -4}, "steps = -4"),
        ({"steps": 10**6}, "steps = 1000000"),
        ({"guidance": -1.0}, "guidance = -1.0"),
        ({"guidance": float("nan")}, "guidance = nan"),
        ({"guidance": float("inf")}, "guidance = inf"),
        ({"strategy": "top-1"}, "nearest is 'top1'"),
        ({"strategy": "ancestor"}, "nearest is 'ancestral'"),
        ({"strategy": "top4"}, "top1 to top3"),
        ({"strategy": "top0"}, "top1 to top3"),
        ({"strategy": "expert-3"}, "experts 0 to 2"),
        ({"strategy": "oracle"}, "clusters="),
        ({"strategy": "oracle", "clusters": [0, 1]}, "2 clusters were given for 1"),
        ({"strategy": "oracle", "clusters": [7]}, "no expert 7"),
        ({"clusters": [0]}, "clusters are for strategy = 'oracle'"),
        ({"seeds": -1}, "seed = -1"),
        ({"seeds": [1, 2]}, "2 seeds were given for 1"),
        ({"solver": "rk4"}, "euler or heun"),
        ({"shift": 0.0}, "shift = 0.0"),
        ({"composition": "both"}, "guided-mixture"),
        ({"threshold": 1.5}, "threshold = 1.5"),
        ({"batch": 0}, "batch = 0"),
    ],
)
def test_bad_input_is_answered_in_one_sentence(model: Archipelago, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ArchipelError, match=said):
        model.generate(**{"prompts": "a red ball", **settings})


def test_a_prompt_that_is_cut_is_reported_with_how_much_was_used(
    model: Archipelago, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "archipel"):
        made = model.generate(["rain", "one two three four five six seven"], strategy="monolith")
    (warning,) = made.warnings
    assert "prompt 2 of 2" in warning and "first 5 tokens" in warning and warning in caplog.text
    same = model.generate(["rain", "one two three four five"], strategy="monolith")
    assert np.array_equal(made.clips[1], same.clips[1])


def test_what_is_not_a_run_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ArchipelError, match="archipel init"):
        Archipelago.load(tmp_path / "nowhere")
    with pytest.raises(ArchipelError, match="archipel init"):
        Archipelago.load(tmp_path)


def test_numbers_that_blow_up_are_not_written_as_a_clip(model: Archipelago, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return x * float("inf")

    monkeypatch.setattr(model.parts, "expert", lambda name: broken)
    with pytest.raises(ArchipelError, match="not finite"):
        model.generate("a red ball", strategy="monolith")


def test_strategy_names() -> None:
    assert parse_strategy("top12", 16) == ("top", 12)
    assert parse_strategy("expert-0", 1) == ("expert", 0)
    assert parse_strategy("full", 3) == ("full", 0)


def test_a_codec_that_is_missing_names_its_stage(small_run: Run, retrain: Callable[..., None]) -> None:
    shutil.rmtree(small_run.codec)
    model = Archipelago.load(small_run.root)
    model.parts.text = Words()
    with pytest.raises(MissingStageError, match="archipel prepare"):
        model.generate("a red ball", strategy="monolith")


def test_a_monolith_that_is_told_the_cluster_draws_it_from_the_caption(build_run: Callable[..., Run]) -> None:
    run = build_run(monolith={"condition": "cluster"})
    model = Archipelago.load(run.root)
    model.parts.text = Words()
    made = model.generate(PROMPTS, strategy="monolith", seeds=7)
    drawn = model.generate(PROMPTS, strategy="ancestral", seeds=7).weights
    assert drawn is not None and made.weights is None
    clusters = drawn[:, 0].argmax(1).tolist()  # the same rule and the same draw
    told = model.generate(PROMPTS, strategy="monolith", seeds=7, clusters=clusters)
    assert np.array_equal(told.clips, made.clips)
    other = model.generate(PROMPTS, strategy="monolith", seeds=7, clusters=[(k + 1) % 3 for k in clusters])
    assert all((a != b).any() for a, b in zip(other.clips, made.clips, strict=True))
    with pytest.raises(ArchipelError, match="2 clusters were given for 4 prompts"):
        model.generate(PROMPTS, strategy="monolith", clusters=[0, 1])
    shutil.rmtree(run.expert("router"))
    late = Archipelago.load(run.root)
    late.parts.text = Words()
    assert np.array_equal(late.generate(PROMPTS, strategy="monolith", seeds=7, clusters=clusters).clips, made.clips)
    with pytest.raises(MissingStageError, match="router"):
        late.generate(PROMPTS, strategy="monolith")


def test_a_plain_monolith_takes_no_clusters(model: Archipelago) -> None:
    with pytest.raises(ArchipelError, match="clusters are for strategy = 'oracle', not for 'monolith'"):
        model.generate(PROMPTS, strategy="monolith", clusters=[0, 1, 2, 0])
