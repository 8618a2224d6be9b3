"""A request for a clip, checked against what the run can do; every refusal names the value and what works instead."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from archipel.config import RunConfig
from archipel.ensemble.images import check_given
from archipel.ensemble.settings import Settings, check_prompts
from archipel.errors import ArchipelError
from archipel.serving.errors import Refused, wrong
from archipel.serving.limits import Limits
from archipel.serving.uploads import first_frame, from_data_url

FIELDS = ("prompt", "model", "seconds", "size", "input_reference", "strategy", "guidance", "steps", "seed")
_SCALES = (1, 2, 3, 4, 6, 8)
_SEEDS = 2**53  # whole numbers that every JSON reader keeps exactly


@dataclass(frozen=True)
class Offer:
    """What a server's run can do. ``sizes``: side of a delivered clip -> by what whole factor it is enlarged."""

    config: RunConfig
    model: str
    seconds: str
    sizes: dict[str, int]
    size: str

    @classmethod
    def of(cls, config: RunConfig, model: str, limits: Limits) -> Offer:
        side = config.clips.size
        scales = [scale for scale in _SCALES if side * scale <= limits.side] or [1]
        sizes = {f"{side * scale}x{side * scale}": scale for scale in scales}
        size = [name for name, scale in sizes.items() if scale <= 4][-1]
        seconds = f"{round(config.clips.frames / config.clips.fps, 3):g}"
        return cls(config, model, seconds, sizes, size)

    @property
    def takes_image(self) -> bool:
        try:
            return bool(check_given(self.config, True, False))
        except ArchipelError:
            return False


@dataclass(frozen=True)
class Asked:
    """A request that can be done. ``settings``: strategy, guidance, steps, scale. ``digest``: of all that was given.
    ``upload``: the picture as it came, of which ``image`` is the part that is used."""

    prompt: str
    seed: int
    settings: dict[str, Any]
    image: bytes | None
    digest: str
    upload: bytes | None = None


def read(fields: Mapping[str, Any], image: bytes | None, offer: Offer, limits: Limits) -> Asked:
    """``fields`` as JSON or a form gave them (there all are text); ``image``: an uploaded file. Raises Refused (400)."""
    for name in fields:
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, n=1)
            shown = name[:40].encode("ascii", "replace").decode()
            raise wrong(
                shown,
                f"unknown parameter {shown!r}{f': did you mean {near[0]!r}?' if near else ''}; known are {', '.join(FIELDS)}",
                "unknown_parameter",
            )
    prompt = _prompt(fields.get("prompt"), limits)
    _one_of("model", fields.get("model"), [offer.model])
    _seconds(fields.get("seconds"), offer)
    size = _one_of("size", fields.get("size"), list(offer.sizes)) or offer.size
    settings = _settings(fields, offer, limits)
    seed = _number("seed", fields.get("seed"), whole=True)
    if seed is not None and not 0 <= seed < _SEEDS:
        raise wrong("seed", f"seed must be a whole number from 0 to {_SEEDS - 1}")
    picture, upload = _image(fields.get("input_reference"), image, offer, limits)
    return Asked(
        prompt,
        secrets.randbelow(2**31) if seed is None else int(seed),
        {**settings, "scale": offer.sizes[size]},
        picture,
        _digest(prompt, seed, settings, size, picture),
        upload,
    )


def _digest(prompt: str, seed: float | None, settings: dict[str, Any], size: str, picture: bytes | None) -> str:
    image = None if picture is None else hashlib.sha256(picture).hexdigest()
    return hashlib.sha256(json.dumps([prompt, seed, settings, size, image], sort_keys=True).encode()).hexdigest()


def _prompt(prompt: Any, limits: Limits) -> str:
    if prompt is None:
        raise wrong("prompt", "prompt is missing: say what the clip shall show", "missing_required_parameter")
    if not isinstance(prompt, str):
        raise wrong("prompt", "prompt must be a text", "invalid_type")
    if len(prompt) > limits.prompt:
        raise wrong("prompt", f"prompt has {len(prompt)} characters, at most {limits.prompt} are taken", "too_long")
    try:
        check_prompts([prompt])
    except ArchipelError as error:
        raise wrong("prompt", str(error)) from error
    if any(ord(c) < 32 and c not in "\n\r\t" for c in prompt):
        raise wrong("prompt", "prompt holds control characters")
    return prompt


def _one_of(name: str, value: Any, known: list[str]) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or value not in known:
        raise wrong(name, f"this {name} cannot be had here: {name} can be {', '.join(known)} (or left out)")
    return value


def _seconds(value: Any, offer: Offer) -> None:
    number = _number("seconds", value)
    if number is not None and abs(number - float(offer.seconds)) > 0.0015:
        raise wrong(
            "seconds", f"clips of this run last {offer.seconds} seconds: seconds can be {offer.seconds} (or left out)"
        )


def _number(name: str, value: Any, *, whole: bool = False) -> float | None:
    """A number of JSON, or a text of a form that reads as one. Raises Refused."""
    if value is None:
        return None
    pattern = r"[+-]?[0-9]{1,18}" if whole else r"[+-]?[0-9]{1,12}(\.[0-9]{0,18})?"
    if isinstance(value, str) and re.fullmatch(pattern, value):
        return int(value) if whole else float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e18 < value < 1e18:
        raise wrong(name, f"{name} must be a {'whole ' if whole else ''}number", "invalid_type")
    if whole and value != int(value):
        raise wrong(name, f"{name} must be a whole number", "invalid_type")
    return int(value) if whole else float(value)


def _settings(fields: Mapping[str, Any], offer: Offer, limits: Limits) -> dict[str, Any]:
    strategy = fields.get("strategy")
    if strategy is not None and (not isinstance(strategy, str) or len(strategy) > 40):
        raise wrong("strategy", "strategy must be a short text", "invalid_type")
    if strategy == "oracle":
        raise wrong("strategy", "strategy = 'oracle' needs a clip's true cluster, which no request has")
    steps = _number("steps", fields.get("steps"), whole=True)
    if steps is not None and not 1 <= steps <= limits.steps:
        raise wrong("steps", f"steps must be a whole number from 1 to {limits.steps}")
    given = {"strategy": strategy, "guidance": _number("guidance", fields.get("guidance")), "steps": steps}
    found: dict[str, Any] = {}
    for name, value in given.items():
        try:
            found[name] = getattr(Settings.of(offer.config, **{name: value}), name)
        except ArchipelError as error:
            raise wrong(name, str(error)) from error
    return found


def _image(reference: Any, upload: bytes | None, offer: Offer, limits: Limits) -> tuple[bytes | None, bytes | None]:
    """The first frame, and the picture that it was cut from; None twice where there is none. Raises Refused."""
    if isinstance(reference, str) and not reference and upload is None:
        return None, None  # an empty field of a form
    if reference is not None and upload is None:
        if not isinstance(reference, dict) or set(reference) - {"image_url", "file_id"}:
            raise wrong(
                "input_reference", 'input_reference must be a file, or {"image_url": "data:image/png;base64,..."}'
            )
        url = reference.get("image_url")
        if reference.get("file_id") is not None or not isinstance(url, str):
            raise wrong("input_reference", "this server keeps no files: give image_url, or upload the picture")
        upload = from_data_url(url)
    if upload is None:
        return None, None
    try:
        check_given(offer.config, True, False)
    except ArchipelError as error:
        raise wrong("input_reference", str(error)) from error
    return first_frame(upload, offer.config.clips, limits.image_pixels), upload


def too_large(limits: Limits) -> Refused:
    return Refused(413, f"the request is larger than {limits.body} bytes", code="too_large")
