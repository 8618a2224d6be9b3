"""The calibrated router: a ``Posterior`` made of a network that gives logits and temperatures by time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from archipel import store
from archipel.contracts import Conditioning
from archipel.errors import DamagedError, MissingStageError
from archipel.routing.calibration import Calibration, identity
from archipel.run import ROUTER, Run

Logits = Callable[[Tensor, Tensor, Conditioning], Tensor]
CALIBRATION = "calibration.json"
QUALITY = "quality.json"


class CalibratedRouter:
    """``router(x, t, cond) -> p`` (B, K), rows summing to 1: p(k | x_t, t, c). A ``Posterior``.

    ``router.logits(x, t, cond)`` are the network's own, before calibration; ``router.log_posterior`` is log p in
    float64. A row counts as without caption where no text token is real (``cond.mask`` all False), as in the null
    condition. A network with ``reads`` "latent" answers alike whatever the caption, one with "text" whatever x and t are,
    calibrated or not. No gradients; x may be on any device that the network is on. ``fitted``: whether the temperatures were
    fitted to this network; else they are 1.
    """

    def __init__(self, network: Logits, calibration: Calibration, fitted: bool = True) -> None:
        self.network, self.calibration, self.fitted = network, calibration, fitted

    @property
    def experts(self) -> int:
        return len(self.calibration.prior)

    def to(self, device: torch.device | str) -> CalibratedRouter:
        if isinstance(self.network, torch.nn.Module):
            self.network.to(device)
        return self

    @torch.no_grad()
    def logits(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """(B, K), as the network gives them."""
        return self.network(x, t, cond)

    @torch.no_grad()
    def log_posterior(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Calibrated log p(k | x_t, t, c), (B, K) float64, on x's device."""
        logits = self.logits(x, t, cond).double()
        null, times = ~cond.mask.any(1), t.detach().double().expand(len(x)).cpu().numpy()
        # What the network does not look at must not come back in through the temperature.
        reads = getattr(self.network, "reads", "both")
        null = null & (reads != "latent")
        times = np.ones_like(times) if reads == "text" else times
        temperature = torch.from_numpy(self.calibration.at(times, null.cpu().numpy())).to(logits.device)
        log_prior = torch.from_numpy(np.log(self.calibration.prior)).to(logits.device)
        return (log_prior + (logits - log_prior) / temperature[:, None]).log_softmax(1)

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return self.log_posterior(x, t, cond).exp().to(x.dtype)


def model_hash(folder: Path) -> str:
    """sha256 of the router's weights as its card states it: what ties a calibration to a training."""
    card = store.read_card(folder)
    if card is None:
        raise MissingStageError(f"{folder} is not trained: run `archipel train RUN router` first")
    try:
        return str(card["files"]["model.safetensors"]["sha256"])
    except (KeyError, TypeError) as error:
        raise DamagedError(
            f"{folder / 'card.json'} does not list model.safetensors; remove it and train again"
        ) from error


def seal(value: dict[str, Any]) -> dict[str, Any]:
    """``value`` with the sha256 of its own canonical JSON, so that a damaged calibration is noticed."""
    return {**value, "sha256": store.sha256_json(value)}


def read_calibration(run: Run, folder: Path | None = None) -> Calibration | None:
    """The calibration of the router as it is now, or None where there is none or it belongs to another training.

    ``folder``: where the router lies, if not in the run's own place.
    """
    folder = folder or run.expert(ROUTER)
    path = folder / CALIBRATION
    if not path.exists():
        return None
    value = store.read_json(path)
    if not isinstance(value, dict):
        raise DamagedError(f"{path} is not a calibration: run `archipel route {run.root}` to make it anew")
    if value.get("run") != run.id or value.get("model_sha256") != model_hash(folder):
        return None
    if seal({key: part for key, part in value.items() if key != "sha256"})["sha256"] != value.get("sha256"):
        raise DamagedError(f"{path} is damaged: its sha256 is not its content's; run `archipel route` to make it anew")
    found = Calibration.from_json(value, str(path))
    if len(found.prior) != run.config.partition.k:
        raise DamagedError(
            f"{path} is for {len(found.prior)} experts, the run has {run.config.partition.k}: route again"
        )
    return found


def load_router(run: Run, folder: Path | None = None, *, uncalibrated: bool = False) -> CalibratedRouter:
    """The run's router, on the CPU; ``folder`` as in ``read_calibration``.

    With ``uncalibrated`` one without a calibration answers as its network does (temperature 1). Raises
    MissingStageError where it is not trained or (for these weights) not calibrated, DamagedError where a file is not
    what its card says, or where the files were replaced while they were read.
    """
    from archipel.backbones.router import load_router_network

    folder = folder or run.expert(ROUTER)
    run.need(folder, "route")
    before = model_hash(folder)
    calibration = read_calibration(run, folder)
    if calibration is None and not uncalibrated:
        raise MissingStageError(f"{folder} is not calibrated: run `archipel route {run.root}` first")
    k = run.config.partition.k
    plain = identity(np.full(k, 1 / k))  # at temperature 1 the prior cancels
    network = load_router_network(folder)
    if model_hash(folder) != before:
        raise DamagedError(f"{folder} was replaced while it was read: try again")
    if network.experts != k:
        raise DamagedError(f"{folder} routes to {network.experts} experts, the run has {k}")
    if network.reads != run.config.router.reads:
        raise DamagedError(f"{folder} reads {network.reads}, run.toml has router.reads = {run.config.router.reads!r}")
    if getattr(network, "image", False) != run.config.router.reads_image:
        raise DamagedError(
            f"{folder} {'reads' if getattr(network, 'image', False) else 'does not read'} given frames, run.toml has "
            f"router.reads_image = {str(run.config.router.reads_image).lower()}"
        )
    return CalibratedRouter(network, calibration or plain, fitted=calibration is not None)
