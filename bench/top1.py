"""Generation with top-1 routing over K experts against the monolith, which is one network of the same shape.

    python -m bench.top1 [--small] [--out FILE]

Networks have the demo's sizes and random weights; the experts are copies of the monolith, in memory of their own, so
that both must give the same clips to rounding, which is shown first. The router is computed in full at every step;
then its answer is replaced so that the clips of a batch are dealt evenly among the experts: the worst case for
grouping, since every expert is called at every step, on a third of the batch.

The aim is 1.05 plus the router's share, which is timed on its own in the same rounds.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from archipel import config, presets
from archipel.backbones import flops
from archipel.backbones.base import Denoiser
from archipel.backbones.registry import build_expert
from archipel.backbones.router import build_router
from archipel.contracts import Conditioning, Velocity
from archipel.ensemble.strategies import Mixture, Routed, one_each, top_k
from archipel.flow import draws, samplers
from archipel.routing.calibration import Calibration
from archipel.routing.router import CalibratedRouter
from bench import common

OVERHEAD = 1.05
TOLERANCE = 1e-4  # relative to the latents' size


def shake(network: nn.Module, seed: int) -> None:
    """Move it away from the initial zeros, where an output says nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    network.eval().requires_grad_(False)


class Dealt:
    """A router that is asked and then overruled: clip i goes to expert i mod K."""

    def __init__(self, router: CalibratedRouter) -> None:
        self.router = router

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        p = self.router(x, t, cond)
        chosen = torch.arange(len(p), device=p.device) % p.shape[1]
        return (p + 2 * nn.functional.one_hot(chosen, p.shape[1])) / 3


def networks(settings: config.RunConfig) -> tuple[Denoiser, CalibratedRouter]:
    """A monolith with random weights, and a router that is calibrated with temperature 1."""
    k = settings.partition.k
    monolith, network = build_expert(settings, seed=0), build_router(settings, seed=1)
    shake(monolith, 2)
    shake(network, 3)
    flat = Calibration(np.ones((2, 8)), np.linspace(0, 1, 8), np.full(k, 1 / k))
    return monolith, CalibratedRouter(network, flat)


def inputs(settings: config.RunConfig, batch: int) -> tuple[Tensor, Conditioning]:
    """Noise and captions of a batch."""
    arrays = common.clip_arrays(settings, batch)
    text = [torch.from_numpy(arrays[name]) for name in ("tokens", "mask", "pooled")]
    return torch.from_numpy(draws.clip_noise(range(batch), flops.latent_shape(settings))), Conditioning(*text)


def run(small: bool = False) -> dict[str, Any]:
    smaller = {"expert": {"width": 64, "heads": 2}} if small else {}
    settings = config.build(config.merge(presets.values("demo"), smaller))
    # Short turns: what else runs on the machine is then about the same for neighbours.
    batch, steps, rounds = (4, 2, 2) if small else (16, 2, 60)
    k, scale = settings.partition.k, settings.sample.guidance
    monolith, router = networks(settings)
    experts: list[Velocity] = [copy.deepcopy(monolith) for _ in range(k)]
    noise, cond = inputs(settings, batch)
    arms = {
        "monolith": Mixture([monolith], one_each([0] * batch, 1), scale),
        "top1": Mixture(experts, Routed(Dealt(router), top_k(1)), scale),
        "dealt": Mixture(experts, one_each([i % k for i in range(batch)], k), scale),
    }

    def generate(arm: str) -> Tensor:
        return samplers.sample(arms[arm], noise, cond, steps=steps)

    def route() -> None:
        for _ in range(steps):
            router(noise, torch.full((batch,), 0.5), cond)

    sizes = "small sizes" if small else "the demo's sizes"
    what = f"{steps} Euler steps with guidance {scale:g}, batch {batch}, K = {k}, {sizes}"
    with common.Benchmark("top1", what, ("torch", "diffusers")) as b:
        wanted = generate("monolith")
        for arm in ("top1", "dealt"):
            apart = float((generate(arm) - wanted).abs().max() / wanted.abs().max())
            b.facts[f"{arm} apart from the monolith, relative"] = apart
            if apart > TOLERANCE:
                raise common.DifferentError(f"{arm} differs from the monolith by {apart:.1e}")
        taken = common.interleave({**{arm: partial(generate, arm) for arm in arms}, "router": route}, rounds)
        alone = common.versus("the router alone", "monolith", taken["router"], taken["monolith"])
        share = alone["cpu"]["median"]  # of CPU time: on one quiet thread the same as of wall time
        per_step = flops.expert_forward_flops(settings) * (1 if scale in (0, 1) else 2)
        b.facts |= {
            "router's share of the monolith's time": share,
            "router's share of the monolith's FLOPs": round(flops.router_forward_flops(settings) / per_step, 4),
            "parameters of an expert": monolith.parameters_total,
        }
        for case, arm, aim in (
            ("top-1, every expert called", "top1", round(OVERHEAD + share, 4)),
            ("the same without the router", "dealt", OVERHEAD),
        ):
            b.rows.append(common.versus(case, "monolith", taken[arm], taken["monolith"], aim))
        b.rows.append(alone)
    return b.record


if __name__ == "__main__":
    common.main(__doc__, run)
