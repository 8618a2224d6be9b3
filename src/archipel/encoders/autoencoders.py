"""Trained autoencoders of diffusers as codecs: clips (B, 3, F, H, W) in [-1, 1] <-> latents of about unit variance.

Video: AutoencoderKLHunyuanVideo, AutoencoderKLWan, AutoencoderKLLTXVideo, AutoencoderKLCogVideoX; frame by frame:
AutoencoderKL and AutoencoderTiny. What is added to diffusers' own ``encode`` and ``decode`` is what its pipelines do
around them: z = (mode - mean) gain, with the mean and gain that the class states in its own way, and back. The mode of
the posterior is taken, so that a clip always has the same latents.

Video autoencoders are causal: the first frame has a latent frame of its own, each further one stands for pt frames, so
clips have pt n + 1 frames. AutoencoderKLCogVideoX gives so many back only where it has an odd number of latent frames.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from archipel import store
from archipel.config import Codec as CodecConfig
from archipel.encoders import outside
from archipel.encoders.codecs import AUTOENCODER
from archipel.encoders.resolving import autoencoder_shape
from archipel.errors import ArchipelError, DamagedError

_MAX_PARAMETERS = 8 << 30  # of an autoencoder: a stranger's config.json must not take all memory


class Autoencoder:
    """A ``Codec`` around a model of diffusers, in float32, on the device of what it is given.

    Clips are encoded and decoded one at a time: memory is that of one clip, and a clip's latents do not depend on the
    others of its batch. ``tiling``: large frames in overlapping tiles, by diffusers' own ``enable_tiling``.
    """

    name = AUTOENCODER

    def __init__(self, model: Any, *, tiling: bool = False) -> None:
        config = {"_class_name": type(model).__name__, **model.config}
        self.model = model.eval().requires_grad_(False).float()
        self.patch, self.channels, self.causal = autoencoder_shape(config, type(model).__name__)
        self.tiling = tiling
        self.video = self.causal  # image autoencoders see a frame at a time
        self.mean, self.gain = statistics(model)
        if tiling:
            self.model.enable_tiling()

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents of a clip of that size."""
        pt, ph, pw = self.patch
        return self.channels, (frames - 1) // pt + 1 if self.causal else frames // pt, height // ph, width // pw

    @torch.no_grad()
    def encode(self, clips: Tensor) -> Tensor:
        """(B, 3, F, H, W) in [-1, 1] -> (B, C, T, H, W) float32, on the device of ``clips``.

        Raises ArchipelError where the clip's size does not fit the autoencoder.
        """
        shape = self.latent_shape(*clips.shape[2:])
        if not len(clips):
            return clips.new_zeros(0, *shape)
        self._fits(clips)
        self._on(clips.device)
        rows = [self._mode(clip[None]) for clip in clips.float()]
        latents = (torch.cat(rows) - self.mean.to(clips.device)) * self.gain.to(clips.device)
        if latents.shape[1:] != shape:
            raise ArchipelError(
                f"{type(self.model).__name__} made latents of {tuple(latents.shape[1:])} of clips of {tuple(clips.shape[2:])}, "
                f"its configuration says {shape}: it is not usable"
            )
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, 3, F, H, W) float32, clamped to [-1, 1]."""
        self._on(latents.device)
        raw = latents.float() / self.gain.to(latents.device) + self.mean.to(latents.device)
        T, (pt, ph, pw) = latents.shape[2], self.patch
        frames = (T - 1) * pt + 1 if self.causal else T * pt
        clips = latents.new_zeros(
            len(raw), 3, frames, latents.shape[3] * ph, latents.shape[4] * pw, dtype=torch.float32
        )
        for row, clip in zip(raw, clips, strict=True):
            made = self._pixels(row[None])[0]
            if made.shape != clip.shape:
                raise ArchipelError(
                    f"{type(self.model).__name__} made {made.shape[1]} frames of {made.shape[2]} x {made.shape[3]} of latents of "
                    f"{tuple(row.shape)}, instead of {frames} of {clip.shape[2]} x {clip.shape[3]}"
                )
            clip.copy_(made)
        return clips.clamp_(-1, 1)

    def _mode(self, clip: Tensor) -> Tensor:
        """One clip (1, 3, F, H, W) -> the posterior's mode (1, C, T, H, W), before the statistics."""
        images = clip if self.video else clip[0].movedim(1, 0)  # (F, 3, H, W)
        found = self.model.encode(images)
        made: Tensor = found.latents if hasattr(found, "latents") else found.latent_dist.mode()
        return made if self.video else made.movedim(0, 1)[None]

    def _pixels(self, raw: Tensor) -> Tensor:
        """One clip's latents (1, C, T, H, W), statistics undone -> (1, 3, F, H, W)."""
        if not self.video:
            made: Tensor = self.model.decode(raw[0].movedim(1, 0)).sample
            return made.movedim(0, 1)[None]
        config = self.model.config
        # LTX's decoders since 0.9.1 are told a time, 0 by LTXPipeline's default, and may add noise of their own: always the same.
        told = (raw.new_zeros(1),) if config.get("timestep_conditioning") else ()
        noisy = any(config.get("decoder_inject_noise") or ())
        with torch.random.fork_rng([raw.device] if raw.is_cuda else []) if noisy else contextlib.nullcontext():
            if noisy:
                torch.manual_seed(0)
            frames: Tensor = self.model.decode(raw, *told).sample
        return frames

    def _fits(self, clips: Tensor) -> None:
        F, height, width = clips.shape[2:]
        pt, ph, pw = self.patch
        rest = 1 if self.causal else 0
        if (F - rest) % pt or height % ph or width % pw:
            raise ArchipelError(
                f"clips of {F} x {height} x {width} do not fit {type(self.model).__name__}: frames must be {pt}n{' + 1' * rest}, "
                f"height and width divisible by {ph} and {pw}"
            )

    def _on(self, device: torch.device) -> None:
        if next(self.model.parameters()).device != device:
            self.model.to(device)

    def facts(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "model": type(self.model).__name__,
            "patch": list(self.patch),
            "channels": self.channels,
            "causal": self.causal,
            "tiling": self.tiling,
        }


