from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from archipel.config import Clips
from archipel.data import count_items, fluent_emoji, open_source
from archipel.data.base import Window
from archipel.data.fetch import Package
from archipel.data.fluent_emoji import caption_of, group_of, split_code
from archipel.errors import DamagedError

WINDOW = Window(3, 10.0, 0.0, 16, "center", (255, 255, 255))


def _tar(members: list[tuple[str, bytes]], extra: list[tarfile.TarInfo] | None = None) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:gz") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for info in extra or []:
            tar.addfile(info)
    return target.getvalue()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put tarballs in the cache folder as if they had been fetched; nothing can be fetched in these tests."""
    monkeypatch.setenv("ARCHIPEL_CACHE", str(tmp_path))
    (tmp_path / "npm").mkdir()

    def put(package: Package, content: bytes) -> Package:
        digest = base64.b64encode(hashlib.sha512(content).digest()).decode()
        (tmp_path / "npm" / package.filename).write_bytes(content)
        return Package(package.name, package.version, digest, len(content))

    def apply(assets: list[tuple[str, bytes]], extra: list[tarfile.TarInfo] | None = None) -> None:
        names = {
            "👋": "Waving Hand", "🎉": "party popper", "🚶": "person walking", "🚶‍♀️": "woman walking",
            "🤝": "handshake", "⛹️": "person bouncing ball",
        }  # fmt: skip
        table = json.dumps({emoji: {"name": name} for emoji, name in names.items()}).encode()
        packed = _tar([("package/data-by-emoji.json", table), ("package/LICENSE", b"MIT")])
        monkeypatch.setattr(fluent_emoji, "NAMES", put(fluent_emoji.NAMES, packed))
        members = [("package/package.json", b"{}"), ("package/README.md", b"")]
        members += [(f"package/assets/{stem}.webp", data) for stem, data in assets]
        number = fluent_emoji.PACKAGES[3]
        monkeypatch.setitem(fluent_emoji.PACKAGES, 3, put(number, _tar(members, extra)))

    return apply


def _clip(colour: tuple[int, int, int], frames: int = 4) -> bytes:
    """Four frames of growing opacity, as the packages' files are: animated, transparent, lossless where told."""
    pictures = [Image.new("RGBA", (24, 24), (*colour, 60 * i + 15)) for i in range(frames)]
    target = io.BytesIO()
    if frames == 1:
        pictures[0].save(target, "WEBP", lossless=True)
    else:
        pictures[0].save(target, "WEBP", save_all=True, append_images=pictures[1:], duration=100, loop=0, lossless=True)
    return target.getvalue()


ASSETS = [
    ("1f389", _clip((255, 0, 0))),
    ("1f44b", _clip((0, 255, 0))),
    ("1f44b-1f3fd", _clip((0, 0, 255))),
    ("1f6b6-1f3fb-200d-2640-fe0f", _clip((9, 9, 9))),
    ("1f6b6", _clip((90, 90, 90), frames=1)),
    ("1f999", _clip((1, 2, 3))),
]


def test_base_emoji_and_all_variants(install: Callable[..., None]) -> None:
    install(ASSETS)
    base = open_source(Clips(source="fluent-emoji"), 0)
    items = base.items()
    assert [(i.key, i.caption, i.group, i.error) for i in items] == [
        ("anim-3/1f389.webp", "party popper", "1f389", None),
        ("anim-3/1f44b.webp", "waving hand", "1f44b", None),
        ("anim-3/1f6b6.webp", "person walking", "1f6b6", None),
        ("anim-3/1f999.webp", None, "1f999", None),
    ]
    everything = open_source(Clips(source="fluent-emoji", variants="all"), 0)
    found = {i.key: i for i in everything.items()}
    assert len(found) == 6
    tone = found["anim-3/1f44b-1f3fd.webp"]
    assert (tone.caption, tone.group) == ("waving hand, medium skin tone", "1f44b")
    woman = found["anim-3/1f6b6-1f3fb-200d-2640-fe0f.webp"]
    assert (woman.caption, woman.group) == ("woman walking, light skin tone", "1f6b6")
    for item, (_, data) in zip([items[3], items[0]], [ASSETS[5], ASSETS[0]], strict=True):  # backwards as well
        assert base.read(item) == data
    assert base.license == "MIT by package.json; no licence file inside"


def test_stills_are_announced_where_motion_is_asked(install: Callable[..., None]) -> None:
    install(ASSETS)
    items = open_source(Clips(source="fluent-emoji", min_motion=0.001), 0).items()
    assert [(i.key, i.error, i.tolerated) for i in items if i.error] == [
        ("anim-3/1f6b6.webp", "static: a still picture of one frame", True)
    ]


def test_clips_are_composited_on_the_background(install: Callable[..., None]) -> None:
    install(ASSETS)
    source = open_source(Clips(source="fluent-emoji"), 0)
    item = source.items()[0]
    clip = source.decode(item, source.read(item), WINDOW)
    expected = [[255, 240, 240], [255, 180, 180], [255, 120, 120]]
    np.testing.assert_allclose(clip[:, 8, 8], expected, atol=2)


