"""Sampling and frozen parts: predicted memory against what torch's allocator gives out, counts against real models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_parts import AUTOENCODERS, autoencoder_class, tiny_autoencoder, tiny_text

from archipel import pipeline
from archipel.backbones import flops
from archipel.backbones.registry import build_expert
from archipel.config import RunConfig
from archipel.errors import ConfigError
from archipel.planning import parts
from archipel.planning.held import Held
from archipel.planning.memory import clips, evaluation

CAUSAL = ("hunyuan", "wan", "ltx", "cogvideox")


def allocated(work: Callable[[], object]) -> int:
    """Bytes that the allocator had given out at most for ``work``, beside what was there."""
    with (
        torch.no_grad(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        work()
    now = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def with_codec(folder: Path, name: str, frames: int) -> RunConfig:
    kind, about = AUTOENCODERS[name]
    causal = name in CAUSAL
    codec = {"kind": "autoencoder", "model": kind, "path": str(folder), "causal": causal}
    codec |= {"patch": [4 if causal else 1, 8, 8], "channels": about.get("latent_channels", about.get("z_dim"))}
    return RunConfig.model_validate({"clips": {"frames": frames, "size": 32}, "codec": codec})


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_decoding_takes_what_its_tensors_take(tmp_path: Path, name: str) -> None:
    config = with_codec(tiny_autoencoder(tmp_path, name), name, frames=9)
    part = parts.codec(config)
    model = autoencoder_class(name).from_pretrained(str(tmp_path)).eval()
    assert part.parameters == sum(p.numel() for p in model.parameters())
    z = torch.zeros(1, *flops.latent_shape(config))
    z = z if name in CAUSAL else z.transpose(1, 2).flatten(0, 1)
    with Held() as held, torch.no_grad():
        model.decode(z, return_dict=False)
    assert part.working == pytest.approx(held.peak, rel=0.01)
    # Convolutions allocate for themselves, too, which is no tensor of anybody's.
    assert part.working <= allocated(lambda: model.decode(z, return_dict=False))


@pytest.mark.parametrize("backbone", ["flux", "wan"])
def test_an_evaluation_takes_what_the_allocator_gives_out(backbone: str) -> None:
    more = {"expert": {"backbone": backbone, "double_blocks": 2, "single_blocks": 3}}
    config = pipeline.resolve(preset="tiny", over=more)
    model, one = build_expert(config, seed=0).eval(), clips(config, 2)
    model(one.x_t, one.t, one.cond)  # tables that are remembered
    assert evaluation(config, 2) == pytest.approx(allocated(lambda: model(one.x_t, one.t, one.cond)), rel=0.1)


@pytest.mark.parametrize(("name", "count"), [("t5+clip", 2), ("umt5", 1), ("clip", 1)])
def test_text_encoders_of_a_folder_are_counted(tmp_path: Path, name: Any, count: int) -> None:
    import transformers

    tiny_text(tmp_path, name)
    widths = {"width": 32, "pooled_width": 24 if name == "t5+clip" else 32}
    config = RunConfig.model_validate({"text": {"encoder": name, "path": str(tmp_path), **widths}})
    kinds = {"t5": "T5EncoderModel", "umt5": "UMT5EncoderModel", "clip": "CLIPTextModel"}
    found = parts.text(config)
    assert len(found) == count
    for kind, part in zip(name.split("+"), found, strict=True):
        folders = [tmp_path / "text_encoder", tmp_path / "text_encoder_2"]
        folder = folders[1] if name == "t5+clip" and kind == "t5" else folders[0]
        model = getattr(transformers, kinds[kind]).from_pretrained(str(folder))
        assert part.parameters == sum(p.numel() for p in model.parameters())


def test_latent_channels_of_another_autoencoder_are_refused(tmp_path: Path) -> None:
    config = with_codec(tiny_autoencoder(tmp_path, "hunyuan"), "hunyuan", frames=9)
    other = config.model_copy(update={"codec": config.codec.model_copy(update={"channels": 16})})
    with pytest.raises(ConfigError, match=r"4 latent channels .* and codec.channels is 16"):
        parts.codec(other)
