"""The LAION aesthetic heads: what people liked, predicted from CLIP's normalised image embeddings (Schuhmann 2022)."""

from __future__ import annotations

import io
import itertools
import pickle
import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

from archipel import store
from archipel.errors import ArchipelError, DamagedError
from archipel.evaluation.extractors.files import find_file, require_hash
from archipel.evaluation.extractors.specs import Spec

# Places of the linear layers among the dropouts of the published network, which has no activations between them.
_PLACES = (0, 2, 4, 6, 7)


class Head:
    """Callable: normalised embeddings (..., P) float32 -> scores (...).

    Reads both usual files: one linear layer (``weight`` (1, P), ``bias``: ``sa_0_4_vit_l_14_linear.pth``) and five
    (``layers.0`` to ``layers.7``: ``sac+logos+ava1-l14-linearMSE.pth``). kind: "linear" or "mlp".
    """

    def __init__(self, spec: Spec, width: int) -> None:
        """width: P of the CLIP in use. Raises ArchipelError where the head is for another, DamagedError where the file is
        neither format or would need unpickling of more than tensors."""
        path = find_file(spec)
        content = path.read_bytes()
        self.sha256 = store.sha256_bytes(content)
        require_hash(spec, self.sha256)
        try:
            with warnings.catch_warnings():  # about pickle protocols; what is refused is said below
                warnings.simplefilter("ignore")
                state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
            raise DamagedError(
                f"{path} is not a file of tensors only, and anything else in a .pth file could run code: refused "
                f"({type(error).__name__})"
            ) from error
        self.kind, self._layers = _layers(path.name, state)
        if self._layers[0][0].shape[1] != width:
            raise ArchipelError(
                f"aesthetic={spec.where} reads embeddings of width {self._layers[0][0].shape[1]}, the CLIP given with clip=... "
                f"has {width}: use the CLIP that the head was trained on (ViT-L/14, 768, for the usual files)"
            )

    def __call__(self, embeddings: Tensor) -> Tensor:
        values = embeddings
        for weight, bias in self._layers:
            values = F.linear(values, weight, bias)
        return values[..., 0]


def _layers(name: str, state: object) -> tuple[str, list[tuple[Tensor, Tensor]]]:
    mlp = {f"layers.{place}.{part}" for place in _PLACES for part in ("weight", "bias")}
    tensors = state if isinstance(state, dict) else {}
    if set(tensors) == {"weight", "bias"}:
        kind, prefixes = "linear", [""]
    elif set(tensors) == mlp:
        kind, prefixes = "mlp", [f"layers.{place}." for place in _PLACES]
    else:
        raise DamagedError(
            f"{name} holds {sorted(map(str, tensors))[:4]}: expected weight and bias, or layers.0 to layers.7 of the LAION heads"
        )
    if not all(isinstance(value, Tensor) for value in tensors.values()):
        raise DamagedError(f"{name} holds something else than tensors")
    found = [(tensors[f"{prefix}weight"].float(), tensors[f"{prefix}bias"].float()) for prefix in prefixes]
    chained = all(weight.ndim == 2 and bias.shape == weight.shape[:1] for weight, bias in found) and all(
        after[0].shape[1] == before[0].shape[0] for before, after in itertools.pairwise(found)
    )
    if not chained or found[-1][0].shape[0] != 1:
        raise DamagedError(
            f"{name}: the layers' shapes {[tuple(weight.shape) for weight, _ in found]} do not fit together"
        )
    return kind, found
