"""bfloat16 where it pays and float32 where it matters: autocast for the blocks, float32 at both ends of the network.

Under autocast matrix products run in bfloat16 and everything that is added up over depth or steps stays float32. The
embeddings (time above all: 8 bits of mantissa cannot tell t = 0.990 from 0.992) and the output projection leave autocast.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from archipel.training.local import PRECISIONS

FLOAT32, BFLOAT16 = PRECISIONS


def autocast(precision: str, device: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Gives the context that forward passes on ``device`` run in; float32 has none."""
    if precision == FLOAT32:
        return contextlib.nullcontext
    return functools.partial(torch.autocast, torch.device(device).type, torch.bfloat16)


def keep_float32(modules: list[nn.Module]) -> None:
    """Let modules compute in float32 inside an autocast block; their parameters must be float32."""
    for module in modules:
        module.forward = functools.partial(_in_float32, module.forward)


def norms_in_input_dtype(model: nn.Module) -> None:
    """Let RMSNorms of queries and keys take their input's dtype, bfloat16 under autocast: torch has no fused kernel for
    an input and a weight of two dtypes. Weights of LayerNorms, which sharding hands over in bfloat16, become float32."""
    for module in model.modules():
        # Of another class, and not with a forward of its own: blocks stay alike, so that one is compiled for all.
        if type(module) is nn.RMSNorm:
            module.__class__ = _RMSNorm
        elif type(module) is nn.LayerNorm and module.elementwise_affine:
            module.__class__ = _LayerNorm


class _RMSNorm(nn.RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, scale, self.eps)


class _LayerNorm(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.normalized_shape, _float32(self.weight), _float32(self.bias), self.eps)


def _in_float32(forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    with torch.autocast(inputs[0].device.type, enabled=False):
        return forward(
            *(_float32(value) for value in inputs), **{name: _float32(value) for name, value in named.items()}
        )


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
