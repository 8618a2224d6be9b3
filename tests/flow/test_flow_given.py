"""Given frames as a condition, and the mix of tasks that they are drawn from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from archipel.flow import draws, given

B, C, T, H, W = 4, 3, 5, 2, 2


def test_each_task_gives_its_frames_and_nothing_else() -> None:
    first, last = torch.randn(B, C, H, W), torch.randn(B, C, H, W)
    made = given.condition(first, last, torch.arange(B), T)
    assert made.shape == (B, C + 1, T, H, W) and made.dtype == torch.float32
    for row, (at_first, at_last) in enumerate([(False, False), (True, False), (True, True), (False, True)]):
        mask = torch.zeros(T)
        mask[0], mask[-1] = float(at_first), float(at_last)
        assert torch.equal(made[row, C], mask[:, None, None].expand(T, H, W)), given.TASKS[row]
        assert torch.equal(made[row, :C, 0], first[row] * at_first)
        assert torch.equal(made[row, :C, -1], last[row] * at_last)
        assert not made[row, :, 1:-1].any()
        assert given.task_of(at_first, at_last) == row


def test_what_is_not_given_is_not_read() -> None:
    """Not even multiplied: numbers that are not finite in a frame that nobody gives stay outside."""
    bad = torch.full((1, C, H, W), float("nan"))
    good = torch.ones(1, C, H, W)
    head, tail = (torch.tensor([given.TASKS.index(name)]) for name in ("head", "tail"))
    assert torch.isfinite(given.condition(good, bad, head, T)).all()
    assert torch.isfinite(given.condition(bad, good, tail, T)).all()
    assert not given.condition(bad, bad, torch.tensor([0]), T).any()


def test_one_latent_frame_is_first_and_last() -> None:
    first, last = torch.ones(1, C, H, W), torch.full((1, C, H, W), 2.0)
    for task, wanted in (("head", 1.0), ("tail", 2.0)):
        made = given.condition(first, last, torch.tensor([given.TASKS.index(task)]), 1)
        assert (made[:, :C] == wanted).all() and (made[:, C] == 1).all()


@pytest.mark.parametrize("mix", [(1, 5, 1, 1), (0, 1, 0, 0), (0.3, 0, 0.2, 0), (0, 0, 0, 2)])
def test_tasks_are_drawn_in_their_shares(mix: tuple[float, ...]) -> None:
    u = draws.uniforms(3, range(8000), purpose=draws.TASK)
    found = np.bincount(given.pick(mix, u).numpy(), minlength=4) / len(u)
    wanted = np.array(mix) / sum(mix)
    assert np.abs(found - wanted).max() < 0.02
    assert (found[wanted == 0] == 0).all()
    edge = given.pick(mix, np.array([0.0, np.nextafter(1.0, 0.0)]))
    assert all(mix[int(task)] > 0 for task in edge)
    assert given.shares(mix) == {n: w for n, w in zip(given.TASKS, wanted.tolist(), strict=True) if w}


def test_what_is_no_mix_is_refused() -> None:
    for mix in [(0, 0, 0, 0), (1, -1, 0, 0), (1, 1)]:
        with pytest.raises(ValueError, match="mix of tasks"):
            given.shares(mix)
    assert given.only("loop") == (0, 0, 1, 0)
