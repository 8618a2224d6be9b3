"""Procedural clips: "a red ball bounces". Offline, deterministic, fast; for tests and first steps without a network.

A content group is one combination of shape, colour and motion; groups are dealt out whole, so the captions of the
test split are combinations that training has not seen, made of words that it has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from archipel.data.base import Item, Window

DEFAULT_COUNT = 240
VERSION = 1  # of the drawing: enters every recipe, and with it every clip's hash
PERIOD = 2.0  # seconds of one motion

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (229, 46, 46),
    "orange": (255, 140, 26),
    "yellow": (250, 204, 21),
    "green": (56, 166, 60),
    "blue": (37, 110, 235),
    "purple": (142, 48, 190),
    "pink": (245, 112, 178),
    "brown": (128, 78, 44),
}

_TURN = 2 * np.pi
_Grid = np.ndarray  # float32 (F, S, S): coordinates within the shape, which fills about [-1, 1], y upwards


def _polygon(angles: Sequence[float], radii: Sequence[float]) -> Callable[[_Grid, _Grid], np.ndarray]:
    """Inside test of a star-shaped polygon around the origin, by even-odd crossings."""
    corners = [(r * np.sin(a), r * np.cos(a)) for a, r in zip(angles, radii, strict=True)]

    def inside(x: _Grid, y: _Grid) -> np.ndarray:
        odd = np.zeros(x.shape, bool)
        for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
            if y0 != y1:
                odd ^= ((y0 > y) != (y1 > y)) & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
        return odd

    return inside


def _flower(x: _Grid, y: _Grid) -> np.ndarray:
    petals: np.ndarray = np.hypot(x, y) < 0.5
    for i in range(5):
        petals |= np.hypot(x - 0.58 * np.sin(_TURN * i / 5), y - 0.58 * np.cos(_TURN * i / 5)) < 0.41
    return petals


def _heart(x: _Grid, y: _Grid) -> np.ndarray:
    x, y = x * 1.15, y * 1.12 + 0.1
    inside: np.ndarray = (x * x + y * y - 1) ** 3 - x * x * y**3 < 0
    return inside


def _moon(x: _Grid, y: _Grid) -> np.ndarray:
    moon: np.ndarray = (np.hypot(x, y) < 1) & (np.hypot(x - 0.5, y - 0.22) > 0.78)
    return moon


_FOOT = {
    "ball": 0.95,
    "box": 0.85,
    "triangle": 0.55,
    "star": 0.89,
    "heart": 0.98,
    "ring": 0.98,
    "moon": 1.0,
    "flower": 0.9,
}
SHAPES: dict[str, Callable[[_Grid, _Grid], np.ndarray]] = {
    "ball": lambda x, y: np.hypot(x, y) < 0.95,
    "box": lambda x, y: np.maximum(np.abs(x), np.abs(y)) < 0.85,
    "triangle": _polygon([0, _TURN / 3, 2 * _TURN / 3], [1.1, 1.1, 1.1]),
    "star": _polygon([_TURN * i / 10 for i in range(10)], [1.1, 0.5] * 5),
    "heart": _heart,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.7) < 0.28,
    "moon": _moon,
    "flower": _flower,
}


class Pose:
    """Where a shape is at times u (F,) in periods: centre in [0, 1] with y upwards, stretch, turn; arrays of (F,)."""

    def __init__(self, u: np.ndarray, radius: float, foot: float = 1.0) -> None:
        self.x, self.y = np.full_like(u, 0.5), np.full_like(u, 0.5)
        self.wide, self.high = np.ones_like(u), np.ones_like(u)
        self.turn = np.zeros_like(u)
        self.radius = radius
        self.foot = radius * foot  # from the centre down to where the shape stands
        self.floor: float | None = None  # height of the ground under the shape, where it casts a shadow


def _bounce(p: Pose, u: np.ndarray) -> None:
    v = (2 * u) % 1
    height = 4 * v * (1 - v)
    p.floor = 0.1
    flat = 0.32 * np.exp(-9 * height)  # squashed where it touches the ground, and a little wider for it
    p.wide, p.high = 1 + flat, 1 - flat
    p.y = p.floor + p.foot * p.high + height * (0.86 - p.foot - p.radius)


def _slide(direction: int) -> Callable[[Pose, np.ndarray], None]:
    def move(p: Pose, u: np.ndarray) -> None:
        p.floor = 0.22
        p.y = np.full_like(u, p.floor + p.foot)
        p.x = 0.5 + direction * (u % 1 - 0.4375) * (0.96 - 2 * p.radius)

    return move


def _spin(p: Pose, u: np.ndarray) -> None:
    p.wide = np.cos(_TURN * u)  # about the upright axis, like a coin: every shape shows it
    p.wide = np.where(np.abs(p.wide) < 0.08, 0.08, p.wide)


def _grow(p: Pose, u: np.ndarray) -> None:
    p.wide = p.high = 0.35 + 1.15 * (u % 1)


def _shrink(p: Pose, u: np.ndarray) -> None:
    p.wide = p.high = 1.36 - 1.15 * (u % 1)


def _swing(p: Pose, u: np.ndarray) -> None:
    angle = 0.62 * np.sin(_TURN * u)
    p.turn = -angle
    p.x, p.y = 0.5 + 0.5 * np.sin(angle), 0.9 - 0.5 * np.cos(angle)


def _circle(p: Pose, u: np.ndarray) -> None:
    reach = 0.47 - p.radius
    p.x, p.y = 0.5 + reach * np.sin(_TURN * u), 0.5 + reach * np.cos(_TURN * u)


def _fall(p: Pose, u: np.ndarray) -> None:
    p.y = 0.96 - p.radius - (0.92 - 2 * p.radius) * np.minimum((u % 1) * 8 / 7, 1) ** 2


def _rise(p: Pose, u: np.ndarray) -> None:
    p.y = 0.5 + (u % 1 - 0.4375) * (1.0 - 2 * p.radius)
    p.x = 0.5 + 0.06 * np.sin(2 * _TURN * u)  # the sway of a balloon


MOTIONS: dict[str, Callable[[Pose, np.ndarray], None]] = {
    "bounces": _bounce,
    "slides to the right": _slide(1),
    "slides to the left": _slide(-1),
    "spins": _spin,
    "grows": _grow,
    "shrinks": _shrink,
    "swings": _swing,
    "circles around": _circle,
    "falls": _fall,
    "floats up": _rise,
}
_PERIODIC = {"bounces", "spins", "swings", "circles around"}  # may begin anywhere; the others would jump
_SMALLER = {"swings": 0.8, "circles around": 0.75, "slides to the right": 0.85, "slides to the left": 0.85}


def captions() -> list[str]:
    """All combinations, in a fixed order."""
    return [f"{_article(c)} {c} {s} {m}" for s in SHAPES for c in COLOURS for m in MOTIONS]


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def recipes(count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` recipes: combinations in an order drawn from ``seed``, each once before any comes a second time."""
    combinations = [(s, c, m) for s in SHAPES for c in COLOURS for m in MOTIONS]
    made = []
    for number in range(count):
        variant, place = divmod(number, len(combinations))
        if place == 0:  # raw bits: numpy promises the stream of a generator, not the methods on top of it
            bits = np.random.Philox(key=np.array([seed, 2 * variant], np.uint64)).random_raw(len(combinations))
            order = np.argsort(bits, kind="stable").tolist()
            bits = np.random.Philox(key=np.array([seed, 2 * variant + 1], np.uint64)).random_raw(4 * len(combinations))
            drawn = ((bits >> np.uint64(11)) * 2.0**-53).reshape(-1, 4).tolist()
        shape, colour, motion = combinations[order[place]]
        size, phase, dx, dy = drawn[place]
        made.append(
            {
                "version": VERSION,
                "variant": variant,
                "shape": shape,
                "colour": colour,
                "motion": motion,
                "radius": round((0.2 + 0.06 * size) * _SMALLER.get(motion, 1.0), 4),
                "phase": round(phase, 4) if motion in _PERIODIC else 0.0,
                "offset": [round(0.06 * (dx - 0.5), 4), round(0.06 * (dy - 0.5), 4)],
            }
        )
    return made


