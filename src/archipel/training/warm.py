"""A shared start: experts and monolith begin with the weights of one short training on all clips, the trunk.

It is trained at home, before all jobs, and its weights travel in the shards: an island needs nothing else. Decentralized
Diffusion Models (arXiv 2501.05450) train from scratch; a shared start is communication between experts, if only once, and
so it is a setting of its own, whose FLOPs are counted once in each side of a comparison.
"""

from __future__ import annotations

import torch

from archipel import run, store
from archipel.backbones import base
from archipel.config import RunConfig
from archipel.errors import DamagedError, MissingStageError
from archipel.partition.shards import INIT
from archipel.run import ROUTER, TRUNK
from archipel.training.batches import Shard


def starts_warm(config: RunConfig, name: str) -> bool:
    """Whether a job begins with the trunk's weights that its shard carries. Adapters over the trunk have it as ``base/``."""
    return run.starts_warm(config) and name not in (TRUNK, ROUTER)


@torch.no_grad()
def load_start(model: base.Denoiser, shard: Shard) -> None:
    """Put the weights that a shard carries into a fresh network; one that is told the cluster ignores it at first.

    Raises MissingStageError where the shard carries none, DamagedError where they are of another network.
    """
    path = shard.train.path.with_name(INIT)
    if shard.start is None or not path.is_file():
        raise MissingStageError(
            f"{path.parent} does not carry the shared start that expert.warm_start = 'trunk' asks for: run "
            "`archipel train RUN trunk` first, which puts it into the shards"
        )
    found = {name: torch.tensor(array) for name, array in store.map_tensors(path).items()}
    wanted = model.network.state_dict()
    if model.clusters and model.POOLED in found:
        found = base.widened(found, model.POOLED, wanted[model.POOLED].shape[1])
    shapes = [{name: tuple(value.shape) for name, value in part.items()} for part in (wanted, found)]
    if shapes[0] != shapes[1]:
        odd = sorted(name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name))
        raise DamagedError(
            f"{path} is not of this run's network: {odd[0]} is {shapes[1].get(odd[0])}, expected {shapes[0].get(odd[0])}; "
            "train the trunk again"
        )
    model.network.load_state_dict(found)
