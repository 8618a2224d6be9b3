"""Clips <-> latents without a trained autoencoder: PCA of space-time blocks, fitted in closed form, or plain pixels; and
``load_codec``, which opens those and the trained ones (``autoencoders``) alike.

A clip (3, F, H, W) is cut into blocks of (pt, ph, pw); each block of D = 3 pt ph pw numbers becomes one latent
position. Latents are (B, C, T, H, W) with T = F / pt, H = height / ph, W = width / pw and about unit variance.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from archipel import store
from archipel.config import Codec as CodecConfig
from archipel.contracts import Codec
from archipel.errors import ArchipelError, DamagedError, MissingStageError
from archipel.progress import Progress, StopFlag

if TYPE_CHECKING:
    from archipel.encoders.autoencoders import Autoencoder

AUTOENCODER = "autoencoder"  # config.codec.kind, and the name in the card, of a trained one
Patch = tuple[int, int, int]
SAMPLED_BLOCKS = 40_000  # moments of 768 numbers from so many blocks take some seconds on one core
_CLIPS_AT_ONCE = 32
# Standard deviation of rounding to 8 bits in units of [-1, 1]: a component below it carries rounding, not content.
_ROUNDING = 2 / 255 / 12**0.5


class ClipRows(Protocol):
    """uint8 clips (N, F, H, W, 3): an array, or rows of the cache read through a memory map."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Any: ...


def from_uint8(clips: NDArray[np.uint8] | Tensor) -> Tensor:
    """uint8 (B, F, H, W, 3) -> float32 (B, 3, F, H, W) in [-1, 1]."""
    tensor = clips if isinstance(clips, Tensor) else torch.from_numpy(np.ascontiguousarray(clips))
    return tensor.permute(0, 4, 1, 2, 3).float().div(127.5).sub_(1.0)


def to_uint8(clips: Tensor) -> NDArray[np.uint8]:
    """float (B, 3, F, H, W) in [-1, 1] (clamped) -> uint8 (B, F, H, W, 3), rounded; undoes ``from_uint8`` exactly."""
    levels = clips.detach().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return np.ascontiguousarray(levels.permute(0, 2, 3, 4, 1).cpu().numpy())