def draw(recipe: dict[str, Any], window: Window) -> np.ndarray:
    """uint8 (P * F, H, W, 3): the recipe's clip at the times of the window's phases, antialiased by supersampling."""
    size = window.size
    fine = 3 if size <= 128 else 2
    once = np.array([float(t) for t in window.times()], np.float64) / PERIOD + recipe["phase"]
    u = np.concatenate([once + phase / window.phases for phase in range(window.phases)])
    pose = Pose(u, recipe["radius"], _FOOT[recipe["shape"]])
    MOTIONS[recipe["motion"]](pose, u)
    pose.x = pose.x + recipe["offset"][0]
    if pose.floor is None:
        pose.y = pose.y + recipe["offset"][1]

    line = ((np.arange(size * fine) + 0.5) / (size * fine)).astype(np.float32)
    right, up = line[None, None, :], line[None, ::-1, None]

    def per_frame(values: np.ndarray) -> np.ndarray:
        return values.astype(np.float32)[:, None, None]

    dx, dy = right - per_frame(pose.x), up - per_frame(pose.y)
    cos, sin = per_frame(np.cos(pose.turn)), per_frame(np.sin(pose.turn))
    x = (cos * dx - sin * dy) * per_frame(1 / (pose.wide * pose.radius))
    y = (sin * dx + cos * dy) * per_frame(1 / (pose.high * pose.radius))

    background = np.array(window.background, np.float32)
    colour = np.array(COLOURS[recipe["colour"]], np.float32)
    layers: list[tuple[np.ndarray, np.ndarray]] = []  # (coverage (F, H, W), colour), from back to front
    if pose.floor is not None:
        shade = 1 - 0.55 * np.clip((pose.y - pose.floor - pose.foot) / 0.5, 0, 1)  # fainter the higher the shape is
        ground = (dx / (pose.radius * 1.05)) ** 2 + ((up - pose.floor) / (pose.radius * 0.24)) ** 2 < 1
        layers.append((_coverage(ground, fine) * per_frame(0.3 * shade), background * 0.35))
    body = SHAPES[recipe["shape"]]
    whole = body(x, y)
    layers.append((_coverage(whole, fine), colour * 0.62))  # the rim
    face = whole & body(x * 1.22, y * 1.22) if recipe["shape"] not in ("ring", "moon") else whole
    layers.append((_coverage(face, fine), colour))
    if recipe["shape"] not in ("ring", "moon"):
        gleam = ((x + 0.3) / 0.24) ** 2 + ((y - 0.32) / 0.18) ** 2 < 1
        layers.append((0.75 * _coverage(gleam & face, fine), colour * 0.3 + 255 * 0.7))

    clip = np.broadcast_to(background, (len(u), size, size, 3)).astype(np.float32)
    for coverage, paint in layers:
        clip += coverage[..., None] * (paint - clip)
    return np.clip(np.rint(clip), 0, 255).astype(np.uint8)


