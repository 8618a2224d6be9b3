"""Predicted memory against what torch's own allocator gives out in a real step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from archipel import config
from archipel.backbones import flux
from archipel.backbones.registry import build_expert
from archipel.config import RunConfig
from archipel.planning.held import Held, fake
from archipel.planning.memory import Dry, Steps
from archipel.planning.switches import Switches
from archipel.training.local import Local
from archipel.training.loop import Settings, Trainer

WITHIN = 0.10


def settings(**expert: Any) -> RunConfig:
    part = {"width": 64, "heads": 2, "rope_axes": [8, 12, 12], "double_blocks": 1, "single_blocks": 2, "batch": 4}
    clips = {"size": 32, "frames": 4}
    return config.build({"clips": clips, "codec": {"channels": 8, "patch": [2, 4, 4]}, "expert": part | expert}, "here")


def allocated(of: RunConfig, switches: Switches) -> int:
    """Bytes that the allocator had given out at most in the second step, told by the profiler and not by us."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    local = Local("cpu", switches.precision, switches.micro_batch, checkpointing=switches.checkpointing)
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        trainer = Trainer(Dry(build_expert(of, seed=0), of, of.expert.batch), Settings(steps=10, lr=1e-3), local)
        for _ in range(2):
            trainer.advance()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    ("expert", "switches"),
    [
        ({}, Switches("float32")),
        ({}, Switches("float32", checkpointing=True)),
        ({}, Switches("float32", micro_batch=1)),
        ({}, Switches("bfloat16")),
        ({"patch": 2, "tasks": [1, 5, 1, 1]}, Switches("float32")),
        ({"backbone": "wan"}, Switches("float32")),
        ({"backbone": "hunyuan", "rope_axes": [8, 12, 12]}, Switches("float32", checkpointing=True)),
        ({"backbone": "cogvideox"}, Switches("float32")),
        ({"backbone": "ltx"}, Switches("float32")),
    ],
    ids=lambda value: value.told() if isinstance(value, Switches) else " ".join(map(str, value.values())) or "flux",
)
def test_a_steps_peak_is_what_the_allocator_gives_out(expert: dict[str, Any], switches: Switches) -> None:
    of = settings(**expert)
    predicted = Steps(of).of(switches).peak
    assert predicted == pytest.approx(allocated(of, switches), rel=WITHIN)


def test_what_is_held_ends_with_its_last_tensor() -> None:
    with Held() as held:
        a = torch.zeros(1000)
        view = a[:10]
        assert held.now == held.peak == 4000
        b = a + 1
        assert held.now == 8000
        del a
        assert held.now == 8000  # the view keeps it
        del view, b
        assert (held.now, held.peak) == (0, 8000)
        held.reset_peak()
        assert held.peak == 0


def test_a_fake_step_leaves_nothing_behind_for_a_real_one() -> None:
    of = settings()
    Steps(of).of(Switches("float32"))
    assert type(flux.video_ids(2, 8, 8, torch.device("cpu"))) is torch.Tensor
    with fake():
        assert type(flux.video_ids(2, 8, 8, torch.device("cpu"))) is not torch.Tensor
    assert type(flux.video_ids(2, 8, 8, torch.device("cpu"))) is torch.Tensor


def test_a_sharded_step_keeps_its_share_of_everything() -> None:
    steps = Steps(settings(batch=2))
    one, two = (steps.of(Switches("float32", micro_batch=1, gpus=n)) for n in (1, 2))
    assert (two.weights, two.gradients, two.optimizer, two.average) == (
        one.weights // 2,
        one.gradients // 2,
        one.optimizer // 2,
        one.average // 2,
    )
    assert two.gathered > 0 == one.gathered
    assert two.clips == one.clips == 1


def test_eight_bits_and_the_host_take_what_they_say() -> None:
    steps = Steps(settings())
    plain, small = (
        steps.of(Switches("float32", optimizer=o, ema=e)) for o, e in (("adamw", "device"), ("adamw8bit", "host"))
    )
    assert small.average == 0
    assert small.host == 2 * plain.average
    assert plain.optimizer / 4 < small.optimizer < plain.optimizer / 3
    assert small.needed == plain.needed - plain.average - (plain.optimizer - small.optimizer)