def to_blocks(clips: Tensor, patch: Patch) -> Tensor:
    """(B, 3, F, H, W) -> (B, T, H, W, D): the numbers of one block in the order (colour, frame, row, column)."""
    B, channels, F, height, width = clips.shape
    pt, ph, pw = patch
    if F % pt or height % ph or width % pw:
        raise ArchipelError(
            f"clips of {F} x {height} x {width} cannot be cut into blocks of {pt} x {ph} x {pw} (codec.patch)"
        )
    cut = clips.reshape(B, channels, F // pt, pt, height // ph, ph, width // pw, pw)
    return cut.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(B, F // pt, height // ph, width // pw, channels * pt * ph * pw)


def from_blocks(blocks: Tensor, patch: Patch) -> Tensor:
    """(B, T, H, W, D) -> (B, 3, F, H, W), the inverse of ``to_blocks``."""
    B, T, H, W, D = blocks.shape
    pt, ph, pw = patch
    apart = blocks.reshape(B, T, H, W, D // (pt * ph * pw), pt, ph, pw)
    return apart.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(B, -1, T * pt, H * ph, W * pw)


class _Blocks(ABC):
    """What both codecs share: the grid, and saving with a card."""

    name: str
    patch: Patch
    causal = False  # a latent frame sees frames of its own block only, so that the first has pt of them

    @property
    @abstractmethod
    def channels(self) -> int:
        """C."""

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents of a clip of that size."""
        pt, ph, pw = self.patch
        return (self.channels, frames // pt, height // ph, width // pw)

    @abstractmethod
    def tensors(self) -> dict[str, np.ndarray]:
        """What is saved."""

    def facts(self) -> dict[str, Any]:
        return {"name": self.name, "patch": list(self.patch), "channels": self.channels}

    def save(self, folder: Path, run_id: str, **fields: Any) -> dict[str, Any]:
        """Write model.safetensors and, last, the card (kind ``codec``); ``fields`` go into the card. Returns the card."""
        store.write_tensors(folder / "model.safetensors", self.tensors())
        return store.write_card(folder, "codec", run_id, ["model.safetensors"], codec=self.facts(), **fields)


@dataclass
class PatchPCA(_Blocks):
    """Principal components of centred blocks: z = U^T (x - mean) / sigma^gamma / scale, and back.

    mean (D,), basis (C, D) with orthonormal rows by falling variance, sigma (C,) their standard deviations, all
    float32. gamma 0 keeps the components' own scales, 1 whitens them; ``scale`` makes the mean latent variance 1.
    Exact on the kept subspace whatever gamma is; ``explained`` is the share of the variance that is kept.
    """

    name: str = field(default="patch-pca", init=False)
    patch: Patch
    gamma: float
    mean: Tensor
    basis: Tensor
    sigma: Tensor
    scale: float
    explained: float

    @property
    def channels(self) -> int:
        return int(self.basis.shape[0])

    def _divisor(self) -> Tensor:
        return self.sigma.clamp_min(_ROUNDING) ** self.gamma * self.scale

    def encode(self, clips: Tensor) -> Tensor:
        """(B, 3, F, H, W) in [-1, 1] -> (B, C, T, H, W), on the device of ``clips``."""
        down = (self.basis / self._divisor()[:, None]).T.to(clips.device)  # (D, C)
        return ((to_blocks(clips, self.patch) - self.mean.to(clips.device)) @ down).movedim(-1, 1).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, 3, F, H, W), clamped to [-1, 1]."""
        up = (self.basis * self._divisor()[:, None]).to(latents.device)  # (C, D)
        blocks = latents.movedim(1, -1) @ up + self.mean.to(latents.device)
        return from_blocks(blocks, self.patch).clamp(-1, 1)

    def tensors(self) -> dict[str, np.ndarray]:
        return {"mean": self.mean.numpy(), "basis": self.basis.numpy(), "sigma": self.sigma.numpy()}

    def facts(self) -> dict[str, Any]:
        return {
            **super().facts(),
            "gamma": self.gamma,
            "scale": self.scale,
            "explained_variance": self.explained,
            "sigma": [round(float(value), 6) for value in self.sigma],
        }

    @classmethod
    def fit(
        cls,
        clips: ClipRows,
        rows: NDArray[np.int64],
        patch: Patch,
        channels: int,
        gamma: float,
        *,
        seed: int = 0,
        blocks: int = SAMPLED_BLOCKS,
        stop: StopFlag | None = None,
    ) -> PatchPCA:
        """Fit on the blocks of ``rows`` (the training rows and no others), at most about ``blocks`` of them, drawn by seed.

        First and second moments are accumulated in float64 clip by clip, so memory is D x D whatever N is.
        Raises ArchipelError where there are fewer blocks than channels.
        """
        mean, covariance = _moments(clips, rows, patch, channels, seed, blocks, stop)
        values, vectors = torch.linalg.eigh(covariance)  # ascending
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        basis = vectors[:, :channels].T
        # Eigenvectors have no sign of their own: the largest entry is made positive, so that every fit agrees.
        largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
        basis = basis * torch.where(largest < 0, -1.0, 1.0)
        variance = values[:channels]
        sigma = variance.sqrt()
        latent_variance = variance / sigma.clamp_min(_ROUNDING) ** (2 * gamma)
        scale = float(latent_variance.mean().sqrt()) or 1.0
        explained = float(variance.sum() / values.sum()) if float(values.sum()) > 0 else 1.0
        return cls(patch, gamma, mean.float(), basis.float().contiguous(), sigma.float(), scale, explained)


def _moments(
    clips: ClipRows, rows: NDArray[np.int64], patch: Patch, channels: int, seed: int, blocks: int, stop: StopFlag | None
) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D), float64, of a seeded sample of blocks."""
    _, F, height, width, _ = clips.shape
    pt, ph, pw = patch
    D, per_clip = 3 * pt * ph * pw, (F // pt) * (height // ph) * (width // pw)
    if len(rows) * per_clip < channels:
        raise ArchipelError(
            f"codec.channels = {channels} is more than the {len(rows) * per_clip} blocks that {len(rows)} training clips have: "
            f"use codec.channels of at most {len(rows) * per_clip}, a smaller codec.patch, or more clips"
        )
    generator = np.random.Generator(np.random.PCG64([seed, 0xC0DEC]))
    chosen = np.sort(generator.permutation(rows)[:blocks])
    # Enough blocks of each clip for the bound, and never so few that there are fewer than channels.
    kept = min(per_clip, max(1, -(-max(blocks, channels) // len(chosen))))
    total, square, count = torch.zeros(D, dtype=torch.float64), torch.zeros(D, D, dtype=torch.float64), 0
    with Progress("prepare: codec", len(chosen)) as bar:
        for begin in range(0, len(chosen), _CLIPS_AT_ONCE):
            if stop:
                raise stop.error("prepare")
            part = chosen[begin : begin + _CLIPS_AT_ONCE]
            cut = to_blocks(from_uint8(clips[part]), patch).reshape(len(part), per_clip, D)
            if kept < per_clip:
                picks = np.argsort(generator.random((len(part), per_clip)), axis=1)[:, :kept]
                cut = torch.take_along_dim(cut, torch.from_numpy(picks)[:, :, None], dim=1)
            flat = cut.reshape(-1, D).double()
            total += flat.sum(0)
            square += flat.T @ flat
            count += len(flat)
            bar.advance(len(part))
    mean = total / count
    return mean, square / count - torch.outer(mean, mean)


@dataclass
class Pixels(_Blocks):
    """No compression: every number of a block is a channel, shifted and divided by one number each."""

    name: str = field(default="pixels", init=False)
    patch: Patch
    mean: float
    scale: float

    @property
    def channels(self) -> int:
        pt, ph, pw = self.patch
        return 3 * pt * ph * pw

    def encode(self, clips: Tensor) -> Tensor:
        """(B, 3, F, H, W) in [-1, 1] -> (B, 3 pt ph pw, T, H, W)."""
        return to_blocks((clips - self.mean) / self.scale, self.patch).movedim(-1, 1).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 3 pt ph pw, T, H, W) -> (B, 3, F, H, W), clamped to [-1, 1]."""
        return (from_blocks(latents.movedim(1, -1), self.patch) * self.scale + self.mean).clamp(-1, 1)

    def tensors(self) -> dict[str, np.ndarray]:
        return {"mean": np.array([self.mean], np.float32), "scale": np.array([self.scale], np.float32)}

    @classmethod
    def fit(cls, clips: ClipRows, rows: NDArray[np.int64], patch: Patch, *, stop: StopFlag | None = None) -> Pixels:
        """Mean and standard deviation over all pixels of the training rows."""
        total = square = count = 0.0
        with Progress("prepare: codec", len(rows)) as bar:
            for begin in range(0, len(rows), _CLIPS_AT_ONCE):
                if stop:
                    raise stop.error("prepare")
                part = from_uint8(clips[rows[begin : begin + _CLIPS_AT_ONCE]]).double()
                total, square = total + float(part.sum()), square + float(part.square().sum())
                count += part.numel()
                bar.advance(len(part))
        mean = total / count
        deviation = max(square / count - mean**2, 0.0) ** 0.5
        # What is stored is float32: the same numbers must serve before and after saving.
        return cls(patch, float(np.float32(mean)), float(np.float32(deviation or 1.0)))


def fit_codec(
    config: CodecConfig, clips: ClipRows, rows: NDArray[np.int64], *, seed: int = 0, stop: StopFlag | None = None
) -> PatchPCA | Pixels:
    """The codec that ``run.toml`` asks for, fitted on training rows of uint8 clips (N, F, H, W, 3)."""
    if not len(rows):
        raise ArchipelError(
            "there are no training clips to fit the codec on: look at clips.split and clips/rejected.csv"
        )
    if config.kind == "pixels":
        return Pixels.fit(clips, rows, config.patch, stop=stop)
    return PatchPCA.fit(clips, rows, config.patch, config.channels, config.gamma, seed=seed, stop=stop)


def device_of(codec: object) -> str:
    """Where *prepare* computes: a trained autoencoder on a GPU where there is one, what is fitted here always on the CPU."""
    return "cuda" if getattr(codec, "name", "") == AUTOENCODER and torch.cuda.is_available() else "cpu"


def still_latents(codec: Codec, frames: NDArray[np.uint8] | Tensor, clip_frames: int) -> Tensor:
    """Latents (B, C, H, W) float32 of frames uint8 (B, height, width, 3), each as a clip that does not move.

    A causal codec has a latent frame for the first frame alone: it is given that one frame. Any other gets the frame again
    and again, and the first latent frame is taken: as often as there are frames in its first block, since blocks do not
    see each other, or ``clip_frames`` times where it has no blocks.
    """
    still = from_uint8(frames[:, None])  # (B, 3, 1, height, width)
    if not getattr(codec, "causal", False):
        still = still.expand(-1, -1, getattr(codec, "patch", (clip_frames,))[0], -1, -1)
    return codec.encode(still)[:, :, 0].contiguous()


def load_codec(folder: Path) -> PatchPCA | Pixels | Autoencoder:
    """Read a saved codec, holding it to its checksum. Raises MissingStageError or DamagedError."""
    card = store.read_card(folder, "codec")
    if card is None:
        raise MissingStageError(f"{folder} holds no codec: run `archipel prepare {folder.parent}` first")
    problems = store.check_card(folder)
    if problems:
        raise DamagedError(
            f"{problems[0].path} {problems[0].reason}: remove {folder} and run `archipel prepare {folder.parent}`"
        )
    try:
        facts = card["codec"]
        if facts["name"] == AUTOENCODER:
            from archipel.encoders import autoencoders

            return autoencoders.load(folder, tiling=bool(facts.get("tiling")))
        mapped = store.map_tensors(folder / "model.safetensors")
        # What lies in half precision (see ``exchange.pack``) is computed with in float32.
        tensors = {name: torch.tensor(np.asarray(value, np.float32)) for name, value in mapped.items()}
        pt, ph, pw = (int(part) for part in facts["patch"])
        if facts["name"] == Pixels.name:
            return Pixels((pt, ph, pw), float(tensors["mean"]), float(tensors["scale"]))
        if facts["name"] != PatchPCA.name:
            raise ArchipelError(
                f"{folder} holds a codec {facts['name']!r}, which this Archipel does not know: install a newer one"
            )
        mean, basis, sigma = tensors["mean"], tensors["basis"], tensors["sigma"]
        D, C = 3 * pt * ph * pw, int(facts["channels"])
        if (mean.shape, basis.shape, sigma.shape) != ((D,), (C, D), (C,)):
            raise DamagedError(
                f"{folder}: the tensors' shapes do not fit the card (patch {facts['patch']}, {C} channels)"
            )
        return PatchPCA(
            (pt, ph, pw),
            float(facts["gamma"]),
            mean,
            basis,
            sigma,
            float(facts["scale"]),
            float(facts["explained_variance"]),
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DamagedError(
            f"{folder} does not hold a usable codec ({error!r}): remove it and run `archipel prepare` again"
        ) from error


# --- what the codec costs --------------------------------------------------------------------------------------------


class _Jumps:
    """Sums of |difference of neighbours| along one axis, at block borders and elsewhere."""

    def __init__(self, axis: int, period: int, first: int = 0) -> None:
        self.axis, self.period, self.first = axis, period, first  # borders lie before first, first + period, ...
        self.sums, self.counts = [0.0, 0.0], [0, 0]  # elsewhere, border

    def add(self, clips: Tensor) -> None:
        jumps = clips.diff(dim=self.axis).abs()
        at_border = ((torch.arange(1, clips.shape[self.axis]) - self.first) % self.period) == 0
        for border in (False, True):
            part = jumps.index_select(self.axis, torch.nonzero(at_border == border).flatten().to(jumps.device))
            self.sums[border] += float(part.sum(dtype=torch.float64))
            self.counts[border] += part.numel()


def _ratio(jumps: list[_Jumps]) -> float | None:
    """Mean jump at borders over mean jump elsewhere; None where there are no borders, or no jumps elsewhere."""
    means = []
    for border in (True, False):
        count = sum(part.counts[border] for part in jumps)
        means.append(sum(part.sums[border] for part in jumps) / count if count else 0.0)
    has_both = all(sum(part.counts[border] for part in jumps) for border in (0, 1))
    return means[0] / means[1] if has_both and means[1] > 0 else None


def round_trip(codec: Codec, clips: Tensor | Iterable[Tensor]) -> dict[str, float | None]:
    """What encoding and decoding costs on clips (B, 3, F, H, W) in [-1, 1], given at once or batch by batch.

    psnr: dB over all numbers, peak-to-peak 2. seam_space and seam_time: the mean absolute jump between neighbours
    across a block border over that between other neighbours, beside the same ratio in the originals
    (``*_original``): a codec without seams keeps it. None where it is not defined (one block, or nothing moves).
    """
    patch: Patch = codec.patch  # type: ignore[attr-defined]
    first = 1 if getattr(codec, "causal", False) else 0  # of a causal codec the first frame is a block of its own
    axes = {"space": ((3, patch[1]), (4, patch[2])), "time": ((2, patch[0], first),)}
    jumps = {(kind, which): [_Jumps(*axis) for axis in axes[kind]] for kind in axes for which in ("", "_original")}
    error, count = 0.0, 0
    for batch in [clips] if isinstance(clips, Tensor) else clips:
        decoded = codec.decode(codec.encode(batch))
        error += float((decoded - batch).double().square().sum())
        count += batch.numel()
        for (_, which), parts in jumps.items():
            for part in parts:
                part.add(batch if which else decoded)
    if not count:
        raise ValueError("round_trip needs at least one clip")
    # 8-bit clips cannot show more than rounding: the bound keeps a perfect codec's number finite.
    psnr = 10 * float(np.log10(4 / max(error / count, 1e-12)))
    return {"psnr": psnr, **{f"seam_{kind}{which}": _ratio(parts) for (kind, which), parts in jumps.items()}}
