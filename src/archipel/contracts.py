"""The four contracts that every part of Archipel meets at: velocity, codec, text encoder, features.

One alphabet for shapes: B batch, C channels, F frames, T latent frames, H W space, L text tokens, N video tokens,
D width, P pooled width, K experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """What a caption became: one row per clip.

    tokens: (B, L, D) float; mask: (B, L) bool, True where a token is real; pooled: (B, P) float.
    The null condition (unconditional branch) is pooled zeros and a fully masked text of zeros.

    image: None, or (B, C + 1, T, H, W) float: clean latents of the frames that are given, zero elsewhere, and behind them
    their mask of ones. It is no caption: it stays when the text is dropped, and in the null condition.
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor
    image: Tensor | None = None

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    def __getitem__(self, rows: Tensor | slice) -> Conditioning:
        """Rows by slice, index tensor or bool tensor."""
        image = None if self.image is None else self.image[rows]
        return Conditioning(self.tokens[rows], self.mask[rows], self.pooled[rows], image)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        return Conditioning(
            self.tokens.to(device=device, dtype=dtype),
            self.mask.to(device=device),
            self.pooled.to(device=device, dtype=dtype),
            None if self.image is None else self.image.to(device=device, dtype=dtype),
        )

    def given(self, image: Tensor | None) -> Conditioning:
        """The same captions with the given frames ``image`` (see the class)."""
        return Conditioning(self.tokens, self.mask, self.pooled, image)

    def null(self) -> Conditioning:
        """The null condition of the same shape."""
        return Conditioning(self.tokens * 0, self.mask & False, self.pooled * 0, self.image)

    def drop(self, dropped: Tensor, pooled: Tensor | None = None) -> Conditioning:
        """Replace the rows where ``dropped`` (B,) bool is True by the null condition (tokens and pooled together; ``pooled``
        (B,) bool: where the pooled vector is dropped instead)."""
        keep, keep_pooled = ~dropped, ~(dropped if pooled is None else pooled)
        return Conditioning(
            self.tokens * keep[:, None, None].to(self.tokens.dtype),
            self.mask & keep[:, None],
            self.pooled * keep_pooled[:, None].to(self.pooled.dtype),
            self.image,
        )

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        import torch

        return Conditioning(
            torch.cat([p.tokens for p in parts]),
            torch.cat([p.mask for p in parts]),
            torch.cat([p.pooled for p in parts]),
            None if any(p.image is None for p in parts) else torch.cat([p.image for p in parts if p.image is not None]),
        )


class Velocity(Protocol):
    """``velocity(x, t, cond) -> v``: x (B, C, T, H, W), t (B,) in [0, 1] with 1 = noise, v like x.

    One expert, a guided expert, the router's mixture, an oracle, an expert with another objective, a remote expert:
    all are this callable, and samplers know nothing else. dx/dt = v on the path x_t = (1 - t) x0 + t eps.
    """

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor: ...


class Posterior(Protocol):
    """``router(x, t, cond) -> p``: p (B, K) >= 0, rows sum to 1: p(k | x_t, t, c)."""

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor: ...


class Codec(Protocol):
    """Clips (B, 3, F, H, W) float32 in [-1, 1] <-> latents (B, C, T, H, W) float32 of about unit variance."""

    name: str

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]: ...

    def encode(self, clips: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor:
        """Returns clips clamped to [-1, 1]."""
        ...


class TextEncoder(Protocol):
    """Captions -> tokens (B, L, D), mask (B, L), pooled (B, P); L is fixed, so every batch has one shape."""

    name: str
    tokens: int
    width: int
    pooled_width: int

    def encode(self, captions: Sequence[str]) -> Conditioning: ...


class FeatureExtractor(Protocol):
    """Clips (B, 3, F, H, W) float32 in [-1, 1] -> float32 features (B, D), for clustering and for distances."""

    name: str
    width: int

    def __call__(self, clips: Tensor) -> Tensor: ...