def statistics(model: Any) -> tuple[Tensor, Tensor]:
    """(mean, gain), each (1, C or 1, 1, 1, 1) float32, of z = (mode - mean) gain, as the class's own pipeline has them.

    Per channel where the model states ``latents_mean`` and ``latents_std`` (Wan in its configuration, LTX among its
    tensors), else its ``shift_factor``; gain = ``scaling_factor`` / std, with 1 for what is not stated.
    """
    config = model.config
    buffers = dict(model.named_buffers(recurse=False))
    mean, std = buffers.get("latents_mean"), buffers.get("latents_std")
    if mean is None or std is None:
        mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        mean, std = [float(config.get("shift_factor") or 0.0)], [1.0]

    def per_channel(values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32).detach().reshape(1, -1, 1, 1, 1)

    # Wan's configuration has no scaling_factor; CogVideoX's 1.0 or so stands for one over the standard deviation.
    scale = float(config.get("scaling_factor") or 1.0)
    stated = torch.cat([per_channel(mean).flatten(), per_channel(std).flatten(), torch.tensor([scale])])
    if not bool(stated.isfinite().all()):
        raise ArchipelError(
            f"{type(model).__name__} states a mean, deviation or scale of its latents that is no finite number"
        )
    if float(per_channel(std).min()) <= 0 or scale <= 0:
        raise ArchipelError(f"{type(model).__name__} states a standard deviation that is not above 0")
    return per_channel(mean), scale / per_channel(std)


def load(folder: Path, *, tiling: bool = False) -> Autoencoder:
    """The autoencoder in ``folder`` (``config.json``, ``model.safetensors``), on the CPU, in float32.

    It is built without memory first and compared with the file's names and shapes. Raises DamagedError where they differ.
    """
    import diffusers
    from safetensors.torch import load_file

    config = store.read_json(folder / outside.CONFIG)
    autoencoder_shape(config, str(folder))
    kind = getattr(diffusers, config["_class_name"])
    known = {key: value for key, value in config.items() if key in inspect.signature(kind).parameters}
    try:
        with torch.device("meta"):
            wanted = {name: tuple(value.shape) for name, value in kind.from_config(known).state_dict().items()}
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise DamagedError(
            f"{folder / outside.CONFIG} does not describe a {config['_class_name']} ({error})"
        ) from error
    path = folder / outside.WEIGHTS
    found = {_renamed(name): shape for name, shape in outside.tensor_shapes([path]).items()}
    if wanted != found:
        odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise DamagedError(
            f"{path} does not fit {outside.CONFIG}: {len(odd)} tensors differ, first {odd[0]!r}: the configuration wants "
            f"{wanted.get(odd[0])}, the file has {found.get(odd[0])}"
        )
    if sum(torch.Size(shape).numel() for shape in wanted.values()) > _MAX_PARAMETERS:
        raise ArchipelError(f"{path} has more than {_MAX_PARAMETERS >> 30} billion parameters: that is no autoencoder")
    model = kind.from_config(known)
    model.load_state_dict({_renamed(name): tensor for name, tensor in load_file(str(path)).items()})
    return Autoencoder(model, tiling=tiling)


_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _renamed(name: str) -> str:
    """A tensor's name as diffusers writes it since 0.17: image autoencoders from before that are still about."""
    return re.sub(r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.", lambda m: f"{m[1]}{_OLD_NAMES[m[2]]}.", name)


def check(codec: Autoencoder, config: CodecConfig) -> None:
    """Refuse a codec that is not the one that ``run.toml`` was resolved for. Raises ArchipelError naming both."""
    facts = {key: value for key, value in codec.facts().items() if key in ("model", "patch", "channels", "causal")}
    wanted = {key: list(value) if isinstance(value := getattr(config, key), tuple) else value for key in facts}
    if facts != wanted:
        raise ArchipelError(f"codec.path holds {facts}, but run.toml was made for {wanted}: make a new run with it")
