"""Bytes on disk: what *prepare* makes, what islands fetch, what a bucket holds. Sums of array shapes, headers left out."""

from __future__ import annotations

import math
from dataclasses import dataclass

from archipel.backbones import flops
from archipel.config import RunConfig
from archipel.encoders.features import WIDTHS
from archipel.training.checkpoint import KEEP

_FLOAT32, _INT64 = 4, 8


@dataclass(frozen=True)
class Disk:
    """``cache`` of the run's folder. ``published``: shards, codec and frozen base that islands fetch. ``results``: the trained
    weights. ``checkpoints``: the newest two of every job, which `archipel gc` leaves while training goes on."""

    cache: int
    published: int
    results: int
    checkpoints: int

    @property
    def bucket(self) -> int:
        return self.published + self.results + self.checkpoints


def disk(config: RunConfig, clips: int, trained: list[int], frozen: int, codec: int) -> Disk:
    """``clips``: how many there are; ``trained``: parameters of every job; ``frozen``: bytes of the base under adapters;
    ``codec``: bytes of the codec's weights."""
    keep = 5 if config.expert.keep == "best" else 4  # weights, average, two moments, and the best average
    return Disk(
        cache=clips * (_pixels(config) + _latents(config, config.clips.phases) + _text(config) + _features()),
        published=codec + frozen + _shards(config, clips),
        results=sum(_FLOAT32 * count for count in trained),
        checkpoints=sum(KEEP * keep * _FLOAT32 * count for count in trained),
    )


def _pixels(config: RunConfig) -> int:
    return 3 * config.clips.frames * config.clips.size**2 * config.clips.phases


def _latents(config: RunConfig, windows: int) -> int:
    """A clip's latents, and those of its first and last frames where these are given."""
    C, T, H, W = flops.latent_shape(config)
    stills = 2 * C * H * W if config.expert.given_frames else 0
    return _FLOAT32 * windows * (C * T * H * W + stills)


def _text(config: RunConfig) -> int:
    L, D, P = flops.text_shape(config)
    return _FLOAT32 * (L * D + P) + L


def _features() -> int:
    return _FLOAT32 * sum(WIDTHS.values())


def _shards(config: RunConfig, clips: int) -> int:
    """Every clip but the test split's is in its cluster's shard and in the monolith's; windows are for training only."""
    train, validation, _ = config.clips.split
    row = _text(config) + 2 * _INT64
    one = train * (row + _latents(config, config.clips.phases)) + validation * (row + _latents(config, 1))
    return 2 * math.ceil(clips * one)
