from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from archipel.config import Clips
from archipel.data import count_items, open_source
from archipel.data.base import Window
from archipel.data.decode import motion_of
from archipel.data.shapes import COLOURS, MOTIONS, SHAPES, Shapes, captions, draw, recipes
from archipel.data.splits import assign_splits

WINDOW = Window(8, 4.0, 0.0, 32, "center", (255, 255, 255))
_HASH = """
import hashlib
from archipel.data.base import Window
from archipel.data.shapes import Shapes
source = Shapes(20, 5)
digest = hashlib.sha256()
for item in source.items():
    data = source.read(item)
    digest.update(f"{item.key}|{item.caption}|{item.group}".encode() + data)
    digest.update(source.decode(item, data, Window(8, 4.0, 0.0, 32, "center", (255, 255, 255))).tobytes())
print(digest.hexdigest())
"""


def test_the_same_seed_gives_the_same_clips_in_every_process() -> None:
    runs = [subprocess.run([sys.executable, "-c", _HASH], capture_output=True, text=True, check=True) for _ in range(2)]
    namespace: dict[str, object] = {}
    exec(_HASH.replace("print(digest.hexdigest())", "result = digest.hexdigest()"), namespace)
    assert runs[0].stdout.strip() == runs[1].stdout.strip() == namespace["result"]


def test_recipes_do_not_change_between_versions_of_numpy() -> None:
    listed = "|".join(f"{r['colour']} {r['shape']} {r['motion']} {r['radius']} {r['phase']}" for r in recipes(700, 3))
    assert (
        hashlib.sha256(listed.encode()).hexdigest()
        == "0f481de5368c012deb2f8bbe6298cf3a61b21c84aef358372b8ffdab8ae1f428"
    )
    assert recipes(50, 3) == recipes(700, 3)[:50]
    assert recipes(50, 3) != recipes(50, 4)


def test_every_combination_comes_once_before_one_comes_twice() -> None:
    total = len(SHAPES) * len(COLOURS) * len(MOTIONS)
    items = Shapes(total + 40, 1).items()
    assert {item.caption for item in items[:total]} == set(captions())
    assert len({item.group for item in items[:total]}) == total
    source = Shapes(total + 40, 1)
    twins = [item for item in items if item.group == items[-1].group]
    assert len(twins) == 2  # the second is another drawing of the same caption
    assert twins[0].caption == twins[1].caption
    assert source.read(twins[0]) != source.read(twins[1])


def test_captions_say_what_is_drawn() -> None:
    source = Shapes(60, 2)
    for item in source.items():
        assert item.caption is not None
        article, colour, shape, motion = item.caption.split(" ", 3)
        assert article == ("an" if colour == "orange" else "a")
        assert shape in SHAPES and motion in MOTIONS
        clip = source.decode(item, source.read(item), WINDOW).astype(int)
        painted = clip[np.abs(clip - COLOURS[colour]).max(-1) < 3]
        assert len(painted) > 8 * 10, item.caption  # the colour is really there, in about every frame


@pytest.mark.parametrize("motion", sorted(MOTIONS))
def test_motions_do_what_their_names_say(motion: str) -> None:
    recipe = {
        "version": 1, "variant": 0, "shape": "ball", "colour": "blue", "motion": motion,
        "radius": 0.18, "phase": 0.0, "offset": [0.0, 0.0],
    }  # fmt: skip
    clip = draw(recipe, WINDOW).astype(int)
    assert clip.shape == (8, 32, 32, 3)
    body = (255 * 3 - clip.sum(-1)) * (np.abs(clip - COLOURS["blue"]).max(-1) < 120)
    mass = body.sum((1, 2)).astype(float)
    across = (body * np.arange(32)).sum((1, 2)) / mass
    down = (body * np.arange(32)[:, None]).sum((1, 2)) / mass
    assert motion_of(clip.astype(np.uint8)) > 0.005
    claims = {
        "slides to the right": (np.diff(across) > 0.5).all(),
        "slides to the left": (np.diff(across) < -0.5).all(),
        "falls": (np.diff(down) >= 0).all() and down[-1] - down[0] > 8,
        "floats up": (np.diff(down) < 0).all() and down[0] - down[-1] > 8,
        "grows": (np.diff(mass) > 0).all() and mass[-1] > 3 * mass[0],
        "shrinks": (np.diff(mass) < 0).all() and mass[0] > 3 * mass[-1],
        "bounces": (down[[0, 4]] > down[[2, 6]] + 8).all(),
        "spins": mass.min() < 0.3 * mass.max() and np.ptp(across) < 1,
        "swings": np.ptp(across) > 8 and np.ptp(down) < 6,
        "circles around": np.ptp(across) > 8 and np.ptp(down) > 8,
    }
    assert claims[motion]


def test_edges_are_antialiased_and_the_background_is_the_configured_one() -> None:
    dark = Window(2, 4.0, 0.0, 32, "center", (10, 20, 30))
    clip = draw(recipes(1, 0)[0], dark)
    assert clip[0, 0, 0].tolist() == [10, 20, 30]
    assert len(np.unique(clip.reshape(-1, 3), axis=0)) > 12


def test_the_words_of_unseen_captions_are_all_known_from_training() -> None:
    items = Shapes(240, 0).items()
    splits = assign_splits([i.group for i in items], [None] * 240, (0.7, 0.1, 0.2), 0)
    seen = {i.caption for i, s in zip(items, splits, strict=True) if s == "train"}
    unseen = {i.caption for i, s in zip(items, splits, strict=True) if s == "test"}
    assert not seen & unseen
    assert {w for c in unseen for w in str(c).split()} <= {w for c in seen for w in str(c).split()}


def test_counts() -> None:
    assert count_items(Clips(source="shapes")) == 240 == len(open_source(Clips(source="shapes"), 0).items())
    assert (
        count_items(Clips(source="shapes", count=7))
        == 7
        == len(open_source(Clips(source="shapes", count=7), 0).items())
    )
