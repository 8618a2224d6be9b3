"""Pictures that a clip shall begin or end with: read, checked, and cut as the run's own clips are."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from archipel.config import Clips as ClipsConfig
from archipel.config import RunConfig
from archipel.data.base import Window
from archipel.data.decode import MAX_PIXELS, to_square
from archipel.errors import ArchipelError
from archipel.flow import given

if TYPE_CHECKING:
    from PIL import Image

    Picture = Path | str | Image.Image | np.ndarray
    Pictures = Picture | Sequence[Picture]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_SHOWN = {"text": "nothing", "head": "a first frame", "loop": "a first and a last frame", "tail": "a last frame"}


def check_given(config: RunConfig, first: bool, last: bool) -> int:
    """The task (place in ``flow.given.TASKS``) of generating with a first and / or a last frame given.

    Raises ArchipelError, naming the key, where the run's networks were not trained for it.
    """
    task, mix = given.task_of(first, last), config.expert.tasks
    if (first or last) and not mix[task] > 0:
        name, advice = given.TASKS[task], list(mix)
        advice[task] = 5.0 if name == "head" else 1.0
        knows = [_SHOWN[name] for name in given.shares(mix) if name != "text"]
        what = f"it was trained with {', or with '.join(knows)}" if knows else "it was trained on text only"
        raise ArchipelError(
            f"this run cannot be given {_SHOWN[name]}: {what} (expert.tasks = {list(mix)}). A new run can: "
            f"--set expert.tasks={[round(weight, 6) for weight in advice]}"
        )
    return task


def read_frames(pictures: Pictures | None, count: int, clips: ClipsConfig, what: str = "image") -> np.ndarray | None:
    """Pictures as frames of the run's clips, uint8 (1 or ``count``, H, W, 3); None for None. One serves all clips.

    A picture is a path, a Pillow image, or a uint8 array (h, w, 3 or 4). It is made square, put on the background and
    resized as the run's clips were; how a camera was held (EXIF) is heeded. Raises ArchipelError for what is none.
    """
    if pictures is None:
        return None
    several = isinstance(pictures, list | tuple) or (isinstance(pictures, np.ndarray) and pictures.ndim == 4)
    found: list[Any] = list(pictures) if several else [pictures]  # type: ignore[arg-type]
    if len(found) not in (1, count):
        raise ArchipelError(
            f"{len(found)} pictures were given as {what} for {count} prompts: give one for all, or one each"
        )
    window = replace(Window.from_config(clips), phases=1)
    names = [f"{what} {i + 1}" if len(found) > 1 else what for i in range(len(found))]
    return np.stack([_read(one, window, name) for one, name in zip(found, names, strict=True)])


def _read(picture: Picture, window: Window, what: str) -> np.ndarray:
    from PIL import Image

    if isinstance(picture, str | Path):
        return _read_file(Path(picture), window, what)
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] not in (3, 4) or not picture.size:
            raise ArchipelError(
                f"{what} is an array of {picture.dtype} {picture.shape}: give uint8 (height, width, 3), 0 to 255"
            )
        _check_size(picture.shape[1], picture.shape[0], what)
        return to_square(Image.fromarray(picture), window)
    if isinstance(picture, Image.Image):
        _check_size(*picture.size, what)
        return to_square(picture, window)
    raise ArchipelError(f"{what} is a {type(picture).__name__}: give a path, a Pillow image or a uint8 array")


def _read_file(path: Path, window: Window, what: str) -> np.ndarray:
    from PIL import Image, ImageOps, UnidentifiedImageError

    if path.is_dir():
        raise ArchipelError(f"{what}: {path} is a folder: give a picture, such as {path / 'first.png'}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # _check_size is stricter
            with Image.open(path, formats=FORMATS) as image:
                _check_size(*image.size, f"{what}: {path}")
                image.load()
                return to_square(ImageOps.exif_transpose(image), window)
    except FileNotFoundError as error:
        raise ArchipelError(f"{what}: {path} is not there") from error
    except UnidentifiedImageError as error:
        raise ArchipelError(f"{what}: {path} is no picture that is read here ({', '.join(FORMATS)})") from error
    except ArchipelError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own bound, above ours
        raise ArchipelError(f"{what}: {path} claims more pixels than can be meant: at most {MAX_PIXELS}") from error
    except Exception as error:  # decoders raise anything at all on damaged files
        said = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise ArchipelError(f"{what}: {path} cannot be read as a picture ({said})") from error


def _check_size(width: int, height: int, what: str) -> None:
    if width * height > MAX_PIXELS:
        raise ArchipelError(f"{what} has {width}x{height} pixels, at most {MAX_PIXELS} are read: make it smaller")
