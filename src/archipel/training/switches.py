"""Switches that trade time for memory, or a wait at the start for speed: an island's own matter, as its precision is.

Gradient checkpointing (Chen et al., arXiv 1604.06174) keeps what enters a block and computes the block again on the way
back. Blocks alone are compiled, not the network around them: they are alike, so one of them is compiled for all.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from archipel.backbones.base import Backbone
from archipel.errors import ArchipelError
from archipel.training.ema import Ema, HostEma
from archipel.training.local import AVERAGES, OPTIMIZERS, Local

BACKEND = "inductor"  # what torch.compile ends in
_ADAMW, _ADAMW8BIT = OPTIMIZERS
_DEVICE, _HOST = AVERAGES


def apply(model: nn.Module, local: Local) -> None:
    """Checkpointing and compilation, as ``local`` asks, of a model that is on its device and sharded already.

    Raises TypeError for what is no Backbone, ArchipelError where this machine cannot compile.
    """
    if not (local.checkpointing or local.compile):
        return
    if not isinstance(model, Backbone):
        raise TypeError(f"only a Backbone has blocks to checkpoint or compile, not {type(model).__name__}")
    if local.checkpointing:
        model.network.enable_gradient_checkpointing()
    if local.compile:
        check_compiler(next(model.parameters()).device.type)
        for block in model.blocks():
            # Its forward and not the module: hooks that gather a sharded block's weights stay outside of what is compiled.
            block.forward = torch.compile(block.forward, backend=BACKEND)


def check_compiler(device: str) -> None:
    """Raises ArchipelError where torch.compile would find no compiler: Triton for a GPU, one for C++ on a CPU."""
    if BACKEND != "inductor":
        return
    if device == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise ArchipelError(
                "--compile needs Triton for this GPU, and there is none: install triton, or leave it off"
            )
    elif device == "cpu":
        from torch._inductor import config, exc
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            missing = shutil.which(get_cpp_compiler()) is None
        except exc.InvalidCxxCompiler:
            missing = True
        if missing:
            raise ArchipelError(
                f"--compile needs a C++ compiler on a CPU, and none of {', '.join(filter(None, config.cpp.cxx))} is there: "
                "install one (g++), or leave it off"
            )


def make_optimizer(
    groups: list[dict[str, Any]], kind: str, *, lr: float, betas: tuple[float, float], device: str
) -> torch.optim.Optimizer:
    """AdamW over parameter groups, with moments of 32 bits or of 8. Raises ArchipelError without torchao for those."""
    if kind == _ADAMW8BIT:
        from archipel.training import eight_bit

        return eight_bit.adamw8bit(groups, lr=lr, betas=betas, device=device)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the next step: a number, or, for optimizers that compile their step, a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def make_average(model: nn.Module, place: str, beta: float, mine: Callable[[Tensor], Tensor] | None) -> Ema:
    """The average of a model's trained weights on its device, or in the host's memory."""
    return (HostEma if place == _HOST else Ema)(model, beta, mine)
