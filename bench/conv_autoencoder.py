"""A small convolutional video autoencoder with the latent budget of patch PCA (0.85 M parameters at C = 96).

What a project would train in place of a closed form; here to be measured against it (see docs/log.md).
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from archipel.encoders.codecs import Patch, from_blocks, to_blocks


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mix = nn.GroupNorm(8, width), nn.Conv3d(width, width, 3, padding=1)
        self.out = nn.Conv3d(width, width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(fn.silu(self.mix(self.norm(x))))


class ConvAutoencoder(nn.Module):
    """(B, 3, F, H, W) <-> (B, C, F/4, H/8, W/8): residual 3x3x3 convolutions on 2x4x4 blocks. A ``Codec``."""

    name = "conv"
    patch: Patch = (4, 8, 8)

    def __init__(self, channels: int, width: int = 64) -> None:
        super().__init__()
        self.inner: Patch = (2, 4, 4)
        self.into, self.out = nn.Conv3d(96, width, 1), nn.Conv3d(width, 96, 3, padding=1)
        self.encoder = nn.Sequential(*[Residual(width) for _ in range(2)])
        self.decoder = nn.Sequential(*[Residual(width) for _ in range(3)])
        self.down = nn.Conv3d(width, channels, 2, stride=2)
        self.up = nn.ConvTranspose3d(channels, width, 2, stride=2)

    def encode(self, clips: Tensor) -> Tensor:
        return self.down(self.encoder(self.into(to_blocks(clips, self.inner).movedim(-1, 1))))

    def reconstruct(self, latents: Tensor) -> Tensor:
        """Not clamped: for training."""
        return from_blocks(self.out(self.decoder(self.up(latents))).movedim(1, -1), self.inner)

    def decode(self, latents: Tensor) -> Tensor:
        return self.reconstruct(latents).clamp(-1, 1)


def train(
    clips: Tensor, channels: int, seconds: float, batch: int = 16, lr: float = 2e-3
) -> tuple[ConvAutoencoder, int]:
    """An autoencoder trained on clips (N, 3, F, H, W) for so many seconds, and the number of its steps."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ConvAutoencoder(channels)
    random, rows = torch.Generator().manual_seed(1), np.random.Generator(np.random.PCG64(1))
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=1e-3)
    start, step = time.monotonic(), 0
    while (spent := time.monotonic() - start) < seconds:
        x = clips[rows.integers(0, len(clips), batch)]
        z = network.encode(x)
        # A little noise on the latents, since generated ones are never exact.
        y = network.reconstruct(z + 0.03 * z.detach().std() * torch.randn(z.shape, generator=random))
        loss = (y - x).square().mean() + 0.1 * (y - x).abs().mean()
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50, max(0.02, (1 - spent / seconds) * 2))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        step += 1
    return network.eval().requires_grad_(False), step
