"""What every backbone shares: the velocity contract around a diffusers transformer, and its files.

A folder holds ``config.json`` (read by diffusers' own ``from_config``) and ``model.safetensors`` (diffusers' own key
names); what diffusers has no word for (prediction, latent and text shapes, role) is ``network`` in ``card.json``.
"""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

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


class Backbone(nn.Module, ABC):
    """A diffusers transformer with what the rest of Archipel has to know about it.

    ``network``: the diffusers model; ``facts``: JSON-able extras for the card (role, latent_shape, ...).
    """

    network: Any  # diffusers' model
    facts: dict[str, Any]

    def blocks(self) -> list[nn.Module]:
        """The network's repeated blocks, in order: what is held, gathered and let go together where it is sharded."""
        lists = [child for child in self.network.children() if isinstance(child, nn.ModuleList)]
        return [block for child in lists for block in child]

    @abstractmethod
    def ends(self) -> list[nn.Module]:
        """What embeds inputs and times, and the last projection: computed in float32 whatever the blocks are."""

    @property
    def parameters_total(self) -> int:
        return sum(p.numel() for p in self.parameters())


class Denoiser(Backbone, ABC):
    """A network that denoises; itself a ``Velocity``: ``denoiser(x, t, cond)`` is ``denoiser.velocity(x, t, cond)``.

    An adapter gives ``CLASS``, ``INPUT``, ``output`` and ``ends``, and where it must ``POOLED``, ``ZEROED``, ``settle`` and
    ``PREDICTIONS``.
    ``facts``: {"role": "expert", "prediction", "latent_shape": [C, T, H, W], "text_shape": [L, D, P]}; and where they
    are so {"condition": "cluster", "clusters": K}, {"image": True} (the network reads C + 1 channels more, see
    ``joined``), {"patch": p} (positions per side in one token, where ``config.json`` has no word for it) and
    {"mask_text": False} (padding is attended to, as diffusers' own pipeline of this class does).
    """

    CLASS: ClassVar[str]  # diffusers' class
    INPUT: ClassVar[
        str
    ]  # the weight (D, C_in, ...) that latents enter by; a packed channel's positions lie side by side
    POOLED: ClassVar[str] = ""  # the weight (D, P) that the pooled vector enters by, where it does
    PREDICTIONS: ClassVar[tuple[str, ...]] = ("velocity", "x0")
    # Parameters (regular expression, from the start of the name) that are zero in fresh weights: see ``zero_start``.
    ZEROED: ClassVar[str] = r"proj_out\.|.*norm.*\.linear\."

    prediction: str  # what ``predict`` returns
    clusters: int  # K where ``cond.pooled`` has the clip's cluster behind the text (see ``cluster.add_cluster``)
    image: bool  # whether the network reads given frames behind the latents
    mask_text: bool  # whether padding of the text is masked

    def __init__(self, network: nn.Module, facts: dict[str, Any]) -> None:
        from archipel.backbones import norms  # diffusers takes seconds to import

        super().__init__()
        norms.quicken(network)
        self.network, self.facts = network, dict(facts)
        self.prediction, self.clusters = str(facts["prediction"]), int(facts.get("clusters", 0))
        self.image, self.mask_text = bool(facts.get("image", False)), bool(facts.get("mask_text", True))

    @classmethod
    def settle(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Configuration and tensors of released weights as this adapter uses them (parts that it has no use for left out)."""
        return config, tensors

    @abstractmethod
    def output(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The raw network, all that an adapter computes: x (B, C_in, T, H, W), t (B,) in [0, 1] with 1 = noise ->
        (B, C, T, H, W). C_in is C, or 2 C + 1 where ``image`` (given frames and their mask are already joined)."""

    def joined(self, x: Tensor, cond: Conditioning) -> Tensor:
        """What the network reads: x (B, C, T, H, W), and where ``image``, behind it ``cond.image`` or zeros."""
        return joined(x, cond) if self.image else x

    def predict(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The network's answer: x (B, C, T, H, W), t (B,) in [0, 1] with 1 = noise -> like x. Losses are taken on it."""
        return self.output(self.joined(x, cond), t, cond)

    def velocity(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The contract: the prediction as dx/dt. A prediction of x0 becomes v = (x_t - x0_hat) / t (method.md 8.9)."""
        output = self.predict(x, t, cond)
        return output if self.prediction == "velocity" else velocity_from_x0(x, output, t)

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return self.velocity(x, t, cond)


def joined(x: Tensor, cond: Conditioning) -> Tensor:
    """x (B, C, T, H, W) and behind it, on the channels, ``cond.image`` (B, C + 1, T, H, W) or zeros."""
    B, C, *space = x.shape
    given = x.new_zeros(B, C + 1, *space) if cond.image is None else cond.image.to(x)
    return torch.cat([x, given], dim=1)


def flux_ends(network: Any) -> list[nn.Module]:
    """``Backbone.ends`` of a ``FluxTransformer2DModel``. Its residual stream has the dtype that ``x_embedder`` gives."""
    return [network.x_embedder, network.context_embedder, network.time_text_embed, network.proj_out]


@torch.no_grad()
def zero_start(network: nn.Module, pattern: str = Denoiser.ZEROED) -> None:
    """Zero the output projection and every modulation, so that each block starts as the identity and the output as 0.

    As in adaLN-Zero (Peebles and Xie, arXiv 2212.09748, section 3.2); diffusers leaves them at random. ``pattern``: an
    adapter's ``ZEROED``, which also names what no gate holds back (the projection out of a cross-attention).
    """
    for name, parameter in network.named_parameters():
        if re.match(pattern, name):
            parameter.zero_()


def widened(state: Mapping[str, Tensor], name: str, inputs: int) -> dict[str, Tensor]:
    """Weights whose ``name`` (D, n, ...) reads ``inputs`` >= n channels, the last of which it ignores (zeros)."""
    weight = state[name]
    more = weight.new_zeros(weight.shape[0], max(0, inputs - weight.shape[1]), *weight.shape[2:])
    return {**state, name: torch.cat([weight, more], 1)}


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
    return facts, config, {name: in_float32(array) for name, array in mapped.items()}


def in_float32(array: np.ndarray) -> Tensor:
    """A copy in memory. What lies in half precision (see ``exchange.pack``) is computed with in float32."""
    return torch.tensor(array.astype(np.float32) if array.dtype == np.float16 else array)
