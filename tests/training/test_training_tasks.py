"""Image-to-video training: which frames are given is a draw of its own, and nothing else changes by it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from archipel import store
from archipel.backbones.base import Denoiser
from archipel.contracts import Conditioning
from archipel.errors import DamagedError, MissingStageError
from archipel.flow import given
from archipel.islands import card as cards
from archipel.run import MONOLITH, Run
from archipel.training import heldout
from archipel.training.batches import Clips, Shard, training_batch, validation_batches
from archipel.training.objective import FlowObjective
from archipel.training.stage import train

MIX = (1.0, 5.0, 1.0, 1.0)
N, C, T, H, W = 8, 2, 3, 2, 2
PLAIN = {"shift": 1.0, "text_dropout": 0.3}


def write(path: Path, phases: int = 1, stills: bool = True) -> Path:
    """Latents of window p of clip i are 10 i + p; its stills are 1000 and 2000 more."""
    values = (10 * np.arange(N)[:, None] + np.arange(phases)).astype(np.float32)
    windows = np.ascontiguousarray(np.broadcast_to(values[..., None, None, None, None], (N, phases, C, T, H, W)))
    tensors = {
        "latents": windows[:, 0],
        "tokens": np.ones((N, 4, 3), np.float32),
        "mask": np.ones((N, 4), bool),
        "pooled": np.ones((N, 3), np.float32),
        "cluster": np.arange(N, dtype=np.int64) % 2,
        "row": np.arange(N),
    }
    frames = {"first": windows[:, :, :, 0] + 1000, "last": windows[:, :, :, -1] + 2000}
    for name, frame in frames.items() if stills else ():
        tensors[name] = frame[:, 0]
        if phases > 1:
            tensors[f"phases_{name}"] = frame[:, 1:]
    store.write_tensors(path, tensors | ({"phases": windows[:, 1:]} if phases > 1 else {}))
    return path


def tasks_of(image: Tensor) -> list[int]:
    return [given.task_of(bool(row[-1, 0].all()), bool(row[-1, -1].all())) for row in image]


def test_given_frames_are_those_of_the_clip_and_its_window(tmp_path: Path) -> None:
    clips = Clips(write(tmp_path / "a.safetensors", phases=3))
    seen: list[int] = []
    for step in range(60):
        batch = training_batch(clips, 5, step, N, tasks=MIX, **PLAIN)
        image = batch.cond.image
        assert image is not None and image.shape == (N, C + 1, T, H, W)
        for row, task in enumerate(tasks_of(image)):
            value = float(batch.x0[row, 0, 0, 0, 0])  # 10 clip + window
            assert (image[row, :C, 0] == (value + 1000 if task in (1, 2) else 0)).all()
            assert (image[row, :C, -1] == (value + 2000 if task in (2, 3) else 0)).all()
            assert not image[row, :, 1:-1].any()
            seen.append(task)
    found = np.bincount(seen, minlength=4) / len(seen)
    assert np.abs(found - np.array(MIX) / 8).max() < 0.06


def test_all_else_of_a_batch_is_as_without_tasks(tmp_path: Path) -> None:
    clips = Clips(write(tmp_path / "a.safetensors", phases=2))
    for step in range(3):
        plain = training_batch(clips, 5, step, 2 * N, **PLAIN)
        made = training_batch(clips, 5, step, 2 * N, tasks=MIX, **PLAIN)
        for name in ("x0", "noise", "t", "cluster", "x_t"):
            assert torch.equal(getattr(plain, name), getattr(made, name)), name
        assert torch.equal(plain.cond.mask, made.cond.mask) and torch.equal(plain.cond.pooled, made.cond.pooled)
        assert plain.cond.image is None
        part = training_batch(clips, 5, step, 2 * N, tasks=MIX, part=slice(3, 9), **PLAIN)
        assert part.cond.image is not None and made.cond.image is not None
        assert torch.equal(part.cond.image, made.cond.image[3:9])


def test_given_frames_stay_where_the_text_is_dropped(tmp_path: Path) -> None:
    clips = Clips(write(tmp_path / "a.safetensors"))
    batch = training_batch(clips, 5, 0, 4 * N, shift=1.0, text_dropout=0.5, tasks=given.only("loop"))
    dropped = ~batch.cond.mask.any(1)
    assert 0 < dropped.sum() < len(dropped)
    assert set(tasks_of(batch.cond.image[dropped])) == {2}


def test_pooled_vectors_may_be_dropped_by_a_draw_of_their_own(tmp_path: Path) -> None:
    clips = Clips(write(tmp_path / "a.safetensors"))
    no_tokens, no_pooled = [], []
    for step in range(150):
        batch = training_batch(clips, 5, step, N, shift=1.0, text_dropout=0.3, pooled_dropout=0.5)
        no_tokens.append(~batch.cond.mask.any(1))
        no_pooled.append(~batch.cond.pooled.any(1))
        assert torch.equal(batch.cond.tokens.any(2).any(1), batch.cond.mask.any(1))
        together = training_batch(clips, 5, step, N, shift=1.0, text_dropout=0.3)
        assert torch.equal(batch.cond.mask, together.cond.mask), "the tokens' draw is the one there always was"
        assert torch.equal(batch.noise, together.noise)
    a, b = torch.cat(no_tokens).float(), torch.cat(no_pooled).float()
    assert abs(a.mean() - 0.3) < 0.04 and abs(b.mean() - 0.5) < 0.04
    assert abs((a * b).mean() - 0.15) < 0.03, "independent"
    never = training_batch(clips, 5, 0, 4 * N, shift=1.0, text_dropout=1.0, pooled_dropout=0.0)
    assert not never.cond.mask.any() and never.cond.pooled.any(1).all()


def test_shards_without_stills_and_with_wrong_ones_are_named(tmp_path: Path) -> None:
    clips = Clips(write(tmp_path / "a.safetensors", stills=False))
    assert not clips.stills
    with pytest.raises(MissingStageError, match=r"expert\.tasks .*archipel prepare"):
        training_batch(clips, 5, 0, N, tasks=MIX, **PLAIN)
    tensors = {k: np.array(v) for k, v in store.map_tensors(write(tmp_path / "b.safetensors", phases=2)).items()}
    for name, wrong in (
        ("first", tensors["first"][:, :1]),
        ("last", tensors["last"].astype(np.float64)),
        ("phases_last", tensors["phases_last"][:3]),
    ):
        store.write_tensors(tmp_path / "c.safetensors", tensors | {name: wrong})
        with pytest.raises(DamagedError, match=f"{name} are"):
            Clips(tmp_path / "c.safetensors")
    store.write_tensors(tmp_path / "d.safetensors", {k: v for k, v in tensors.items() if k != "phases_first"})
    with pytest.raises(DamagedError, match="phases_first are missing"):
        Clips(tmp_path / "d.safetensors")


class Copies(Denoiser):
    """Answers with what it is given, so that its loss tells the tasks apart."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1), {"prediction": "x0", "image": True})

    def ends(self) -> list[nn.Module]:
        return []

    def output(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return x[:, C : 2 * C]


def test_validation_reports_every_task_and_their_mean_by_shares(tmp_path: Path) -> None:
    clips = Clips(write(tmp_path / "a.safetensors"))
    objective = FlowObjective(Copies(), Shard(clips, clips), seed=0, batch=4, tasks=MIX)
    found = objective.validate()
    assert set(found) == {"loss", "times", "bins", "tasks"} and set(found["tasks"]) == set(given.TASKS)
    shares = given.shares(MIX)
    assert found["loss"] == pytest.approx(sum(shares[name] * found["tasks"][name] for name in shares), rel=1e-6)
    assert found["loss"] == pytest.approx(sum(found["bins"]) / len(found["bins"]), rel=1e-6)
    text = found["tasks"]["text"]
    assert text == pytest.approx(FlowObjective(Copies(), Shard(clips, clips), seed=0, batch=4).validate()["loss"])
    assert len({round(loss) for loss in found["tasks"].values()}) == 4, "each task was asked with its own frames"
    (batch,) = validation_batches(clips, 0, 0.5, bin_number=1, limit=N, tasks=MIX)
    (again,) = validation_batches(clips, 0, 0.5, bin_number=1, limit=N, tasks=MIX)
    assert torch.equal(batch.cond.image, again.cond.image)


def still_clips(run: Run, count: int) -> None:
    """Shards of clips that stand still on noise of their own, with captions that say nothing: a frame says all."""
    for name in (*run.expert_names, MONOLITH):
        folder = run.shard(name)
        card = store.read_card(folder) or {}
        for split in ("train", "validation"):
            path = folder / f"{split}.safetensors"
            found = {key: np.resize(value, (count, *value.shape[1:])) for key, value in store.map_tensors(path).items()}
            frame = np.random.default_rng([count, len(split)]).normal(size=found["latents"][:, :, 0].shape)
            found["latents"][:] = frame[:, :, None]
            found["tokens"][:], found["pooled"][:], found["row"][:] = 0, 0, np.arange(count)
            store.write_tensors(path, found | {"first": found["latents"][:, :, 0], "last": found["latents"][:, :, -1]})
        store.write_card(folder, "shard", run.id, list(card["files"]), cluster=card["cluster"])


def test_an_expert_learns_to_use_the_frames_it_is_given(tmp_path: Path, make_run: Callable[..., Run]) -> None:
    over = {"tasks": list(MIX), "steps": 120, "validate_every": 120, "checkpoint_every": 120, "lr": 5e-3, "batch": 12}
    run = make_run(tmp_path / "run", expert=over)
    with pytest.raises(MissingStageError, match="archipel prepare"):
        train(run, "0", threads=1)
    still_clips(run, 200)
    train(run, "0", threads=1)
    card = store.read_card(run.expert("0"), "expert") or {}
    assert card["network"]["image"] is True
    tasks = card["validation"]["raw"]["tasks"]
    assert max(tasks["head"], tasks["loop"], tasks["tail"]) < 0.7 * tasks["text"], tasks
    # An owner who admits it reads the same card, and measures the same loss.
    assert cards.parse_card(store.read_json(run.expert("0") / "card.json"), run.config, run.id, "0").validation.ema
    measured = heldout.measure(run.config, run.expert("0"), run.shard("0") / "validation.safetensors", "cpu")
    assert measured.loss == pytest.approx(card["validation"]["ema"]["loss"], rel=1e-5) and measured.ratio < 0.8
