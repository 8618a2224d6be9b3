"""What a person writes to name a judge: ``NAME`` or ``NAME=WHERE``, with ``@sha256:HEX`` where the weights are known."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from archipel.encoders.features import NAMES as PACKAGED
from archipel.errors import ArchipelError

FLOW, I3D, VIDEOMAE, CLIP, AESTHETIC, DINOV2 = "flow", "i3d", "videomae", "clip", "aesthetic", "dinov2"
WITHOUT_WEIGHTS = (*PACKAGED, FLOW)
WITH_WEIGHTS = {
    I3D: "i3d=FILE@sha256:HEX, a TorchScript file",
    VIDEOMAE: "videomae=FOLDER or videomae=ORG/NAME",
    CLIP: "clip=FOLDER or clip=ORG/NAME",
    AESTHETIC: "aesthetic=FILE, a .pth file of a LAION head, beside clip=...",
    DINOV2: "dinov2=FOLDER or dinov2=ORG/NAME",
}
ALL = (*WITHOUT_WEIGHTS, *WITH_WEIGHTS)
DEFAULT = WITHOUT_WEIGHTS
_HASH = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True)
class Spec:
    """name: one of ``ALL``; where: path or hub id, "" for judges that need neither; sha256: 64 hex digits or ""."""

    name: str
    where: str = ""
    sha256: str = ""


def parse(text: str) -> Spec:
    """Raises ArchipelError for an unknown name, a missing or needless place, and a sha256 that is none."""
    name, equals, rest = text.strip().partition("=")
    if name not in ALL:
        near = difflib.get_close_matches(name, ALL, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ArchipelError(f"{name!r} is not an extractor{hint} There are {', '.join(ALL)}")
    where, at, digest = rest.partition("@sha256:")
    if name in WITHOUT_WEIGHTS:
        if equals:
            raise ArchipelError(f"{text!r}: {name} comes with its package and takes no path: write {name}")
        return Spec(name)
    if not where:
        raise ArchipelError(f"{text!r}: {name} needs weights that Archipel does not ship: write {WITH_WEIGHTS[name]}")
    if "://" in where:
        raise ArchipelError(f"{text!r}: addresses are refused; give a local path or a hub id: {WITH_WEIGHTS[name]}")
    if at and not _HASH.fullmatch(digest):
        raise ArchipelError(f"{text!r}: a sha256 has 64 hex digits (0-9, a-f), not {digest!r}")
    return Spec(name, where, digest.lower())


def parse_all(texts: Sequence[str]) -> list[Spec]:
    """Specs in the order given; () stands for the judges that need no weights from elsewhere.

    Raises ArchipelError as ``parse`` does, for a name given twice, and for the aesthetic head without CLIP.
    """
    specs = [parse(text) for text in texts or DEFAULT]
    names = [spec.name for spec in specs]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise ArchipelError(f"the extractor {twice[0]} is given twice: name it once")
    if AESTHETIC in names and CLIP not in names:
        raise ArchipelError(
            "the aesthetic head reads CLIP's image embeddings: give clip=... beside it (the usual heads want ViT-L/14)"
        )
    return specs
