"""The protocol of a score: everything that must be equal before two scores may be compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from archipel.errors import ArchipelError


@dataclass(frozen=True)
class Protocol:
    """How a score was measured.

    estimator: the formula; extractor, weights (sha256), layer, resize, frames: where features come from; n: clips of the
    arm in one estimate; clips: sha256 of the real clips' bytes, window and size, and of the rows compared with;
    reference: real clips in one estimate; groups: content groups; divisor: of covariances ("" where there is none);
    split; prompts: sha256 of captions and rows; pca: dimensions (0: full features).
    """

    estimator: str
    extractor: str
    weights: str
    layer: str
    resize: int
    frames: int
    n: int
    clips: str
    reference: int
    groups: int
    divisor: str
    split: str
    prompts: str
    pca: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def require_same(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Refuse to compare two score rows of different metrics or protocols.

    Raises ArchipelError naming the first difference and both values.
    """
    name = f"{a.get('metric')} of {a.get('arm')} and of {b.get('arm')}"
    if a.get("metric") != b.get("metric"):
        raise ArchipelError(
            f"scores cannot be compared: metric is {a.get('metric')!r} in one and {b.get('metric')!r} in the other"
        )
    one, two = a.get("protocol"), b.get("protocol")
    if not isinstance(one, Mapping) or not isinstance(two, Mapping):
        raise ArchipelError(f"scores cannot be compared ({name}): one of them has no protocol; evaluate it again")
    keys = [field.name for field in fields(Protocol)]
    for key in [*keys, *sorted((set(one) | set(two)) - set(keys))]:
        if one.get(key) != two.get(key):
            raise ArchipelError(
                f"scores of different protocols cannot be compared ({name}): "
                f"{key} is {one.get(key)!r} in one and {two.get(key)!r} in the other; evaluate both alike"
            )


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """Difference of two score rows' values, a - b, after ``require_same``."""
    require_same(a, b)
    return float(a["value"]) - float(b["value"])
