"""The networks that arrive as packages (``archipel.encoders.features``): one pass per network, the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from archipel.config import Evaluate
from archipel.encoders.features import extract
from archipel.encoders.weights import FEATURES_CODE, weights_hash
from archipel.evaluation.extractors.base import Measured, identity
from archipel.evaluation.inputs import LAYER, NETWORK


class Packaged:
    """``efficientnet-appearance``, ``efficientnet-motion``, ``transnet``, or some of them."""

    scalars: tuple[str, ...] = ()
    least_frames = 1
    needs_captions = False

    def __init__(self, names: Sequence[str], config: Evaluate) -> None:
        self.features = tuple(names)
        self._config = config
        self.identity: dict[str, dict[str, Any]] = {}
        for name in names:
            is_image = NETWORK[name] == "efficientnet"
            self.identity[name] = identity(
                weights=weights_hash(NETWORK[name]),
                layer=LAYER[name],
                resize=config.image_size if is_image else 27,
                frames=config.frames if is_image else 0,
                metric=f"FD-{name}",
                code=FEATURES_CODE,
            )

    def measure(self, clips: np.ndarray, captions: Sequence[str]) -> Measured:
        found = extract(self.features, clips, self._config)
        return Measured({name: values.numpy() for name, values in found.items()})
