"""What a generated file says of itself: that a model made it, which one, from which seed, with which settings.

A note is a flat object of JSON, the same for the same clip: no time, no host, no path, and no prompt (whoever is handed a clip
shall not learn by accident what was typed; its seed and settings say the rest). It goes where each format keeps text: the MP4's
comment, an XMP packet in WebP, the GIF's comment, a text chunk of every PNG.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from archipel import __version__
from archipel.config import RunConfig
from archipel.errors import ArchipelError

Note = Mapping[str, Any]
# IPTC's word for media that a model made: what readers of XMP look for.
SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
    'rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">'
    "<Iptc4xmpExt:DigitalSourceType>{source}</Iptc4xmpExt:DigitalSourceType><dc:description><rdf:Alt>"
    '<rdf:li xml:lang="x-default">{note}</rdf:li></rdf:Alt></dc:description></rdf:Description></rdf:RDF></x:xmpmeta>'
)
_MOST = 1 << 20  # bytes of a note that are read


def of(model: str, run_id: str, seeds: Sequence[int], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The note of a clip (of one seed), or of several in one file (a list of seeds)."""
    return {
        "generated_by": "a model, not a camera",
        "software": f"archipel {__version__}",
        "model": model,
        "run": run_id,
        "seed": int(seeds[0]) if len(seeds) == 1 else [int(seed) for seed in seeds],
        "settings": dict(settings),
    }


def text(note: Note) -> str:
    """One line of ASCII, keys in order."""
    return json.dumps(note, sort_keys=True, separators=(",", ":"))


def xmp(note: Note) -> bytes:
    """An XMP packet that holds the note as its description."""
    return _XMP.format(source=SOURCE, note=escape(text(note))).encode()


def read(path: Path | str) -> dict[str, Any] | None:
    """The note in a file that ``video.write`` wrote (a folder: in its first frame); None where there is none.

    Raises ArchipelError where the file cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        path = min(path.glob("frame-*.png"), default=path / "frame-0000.png")
    try:
        found = _mp4(path) if path.suffix.lower() == ".mp4" else _image(path)
        value = json.loads(found[:_MOST]) if found else None
    except ValueError:  # somebody else's comment
        return None
    except OSError as error:
        raise ArchipelError(f"{path} cannot be read: {error.strerror or error}") from error
    return value if isinstance(value, dict) and "run" in value else None


def _mp4(path: Path) -> str:
    import av

    with av.open(str(path)) as container:
        return str(container.metadata.get("comment", ""))


def _image(path: Path) -> str:
    from xml.etree import ElementTree

    from PIL import Image

    with Image.open(path) as image:
        about = image.info
    if "xmp" in about:
        packet = bytes(about["xmp"])
        if b"<!" in packet:  # entities: none of ours
            return ""
        try:
            root = ElementTree.fromstring(packet[:_MOST])
        except ElementTree.ParseError:
            return ""
        return next((one.text or "" for one in root.iter() if one.tag.endswith("}li")), "")
    comment = about.get("comment", about.get("Comment", ""))
    return comment.decode("ascii", "replace") if isinstance(comment, bytes) else str(comment)


def model_name(config: RunConfig, run_id: str) -> str:
    """How a run is called as a model: its backbone, the number of its experts, the beginning of its id."""
    return f"archipel-{config.expert.backbone}-{config.partition.k}x-{run_id[:12]}"
