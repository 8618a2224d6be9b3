"""What every backbone shares: the velocity contract around a diffusers transformer, and its files.

A folder holds ``config.json`` (read by diffusers' own ``from_config``) and ``model.safetensors`` (diffusers' own key
names); what diffusers has no word for (prediction, latent and text shapes, role) is ``network`` in ``card.json``.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from archipel import store
from archipel.contracts import Conditioning
from archipel.errors import DamagedError, MissingStageError
from archipel.flow.convert import velocity_from_x0

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
_READS = 5
_MAX_LAYERS = 1000  # a stranger's config.json must not make us build forever


class Backbone(nn.Module, ABC):
    """A diffusers transformer with what the rest of Archipel has to know about it.

    ``network``: the diffusers model; ``facts``: JSON-able extras for the card (role, latent_shape, ...).
    """

    network: nn.Module
    facts: dict[str, Any]

    def blocks(self) -> list[nn.Module]:
        """The network's repeated blocks, in order: what is held, gathered and let go together where it is sharded."""
        names = set(getattr(self.network, "_no_split_modules", None) or ())  # diffusers' own list of class names
        return [module for module in self.network.modules() if type(module).__name__ in names]

    @abstractmethod
    def ends(self) -> list[nn.Module]:
        """What embeds inputs and times, and the last projection: computed in float32 whatever the blocks are."""

    @property
    def parameters_total(self) -> int:
        return sum(p.numel() for p in self.parameters())


class Denoiser(Backbone, ABC):
    """A network that denoises; itself a ``Velocity``: ``denoiser(x, t, cond)`` is ``denoiser.velocity(x, t, cond)``."""

    prediction: str  # "velocity" or "x0": what ``predict`` returns
    clusters: int = 0  # K where ``cond.pooled`` has the clip's cluster behind the text (see ``flux.add_cluster``)

    @abstractmethod
    def predict(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The raw network: x (B, C, T, H, W), t (B,) in [0, 1] with 1 = noise -> like x. Losses are taken on it."""

    def velocity(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The contract: the prediction as dx/dt. A prediction of x0 becomes v = (x_t - x0_hat) / t (method.md 8.9)."""
        output = self.predict(x, t, cond)
        return output if self.prediction == "velocity" else velocity_from_x0(x, output, t)

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return self.velocity(x, t, cond)


def flux_ends(network: Any) -> list[nn.Module]:
    """``Backbone.ends`` of a ``FluxTransformer2DModel``. Its residual stream has the dtype that ``x_embedder`` gives."""
    return [network.x_embedder, network.context_embedder, network.time_text_embed, network.proj_out]


def zero_modulation(network: nn.Module) -> None:
    """Zero the output projection and every modulation, so that each block starts as the identity and the output as 0.

    As in adaLN-Zero (Peebles and Xie, arXiv 2212.09748, section 3.2); diffusers leaves them at random.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and (name == "proj_out" or (name.endswith(".linear") and "norm" in name)):
            nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def save(backbone: Backbone, folder: Path, state: Mapping[str, np.ndarray] | None = None) -> tuple[str, str]:
    """Write weights and configuration; the caller's card, written last, lists the two names returned.

    The card must carry ``network=backbone.facts``, which ``load`` needs. ``state``: the weights of a network that is not
    whole in this process, by its own names.
    """
    if state is None:
        state = {name: value.detach().cpu().numpy() for name, value in backbone.network.state_dict().items()}
    store.write_tensors(folder / WEIGHTS, state, metadata={"format": "pt"})
    store.write_json(folder / CONFIG, diffusers_config(backbone.network))
    return WEIGHTS, CONFIG


def diffusers_config(network: Any) -> dict[str, Any]:
    """What diffusers' ``from_config`` reads, as plain JSON values."""
    import diffusers

    plain = {key: list(v) if isinstance(v, tuple) else v for key, v in network.config.items() if key[0] != "_"}
    # Sharding puts a class of torch's own before diffusers'.
    kind = next((one for one in type(network).__mro__ if one.__module__.startswith("diffusers.")), type(network))
    return {"_class_name": kind.__name__, "_diffusers_version": diffusers.__version__, **plain}


def read_folder(folder: Path, stage: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """A trained network's facts, configuration and tensors (in memory), each held to the card's checksums.

    They are of one version, also where another process is replacing it: if a file changed while it was read, all is
    read again. Raises MissingStageError where there is no card, DamagedError where a file is not what the card says.
    """
    for _ in range(_READS):
        before = _stamps(folder)
        try:
            found = _read_folder(folder, stage)
        except (DamagedError, FileNotFoundError):
            if _stamps(folder) == before:
                raise
        else:
            if _stamps(folder) == before:
                return found
        time.sleep(0.2)  # whoever replaces it writes weights, configuration and card in turn
    raise DamagedError(f"{folder} is being replaced by another process: try again when it has finished")


def _stamps(folder: Path) -> list[tuple[int, int, int] | None]:
    """Inode, size and time of change of the files that must belong together; None for one that is not there."""
    stamps: list[tuple[int, int, int] | None] = []
    for name in ("card.json", CONFIG, WEIGHTS):
        try:
            stat = (folder / name).stat()
            stamps.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
        except FileNotFoundError:
            stamps.append(None)
    return stamps


def _read_folder(folder: Path, stage: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    card = store.read_card(folder)
    if card is None:
        raise MissingStageError(f"{folder} is not trained yet: run `archipel {stage}` first")
    problems = [p for p in store.check_card(folder) if p.path.name in (CONFIG, WEIGHTS)]
    if problems:
        raise DamagedError(f"{problems[0].path} {problems[0].reason}: restore it, or remove the card and train again")
    facts, config = card.get("network"), store.read_json(folder / CONFIG)
    if not isinstance(facts, dict) or not isinstance(config, dict):
        raise DamagedError(f"{folder}: card.json has no 'network', or {CONFIG} is not an object")
    mapped = store.map_tensors(folder / WEIGHTS)
    return facts, config, {name: torch.tensor(array) for name, array in mapped.items()}


def build_flux(config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> nn.Module:
    """The ``FluxTransformer2DModel`` of a configuration, filled with ``tensors``.

    It is built without memory and compared with the tensors by name and shape first: a configuration that does not
    fit its weights, a stranger's one of absurd size included, raises DamagedError before anything is allocated.
    """
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    if config.get("_class_name") != "FluxTransformer2DModel":
        raise DamagedError(
            f"{folder / CONFIG}: _class_name is {config.get('_class_name')!r}, not FluxTransformer2DModel"
        )
    for key in ("num_layers", "num_single_layers"):
        count = config.get(key, 0)
        if not isinstance(count, int) or not 0 <= count <= _MAX_LAYERS:
            raise DamagedError(f"{folder / CONFIG}: {key} is {count!r}, expected 0 to {_MAX_LAYERS}")
    known = {key: value for key, value in config.items() if not key.startswith("_")}
    try:
        with torch.device("meta"):
            network: nn.Module = FluxTransformer2DModel(**known)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DamagedError(f"{folder / CONFIG} does not describe a FluxTransformer2DModel ({error})") from error
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if wanted != found:
        odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise DamagedError(
            f"{folder / WEIGHTS} does not fit {CONFIG}: {len(odd)} tensors differ, first {odd[0]!r}: "
            f"the configuration wants {wanted.get(odd[0])}, the file has {found.get(odd[0])}"
        )
    network.load_state_dict(tensors, assign=True)
    return network.requires_grad_(False).eval()
