"""RMS norms in two passes over memory where torch takes five: on a CPU in float32, where no gradient is wanted.

The same modules and weights; last bits differ (the sum of squares is taken by another kernel). Elsewhere, and in training,
torch's own. Zhang and Sennrich, arXiv 1910.07467, eq. 4.
"""

from __future__ import annotations

from typing import cast

import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn


def quicken(network: nn.Module) -> None:
    """Let a network's RMS norms compute so. Their weights and names stay as they are."""
    for module in network.modules():
        kind = _QUICK.get(type(module))
        if kind is not None:
            module.__class__ = kind


def _plain(x: Tensor) -> bool:
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    return not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()


def _rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x (..., d) over its root mean square, float32, times ``weight`` (d,)."""
    inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = inverse.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    normed = x * inverse
    if weight is not None:
        normed.mul_(weight)
    return cast(Tensor, normed)


class _Torchs(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        if not _plain(x) or len(self.normalized_shape) != 1:
            return super().forward(x)
        return _rms(x, self.weight, torch.finfo(x.dtype).eps if self.eps is None else self.eps)


class _Diffusers(RMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        if not _plain(hidden_states) or self.bias is not None or self.weight is not None:
            made: Tensor = super().forward(hidden_states)
            return made
        return _rms(hidden_states, None, self.eps)


_QUICK: dict[type, type] = {nn.RMSNorm: _Torchs, RMSNorm: _Diffusers}
