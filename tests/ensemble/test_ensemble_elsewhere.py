"""Arms sampled elsewhere: the same bytes as here, from the files that are named and nothing else of the run."""

from __future__ import annotations

import shutil
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest

from archipel import store
from archipel.ensemble.stage import generate_arms
from archipel.errors import Stopped
from archipel.progress import StopFlag
from archipel.run import Run
from archipel.spread import Arrays, Make


class Elsewhere:
    """Another machine, with the named files under another path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.devices: list[str] = []

    def __call__(
        self, make: Make, given: Iterable[Arrays], root: Path, needs: Sequence[str], *, device: str = "cpu"
    ) -> Generator[Arrays, None, None]:
        for name in needs:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, self.folder / name)
        for piece in given:
            self.devices.append(device)
            yield make(self.folder, {name: np.array(array) for name, array in piece.items()})


def samples(run: Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.samples("test").iterdir()}


def test_arms_sampled_elsewhere_have_the_bytes_of_those_sampled_here(
    small_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Run.open(shutil.copytree(small_run.root, tmp_path / "other"))
    generate_arms(small_run, device="cpu")
    elsewhere = Elsewhere(tmp_path / "elsewhere")

    class AfterThree(StopFlag):
        def __bool__(self) -> bool:
            return len(elsewhere.devices) >= 3

    with pytest.raises(Stopped):
        generate_arms(other, AfterThree(), elsewhere, "cpu")
    kept = len(list((other.samples("test") / ".parts").rglob("*.safetensors")))
    generate_arms(other, None, elsewhere, "cpu")
    assert samples(small_run) == samples(other)
    batches = 2 * len(small_run.config.evaluate.arms)  # 20 clips, 16 at a time
    assert len(elsewhere.devices) == batches + 3 - kept and set(elsewhere.devices) == {"cpu"} and kept >= 2
    assert store.check_card(other.samples("test")) == []
    assert not list((tmp_path / "elsewhere").rglob("checkpoints"))
