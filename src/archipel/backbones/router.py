"""The router's network: a much smaller ``FluxTransformer2DModel`` that says which cluster a noisy clip is from.

Single-stream blocks over video tokens only; the pooled text enters beside the time embedding; logits are the mean over
tokens of K outputs. Source: Paris 2.0 (arXiv 2605.26064), whose router reads x_t, t and the pooled text vector;
Decentralized Diffusion Models (arXiv 2501.05450), section 3: its cross-entropy optimum is p(k | x_t, t, c).
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from archipel.backbones import base, flux_blocks, networks, norms, registry
from archipel.backbones.flux import FluxDenoiser, pack, text_ids, video_ids
from archipel.config import Reads, RunConfig
from archipel.contracts import Conditioning
from archipel.errors import DamagedError
from archipel.flow import draws


@lru_cache(maxsize=16)
def _pure_noise(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The noise (1, C, T, H, W) that stands in for every clip where the router reads the caption only."""
    return torch.from_numpy(draws.normals(0, [0], shape, purpose=draws.ROUTE)).to(device)


class FluxRouter(base.Backbone):
    """``router(x, t, cond) -> logits``. ``facts``: {"role": "router", "experts": K, "latent_shape", "text_shape"}, and where
    they are so "reads", {"patch": p} and {"image": True} (as in ``base.Denoiser``).

    ``reads``, in training as in use: "latent": every caption is taken as the null text; "text": every clip is taken as one
    fixed noise at t = 1, where p(k | x_t, t, c) is p(k | c). Given frames are read in both.
    """

    def __init__(self, network: nn.Module, facts: dict[str, Any]) -> None:
        super().__init__()
        self.network, self.facts, self.experts = network, dict(facts), int(facts["experts"])
        self.reads, self.patch = str(facts.get("reads", "both")), int(facts.get("patch", 1))
        self.image = bool(facts.get("image", False))
        flux_blocks.quicken(network)
        norms.quicken(network)

    def ends(self) -> list[nn.Module]:
        return base.flux_ends(self.network)

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """x (B, C, T, H, W), t (B,) in [0, 1] with 1 = noise; of ``cond`` only ``pooled`` (B, P), and ``image`` where it
        reads given frames -> logits (B, K)."""
        B, _, T, H, W = x.shape
        pooled = cond.pooled
        if self.reads == "latent":
            pooled = torch.zeros_like(pooled)
        elif self.reads == "text":
            x, t = _pure_noise(tuple(x.shape[1:]), x.device).to(x.dtype).expand_as(x), torch.ones_like(t)
        (output,) = self.network(
            hidden_states=pack(base.joined(x, cond) if self.image else x, self.patch),
            encoder_hidden_states=cond.tokens.new_zeros(B, 0, cond.tokens.shape[-1]),
            pooled_projections=pooled,
            timestep=t,
            img_ids=video_ids(T, H // self.patch, W // self.patch, x.device),
            txt_ids=text_ids(0, x.device),
            guidance=None,
            return_dict=False,
        )
        logits: Tensor = output.mean(dim=1)
        return logits


def build_router(config: RunConfig, *, seed: int) -> FluxRouter:
    """A fresh router on the CPU: a function of the configuration and ``seed``; its posterior is uniform."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU one only
        network = registry.build_network(networks.router_network(config))
        base.zero_start(network)
    return FluxRouter(network, networks.router_facts(config))


def load_router_network(folder: Path) -> FluxRouter:
    """A trained router on the CPU, in eval mode. Raises MissingStageError, DamagedError."""
    facts, config, tensors = base.read_folder(folder, "train RUN router")
    if config.get("_class_name") != FluxDenoiser.CLASS:
        raise DamagedError(
            f"{folder / base.CONFIG}: _class_name is {config.get('_class_name')!r}, not {FluxDenoiser.CLASS}"
        )
    network = registry.build_network(config, tensors, folder / base.CONFIG, folder / base.WEIGHTS)
    known = facts.get("role") == "router" and facts.get("reads", "both") in get_args(Reads)
    if not known or facts.get("experts") != config.get("out_channels"):
        raise DamagedError(f"{folder / 'card.json'}: network = {facts!r} does not describe this router")
    return FluxRouter(network, facts).eval()
