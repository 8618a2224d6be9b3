"""AdamW whose two moments are kept in 8 bits: codes of a dynamic data type with a scale for each 256 values.

Dettmers et al., 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861), as torchao implements it. Tensors below
4096 values, or whose size 256 does not divide, keep float32 moments. Checkpoints hold what the codes stand for as
float32, so that they open with and without this switch, and the codes are found again from that, bit for bit.
"""

from __future__ import annotations

import functools
import logging
import warnings
from typing import Any

import torch
from torch import Tensor

from archipel.errors import ArchipelError

_NEARBY = (-2, -1, 1, 2)  # units in the last place: a product's factor is found again within one


def adamw8bit(
    groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], device: str
) -> torch.optim.Optimizer:
    """AdamW over parameter groups. Raises ArchipelError where torchao is not installed."""
    made: torch.optim.Optimizer = _optimizer_class(device != "cpu")(groups, lr=lr, betas=betas)
    return made


@functools.cache
def _optimizer_class(compiled: bool) -> Any:
    loud = logging.getLogger("torchao")
    before = loud.level
    try:
        loud.setLevel(logging.ERROR)  # it tells of kernels for GPUs that are not here
        with warnings.catch_warnings(action="ignore"):
            from torchao.optim import AdamW8bit
    except ImportError as error:
        raise ArchipelError(
            "--optimizer adamw8bit needs torchao, which is not installed: pip install 'archipel[large]', or use adamw"
        ) from error
    finally:
        loud.setLevel(before)
    if compiled:
        return AdamW8bit

    class Eager(AdamW8bit):  # type: ignore[misc]
        """Without torch.compile, which torchao calls for every shape of parameter: seconds each on a CPU, for little."""

        def step(self, closure: Any = None) -> Any:
            with torch.compiler.set_stance("force_eager"):
                return super().step(closure)

    return Eager


def plain(moment: Tensor) -> Tensor:
    """What a moment stands for, in float32; of a sharded one, this process's part. Others are given back as they are."""
    own = _own(moment)
    return own.dequantize() if hasattr(own, "codes") else moment


def _own(tensor: Any) -> Any:
    """This process's part of a sharded tensor (a DTensor), or the whole one."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@torch.no_grad()
def kept(optimizer: Any, p: Tensor, values: Tensor, *, signed: bool) -> Tensor:
    """A moment as ``optimizer`` keeps it for a parameter ``p``, standing for ``values`` (float32, spread as ``p`` is).

    Values that codes stood for are stood for again bit for bit; others are rounded to the nearest codes.
    """
    if type(optimizer) is torch.optim.AdamW:
        return values
    made: Tensor = optimizer._new_buffer(p, signed)
    made.copy_(values)
    if hasattr(_own(made), "codes"):
        _find_scales(_own(made), _own(values))
    return made


def _find_scales(state: Any, values: Tensor) -> None:
    """Let ``state`` stand for ``values`` in the blocks where some scale does so exactly.

    Quantizing takes a block's largest magnitude for its scale. The map of signed codes ends at 1 and at -0.993, so in a
    block whose largest magnitude is negative the scale that was used is that magnitude over 0.993, give or take a
    rounding: it is tried with its neighbours.
    """
    from torchao.optim.quant_utils import quantize_8bit_with_qmap

    lowest = float(state.qmap[0])
    if lowest >= 0:
        return
    blocks = values.reshape(-1, state.block_size)
    codes, scale = state.codes.view(blocks.shape), state.scale
    guess = torch.maximum(blocks.amax(1), blocks.amin(1) / lowest).clip(1e-12)
    for shift in (0, *_NEARBY):
        odd = (state.qmap[codes.int()] * scale[:, None] != blocks).any(1)
        if not bool(odd.any()):
            return
        near = (guess[odd].view(torch.int32) + shift).view(torch.float32)  # neighbours of a positive float
        found = quantize_8bit_with_qmap(blocks[odd] / near[:, None], state.qmap)
        exact = (state.qmap[found.int()] * near[:, None] == blocks[odd]).all(1)
        places = odd.nonzero()[:, 0][exact]
        codes[places], scale[places] = found[exact], near[exact]