def test_the_file_is_held_to_its_hash_every_time(install: Callable[..., None], tmp_path: Path) -> None:
    install(ASSETS)
    provenance: dict[str, Any] = open_source(Clips(source="fluent-emoji"), 0).provenance()
    assert provenance["packages"]["@lobehub/fluent-emoji-anim-3@1.0.0"].startswith("sha512-")
    from archipel.data.fetch import sha512_of

    path = tmp_path / "npm" / fluent_emoji.PACKAGES[3].filename
    assert f"sha512-{sha512_of(path)}" in provenance["packages"].values()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("package/assets/1f600.webp", tarfile.SYMTYPE),
        ("package/assets/1f600.webp", tarfile.LNKTYPE),
        ("../assets/1f600.webp", tarfile.REGTYPE),
        ("/package/assets/1f600.webp", tarfile.REGTYPE),
        ("package/assets/x", tarfile.FIFOTYPE),
    ],
)
def test_hostile_members_are_refused(name: str, kind: bytes, install: Callable[..., None]) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    install(ASSETS[:1], [info])
    with pytest.raises(DamagedError, match="a link or a path outside: it is not used"):
        open_source(Clips(source="fluent-emoji"), 0).items()


def test_a_package_that_breaks_off_is_named(
    install: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.Generator(np.random.PCG64(0)).bytes(60_000)
    install([*ASSETS, ("1f600", noise), ("1f601", noise[::-1])])
    path = tmp_path / "npm" / fluent_emoji.PACKAGES[3].filename
    path.write_bytes(path.read_bytes()[:-30_000])
    monkeypatch.setattr(fluent_emoji, "fetch", lambda package, stop=None: tmp_path / "npm" / package.filename)
    with pytest.raises(DamagedError, match=r"anim-3-1\.0\.0\.tgz breaks off: remove it"):
        open_source(Clips(source="fluent-emoji"), 0).items()


@pytest.mark.parametrize(
    ("variants", "group"),
    [
        (["1f44b", "1f44b-1f3fb", "1f44b-1f3ff"], "1f44b"),
        (["1f3c3", "1f3c3-200d-2640-fe0f", "1f3c3-1f3fd-200d-2642-fe0f", "1f3c3-200d-27a1-fe0f"], "1f3c3"),
        (["26f9-fe0f", "26f9-1f3fb", "26f9-fe0f-200d-2640-fe0f"], "26f9"),
        (["1f9d1-200d-1f33e", "1f468-1f3fb-200d-1f33e", "1f469-200d-1f33e"], "1f9d1-1f33e"),
        (["1f9d1", "1f468", "1f469-1f3fd"], "1f9d1"),
        (["1f91d", "1f91d-1f3fb", "1faf1-1f3fb-200d-1faf2-1f3ff"], "1f91d"),
        (["1f46b", "1f46c-1f3fb", "1f9d1-1f3fb-200d-1f91d-200d-1f9d1-1f3fd", "1f469-200d-1f91d-200d-1f468"], "1f46b"),
        (["1f48f", "1f468-1f3fb-200d-2764-fe0f-200d-1f48b-200d-1f468-1f3fb"], "1f48f"),
        (["1f491", "1f469-200d-2764-fe0f-200d-1f469"], "1f491"),
        (["1f46a", "1f468-200d-1f469-200d-1f467-200d-1f466", "1f469-200d-1f466"], "1f46a"),
        (["1f385", "1f936-1f3fb", "1f9d1-200d-1f384"], "1f385"),
        (["1f934", "1f478", "1fac5-1f3fd"], "1fac5"),
    ],
)
def test_all_tones_and_genders_of_one_emoji_are_one_group(variants: list[str], group: str) -> None:
    assert {group_of(stem) for stem in variants} == {group}


def test_different_emoji_are_different_groups() -> None:
    stems = ["1f44b", "1f91a", "1f9d1-200d-1f33e", "1f9d1-200d-1f373", "1f468-200d-1f9b0", "1f468", "1f466", "1f3c3"]
    assert len({group_of(stem) for stem in stems}) == len(stems)


def test_captions_come_from_unicodes_names() -> None:
    names = {("1f44b",): "waving hand", ("1f91d",): "handshake", ("23", "20e3"): "Keycap #"}
    assert caption_of("1f44b-1f3fe", names) == "waving hand, medium-dark skin tone"
    assert caption_of("1faf1-1f3fb-200d-1faf2-1f3ff", names) == "handshake, light skin tone, dark skin tone"
    assert caption_of("0023-fe0f-20e3", names) == "keycap #"
    assert caption_of("1f44c", names) is None
    assert split_code("26f9-fe0f-200d-2640-fe0f") == ("26f9", "200d", "2640")


def test_counts_are_known_without_fetching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHIPEL_CACHE", str(tmp_path))
    assert count_items(Clips(source="fluent-emoji", min_motion=0.001)) == 223
    assert count_items(Clips(source="fluent-emoji", min_motion=0.001, packages=(1, 2, 3, 4))) == 734
    assert count_items(Clips(source="fluent-emoji", min_motion=0.001, packages=(1, 2, 3, 4), variants="all")) == 2109
    assert count_items(Clips(source="fluent-emoji", packages=(1, 2, 3, 4), variants="all")) == 3391
    assert count_items(Clips(source="fluent-emoji", count=50)) == 50
    assert list(tmp_path.iterdir()) == []