def draw_bytes(data: bytes, window: Window) -> np.ndarray:
    """``draw`` from a recipe as the source's bytes."""
    return draw(json.loads(data), window)


def _coverage(mask: np.ndarray, fine: int) -> np.ndarray:
    """Share of each pixel that a fine mask covers: bool (F, S, S) -> float32 (F, S / fine, S / fine)."""
    frames, height, width = mask.shape
    blocks = mask.reshape(frames, height // fine, fine, width // fine, fine)
    coverage: np.ndarray = blocks.mean((2, 4), dtype=np.float32)
    return coverage


class Shapes:
    """The ``shapes`` source: clip i is drawn from recipe i, and its bytes are that recipe."""

    name = "shapes"
    license = "made by Archipel itself; no rights are claimed in the clips"

    def __init__(self, count: int, seed: int) -> None:
        self._seed = seed
        self._recipes = recipes(count or DEFAULT_COUNT, seed)

    def items(self) -> list[Item]:
        items = []
        for number, recipe in enumerate(self._recipes):
            shape, colour, motion = recipe["shape"], recipe["colour"], recipe["motion"]
            caption = f"{_article(colour)} {colour} {shape} {motion}"
            items.append(Item(f"shape-{number:05d}", caption, f"{colour} {shape} {motion}"))
        return items

    def read(self, item: Item) -> bytes:
        recipe = self._recipes[int(item.key.rpartition("-")[2])]
        return json.dumps(recipe, sort_keys=True, separators=(",", ":")).encode()

    def decode(self, item: Item, data: bytes, window: Window) -> np.ndarray:
        return draw_bytes(data, window)

    def provenance(self) -> dict[str, Any]:
        return {"drawing": VERSION, "seed": self._seed, "combinations": len(SHAPES) * len(COLOURS) * len(MOTIONS)}
