"""The packaged codecs as a model of diffusers: saved, loaded, moved and offloaded like any autoencoder of a pipeline."""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from archipel.encoders.codecs import Patch, PatchPCA, Pixels

# diffusers has no types for these; it looks for the name ModelMixin in this module.
_Model: Any = ModelMixin


class BlockCodec(_Model, ConfigMixin):  # type: ignore[misc]
    """``PatchPCA`` or ``Pixels`` (see ``archipel.encoders.codecs``), whose arrays are the parameters.

    ``encode`` and ``decode``: clips (B, 3, F, H, W) in [-1, 1] <-> latents (B, C, T, H, W), in float32 always: principal
    components rounded to 16 bits would cost more than the codec does.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        kind: str = "patch-pca",
        patch: tuple[int, int, int] = (4, 8, 8),
        channels: int = 96,
        gamma: float = 0.5,
        latent_scale: float = 1.0,
        explained_variance: float = 1.0,
    ) -> None:
        super().__init__()
        if kind not in (PatchPCA.name, Pixels.name):
            raise ValueError(f"kind is {kind!r}, not {PatchPCA.name} or {Pixels.name}")
        pt, ph, pw = patch
        pca, block = kind == PatchPCA.name, 3 * pt * ph * pw
        shapes: dict[str, tuple[int, ...]] = (
            {"mean": (block,), "basis": (channels, block), "sigma": (channels,)}
            if pca
            else {"mean": (1,), "scale": (1,)}
        )
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape), requires_grad=False))

    @classmethod
    def of(cls, codec: PatchPCA | Pixels) -> BlockCodec:
        """The same codec as a model; the arrays are copied."""
        more = (
            {"gamma": codec.gamma, "latent_scale": codec.scale, "explained_variance": codec.explained}
            if isinstance(codec, PatchPCA)
            else {}
        )
        made: BlockCodec = cls(kind=codec.name, patch=codec.patch, channels=codec.channels, **more)
        made.load_state_dict({name: torch.tensor(value) for name, value in codec.tensors().items()})
        made.eval()
        return made

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> BlockCodec:
        """As any model of diffusers, but for the dtype, which stays float32."""
        for key in ("torch_dtype", "dtype"):
            kwargs.pop(key, None)
        return cast(BlockCodec, super().from_pretrained(*args, **kwargs))

    def to(self, *args: Any, **kwargs: Any) -> BlockCodec:
        """To a device; a dtype is not taken, see the class."""
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        return self if device is None else cast(BlockCodec, super().to(device))

    @property
    def codec(self) -> PatchPCA | Pixels:
        """The codec over this model's parameters, wherever they are now."""
        config: Any = self.config
        pt, ph, pw = (int(part) for part in config.patch)
        patch: Patch = (pt, ph, pw)
        if config.kind == Pixels.name:
            return Pixels(patch, float(self._array("mean")), float(self._array("scale")))
        return PatchPCA(
            patch,
            float(config.gamma),
            self._array("mean"),
            self._array("basis"),
            self._array("sigma"),
            float(config.latent_scale),
            float(config.explained_variance),
        )

    def _array(self, name: str) -> Tensor:
        return cast(Tensor, self.get_parameter(name)).detach().float()

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def encode(self, clips: Tensor) -> Tensor:
        """(B, 3, F, H, W) in [-1, 1] -> (B, C, T, H, W) float32."""
        return self.codec.encode(clips.float())

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, 3, F, H, W) float32, clamped to [-1, 1]."""
        return self.codec.decode(latents.float())
