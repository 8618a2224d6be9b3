"""Pictures from strangers: bounded before they are decoded, cut as the run's clips, kept as PNG of that size."""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from typing import TYPE_CHECKING

from archipel.errors import ArchipelError
from archipel.serving.errors import wrong

if TYPE_CHECKING:
    from archipel.config import Clips

FORMATS = ("PNG", "JPEG", "WEBP")
_NAME = "input_reference"


def from_data_url(url: str) -> bytes:
    """The bytes of ``data:image/...;base64,...``. Other URLs are refused: this server fetches nothing. Raises Refused."""
    head, comma, body = url.partition(",")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise wrong(_NAME, "image_url must be data:image/png;base64,... (or jpeg, webp): no other URL is opened here")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise wrong(_NAME, "image_url holds no valid base64") from error


def first_frame(data: bytes, clips: Clips, most_pixels: int) -> bytes:
    """A picture as the first frame of the run's clips, PNG. Raises Refused for what is none, or one too large."""
    from PIL import Image, ImageOps

    from archipel.ensemble.images import read_frames

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound below is stricter
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if width * height > most_pixels:
                    raise wrong(_NAME, f"the picture has {width}x{height} pixels, at most {most_pixels} are taken")
                image.load()
                frames = read_frames(ImageOps.exif_transpose(image), 1, clips)
    except Image.DecompressionBombError as error:
        raise wrong(_NAME, f"the picture claims too many pixels, at most {most_pixels} are taken") from error
    except ArchipelError as error:
        raise wrong(_NAME, str(error)) from error
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, OverflowError, TypeError, KeyError) as error:
        raise wrong(_NAME, f"that is no whole picture that is read here ({', '.join(FORMATS)})") from error
    assert frames is not None
    out = io.BytesIO()
    Image.fromarray(frames[0]).save(out, "PNG")
    return out.getvalue()
