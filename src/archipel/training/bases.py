"""``RUN/base``: weights that every expert begins with or is an adapter of, taken into the run once.

They come from outside (``expert.weights``, by *prepare*) or are the finished trunk (adapters over a shared start). The folder
has ``config.json``, ``model.safetensors`` and a card of kind "base": "sha256" of the weights, and for the trunk "start":
{"sha256", "flops", "steps"}. A bucket has it once, an island fetches it once, and whoever reads it holds it to its card.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from archipel import store
from archipel.backbones import base, lora, networks, registry
from archipel.backbones.adapters import adapter_of
from archipel.config import RunConfig
from archipel.encoders import outside
from archipel.errors import DamagedError, MissingStageError
from archipel.run import ROUTER, TRUNK, Run, begins_with_base

KIND = "base"


# --- making it ---------------------------------------------------------------------------------------------------------


def take(run: Run) -> None:
    """Bring ``expert.weights`` into the run, where it asks for them and they are not there. Raises ArchipelError as
    ``outside.take`` does, DamagedError for weights that are not of the run's network."""
    source = run.config.expert.weights
    if not source or run.done(run.base):
        return
    what = "expert.weights"
    (run.base / "card.json").unlink(missing_ok=True)
    files = outside.take(source, ("transformer",), run.base, what, sha256=run.config.expert.weights_sha256)
    _network(run.config, run.base, image=False)  # so that what does not fit is said now and not on an island
    sha256 = store.sha256_file(run.base / base.WEIGHTS)
    store.write_card(run.base, KIND, run.id, files, sha256=sha256)


def from_trunk(run: Run) -> None:
    """The finished trunk as the base of adapters; nothing where it is that already, or the run has other experts."""
    if not run.config.expert.lora_rank or run.config.expert.warm_start != TRUNK:
        return
    run.need(run.expert(TRUNK), "train RUN trunk")
    card = store.read_card(run.expert(TRUNK)) or {}
    start = {key: card[key] for key in ("sha256", "flops", "steps")}
    known = store.read_card(run.base, KIND)
    if known is not None and run.done(run.base) and known.get("start") == start:
        return
    (run.base / "card.json").unlink(missing_ok=True)
    for name in (base.CONFIG, base.WEIGHTS):
        outside.bring([run.expert(TRUNK) / name], run.base / name)
    if store.sha256_file(run.base / base.WEIGHTS) != start["sha256"]:
        raise DamagedError(f"{run.expert(TRUNK)} is not what its card says: remove it and train the trunk again")
    store.write_card(run.base, KIND, run.id, [base.CONFIG, base.WEIGHTS], sha256=start["sha256"], start=start)


# --- reading it --------------------------------------------------------------------------------------------------------


def read_card(folder: Path) -> dict[str, Any]:
    """The card of a base. Raises MissingStageError where there is none, DamagedError."""
    card = store.read_card(folder, KIND)
    if card is None:
        raise MissingStageError(
            f"{folder} is not there: `archipel prepare RUN` brings expert.weights into the run, `archipel train RUN trunk` makes "
            "the base of adapters over a trunk"
        )
    return card


def load(config: RunConfig, folder: Path, *, clusters: int = 0) -> tuple[base.Denoiser, str]:
    """The base in ``folder`` as a denoiser of this run, frozen and in eval mode, and the sha256 of its weights.

    ``clusters``: K for a network that is told the cluster; what reads it, and what reads given frames where the weights know
    none, starts at zero. Raises MissingStageError, DamagedError where a file is not what the card says, or of another network.
    """
    card = read_card(folder)
    problems = store.check_card(folder)
    if problems:
        raise DamagedError(f"{problems[0].path} {problems[0].reason}: restore it, or remove {folder} and make it anew")
    return _network(config, folder, clusters=clusters), str(card["sha256"])


def _network(config: RunConfig, folder: Path, *, clusters: int = 0, image: bool | None = None) -> base.Denoiser:
    where, weights = folder / base.CONFIG, folder / base.WEIGHTS
    found, wanted = store.read_json(where), networks.expert_network(config, clusters=clusters, image=image)
    if not isinstance(found, dict) or found.get("_class_name") != wanted["_class_name"]:
        raise DamagedError(f"{where} is not of the run's backbone, {wanted['_class_name']}")
    kind = registry.adapter(wanted["_class_name"])
    _, tensors = kind.settle(found, _tensors(weights))
    tensors = registry.widened(tensors, networks.expert_network(config, image=False), wanted)
    network = registry.build_network(wanted, tensors, "run.toml", weights)
    return kind(network, networks.expert_facts(config, clusters)).eval()


def _tensors(path: Path) -> dict[str, Tensor]:
    """Float32 tensors, mapped into memory where the file has them so: processes on one machine share a frozen base."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return {name: value.to(torch.float32) for name, value in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise DamagedError(f"{path} cannot be read ({error}): remove its folder and make it anew") from error


# --- beginning with it -------------------------------------------------------------------------------------------------


def starts_from(config: RunConfig, name: str) -> bool:
    """Whether a job begins with (or trains an adapter of) what is in ``base/``."""
    return begins_with_base(config) and name not in (TRUNK, ROUTER)


def begin(config: RunConfig, folder: Path, seed: int, *, clusters: int = 0) -> base.Denoiser:
    """The network that a job trains, from the base in ``folder``: all of it, or a fresh adapter over it."""
    network, sha256 = load(config, folder, clusters=clusters)
    adapter = adapter_of(config)
    if adapter is None:
        # The optimizer writes into its weights, which must not be those of a file.
        for p in network.parameters():
            p.data = p.data.clone()
        return network.requires_grad_(True)
    lora.attach(network, adapter, sha256, seed)
    return network


def load_expert(config: RunConfig, folder: Path, base_folder: Path | None) -> base.Denoiser:
    """A trained expert or monolith of a run on the CPU, in eval mode: a whole network, or an adapter on a base of its own.

    Raises MissingStageError, DamagedError.
    """
    if adapter_of(config) is None:
        return registry.load_denoiser(folder)
    if base_folder is None:
        raise MissingStageError(f"{folder} is an adapter, and the base that it is one of is not at hand")
    network, sha256 = load(config, base_folder)
    return lora.load(folder, network, sha256)


def card_fields(folder: Path) -> dict[str, Any]:
    """What a job's card says of the base in ``folder``: the shared start's cost where it is the trunk, else its sha256."""
    card = read_card(folder)
    return {"warm_start": dict(card["start"])} if "start" in card else {"base": card["sha256"]}
