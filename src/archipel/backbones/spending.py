"""What a job's network costs per clip, adapters over frozen weights included (no torch: `init` and admission need it)."""

from __future__ import annotations

from archipel.backbones import adapters, flops, networks
from archipel.config import RunConfig
from archipel.run import MONOLITH, ROUTER, TRUNK


def adapter_of(config: RunConfig, name: str) -> adapters.Adapter | None:
    """The adapter that a job trains, or None where it trains a whole network (the router and the trunk always do)."""
    return None if name in (ROUTER, TRUNK) else adapters.adapter_of(config)


def forward_flops(config: RunConfig, name: str) -> int:
    """Forward FLOPs per clip of a job's network, its adapter's included."""
    if name == ROUTER:
        return flops.router_forward_flops(config)
    whole = flops.monolith_forward_flops(config) if name == MONOLITH else flops.expert_forward_flops(config)
    return whole + _adapters(config, name)


def _adapters(config: RunConfig, name: str) -> int:
    adapter = adapter_of(config, name)
    if adapter is None:
        return 0
    network, (_, T, H, W) = networks.expert_network(config), flops.latent_shape(config)
    pt, ph, pw = networks.patch(network, config.expert.patch)
    tokens = (T // pt) * (H // ph) * (W // pw)
    return adapters.forward_flops(network, tokens, flops.text_shape(config)[0], adapter)


def training_flops(config: RunConfig, name: str, steps: int, batch: int) -> int:
    """FLOPs of ``steps`` optimizer steps of ``batch`` clips of a job: three forwards each; of what is frozen under an adapter
    two (see ``adapters.frozen_training_flops``)."""
    if adapter_of(config, name) is None:
        return flops.training_flops(forward_flops(config, name), steps, batch)
    network, (C, T, H, W), (L, D, P) = (
        networks.expert_network(config),
        flops.latent_shape(config),
        flops.text_shape(config),
    )
    once, twice, four = (flops.forward_flops(network, (C, times * T, H, W), (times * L, D, P)) for times in (1, 2, 4))
    frozen = adapters.frozen_training_flops(once, twice, four)
    return (frozen + flops.TRAINING * _adapters(config, name)) * steps * batch
