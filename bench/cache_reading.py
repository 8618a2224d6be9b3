"""Random training batches from a memory-mapped shard (ours) against WebDataset tars, litdata chunks and Hugging Face datasets.

    python -m bench.cache_reading [--small] [--out FILE]

Every contender gives the same clips as torch tensors: latents, text tokens, mask, pooled text, cluster and row number.
That is shown first, clip by clip. A round is one shuffled epoch of each. Files are in the page cache for all, as they
are from the second epoch of any training on clips of this size.

WebDataset is used in its usual way: tars of .npy members, shuffled by shard and in a buffer of 1,000 clips, decoded,
batched. Its order is a shuffle of a stream, and so depends on all that was read before; ours is a function of the step.
It is made for reading far more than fits a disk, in sequence and from afar, which a memory map cannot do; its time here
goes into taking tars and headers of small members apart. litdata is used in its usual way too: chunks of 64 MB, a shuffled
StreamingDataset, a StreamingDataLoader in this process. Peers that are not installed are left out, and named.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from archipel import config, presets, store
from archipel.cache import batch_rows
from archipel.training.batches import Clips
from bench import common

NAMES = ("latents", "tokens", "mask", "pooled", "cluster", "row")
WHAT = "an epoch of random training batches: latents and text"
PACKAGES = ("torch", "webdataset", "litdata", "datasets", "pyarrow")
Batch = tuple[Tensor, ...]  # in the order of NAMES


class Mapped:
    """What a training job does: rows of the step, read from the map."""

    def __init__(self, folder: Path, arrays: dict[str, np.ndarray], batch: int) -> None:
        store.write_tensors(folder / "train.safetensors", arrays)
        self.clips, self.batch, self.step = Clips(folder / "train.safetensors"), batch, 0

    def epoch(self) -> Iterator[Batch]:
        for _ in range(len(self.clips) // self.batch):
            rows = batch_rows(0, self.step, self.batch, len(self.clips))
            latents, cond, cluster = self.clips.take(rows)
            yield latents, cond.tokens, cond.mask, cond.pooled, cluster, torch.tensor(self.clips.items(rows))
            self.step += 1


class Tars:
    """WebDataset over tars of .npy members."""

    def __init__(self, folder: Path, arrays: dict[str, np.ndarray], batch: int, per_tar: int = 256) -> None:
        import webdataset

        with webdataset.ShardWriter(str(folder / "%05d.tar"), maxcount=per_tar, verbose=0) as writer:
            for row in range(len(arrays["row"])):
                writer.write({"__key__": f"{row:06d}", **{f"{name}.npy": arrays[name][row] for name in NAMES}})
        tars = sorted(str(path) for path in folder.glob("*.tar"))
        self.pipeline = (
            webdataset.WebDataset(tars, shardshuffle=100, seed=0)
            .shuffle(1000)
            .decode()
            .to_tuple(*(f"{name}.npy" for name in NAMES))
            .batched(batch)
        )

    def epoch(self) -> Iterator[Batch]:
        for parts in self.pipeline:
            yield tuple(torch.from_numpy(part) for part in parts)


class Chunks:
    """litdata: chunks that it writes and streams from a folder, in its own shuffled order."""

    def __init__(self, folder: Path, arrays: dict[str, np.ndarray], batch: int) -> None:
        import litdata
        from litdata.streaming.writer import BinaryWriter

        (folder / "chunks").mkdir()
        writer = BinaryWriter(str(folder / "chunks"), chunk_bytes="64MB")
        for row in range(len(arrays["row"])):
            writer[row] = {name: torch.from_numpy(np.asarray(arrays[name][row])) for name in NAMES}
        writer.done()
        writer.merge()
        self.rows = litdata.StreamingDataset(str(folder / "chunks"), shuffle=True, seed=0)
        self.loader = litdata.StreamingDataLoader(self.rows, batch_size=batch, num_workers=0)

    def epoch(self) -> Iterator[Batch]:
        for got in self.loader:
            yield tuple(got[name] for name in NAMES)


class Arrow:
    """Hugging Face datasets: arrow files, memory-mapped, rows by number in the order that ours takes."""

    def __init__(self, folder: Path, arrays: dict[str, np.ndarray], batch: int) -> None:
        import datasets

        kinds: dict[str, Any] = {}
        for name in NAMES:
            shape, dtype = arrays[name].shape[1:], str(arrays[name].dtype)
            nested = {2: datasets.Array2D, 4: datasets.Array4D}.get(len(shape))
            value = datasets.Value(dtype)
            kinds[name] = nested(shape, dtype) if nested else datasets.List(value, shape[0]) if shape else value
        whole = datasets.Dataset.from_dict(dict(arrays), features=datasets.Features(kinds))
        datasets.disable_progress_bars()
        whole.save_to_disk(folder / "arrow")
        self.rows = datasets.load_from_disk(folder / "arrow")
        self.rows.set_format("numpy")
        self.batch, self.step = batch, 0

    def epoch(self) -> Iterator[Batch]:
        for _ in range(len(self.rows) // self.batch):
            got = self.rows[batch_rows(0, self.step, self.batch, len(self.rows))]
            yield tuple(torch.from_numpy(np.ascontiguousarray(got[name])) for name in NAMES)
            self.step += 1


def hold_equal(name: str, batches: Iterator[Batch], arrays: dict[str, np.ndarray]) -> None:
    """An epoch holds every clip once, with the bytes and dtypes that went in. Raises DifferentError."""
    parts = [torch.cat(column) for column in zip(*batches, strict=True)]
    order = parts[-1].argsort()
    for key, part in zip(NAMES, parts, strict=True):
        wanted = torch.from_numpy(arrays[key])
        if part.dtype != wanted.dtype or not torch.equal(part[order], wanted):
            raise common.DifferentError(f"{name} does not give back {key} ({part.dtype} {tuple(part.shape)})")


def run(small: bool = False) -> dict[str, Any]:
    settings = config.build(presets.values("demo"))
    batch, clips, rounds = settings.expert.batch, (64, 1024)[not small], (3, 15)[not small]
    arrays = common.clip_arrays(settings, clips)
    known = {"webdataset": Tars, "litdata": Chunks, "datasets (arrow, numpy format)": Arrow}
    with tempfile.TemporaryDirectory() as name, common.Benchmark("cache_reading", WHAT, PACKAGES) as b:
        peers = {key: kind for key, kind in known.items() if b.has(key.partition(" ")[0])}
        contenders: dict[str, Any] = {}
        for number, (key, kind) in enumerate({"archipel": Mapped, **peers}.items()):
            folder = Path(name) / str(number)
            folder.mkdir()
            contenders[key] = kind(folder, arrays, batch)
            hold_equal(key, contenders[key].epoch(), arrays)
        calls = {key: lambda one=one: deque(one.epoch(), maxlen=0) for key, one in contenders.items()}
        seconds = common.interleave(calls, rounds)
        case = f"{clips} clips in batches of {batch}"
        for peer in peers:
            b.rows.append(common.versus(case, peer, seconds["archipel"], seconds[peer], aim=1.0))
        size = sum(array.nbytes for array in arrays.values())
        b.facts |= {"clips": clips, "batch": batch, "kilobytes per clip": round(size / clips / 1000, 1)}
        for key, taken in seconds.items():
            rate = clips / sorted(taken.wall)[len(taken.wall) // 2]
            b.facts[f"clips per second, {key}"] = round(rate)
    return b.record


if __name__ == "__main__":
    common.main(__doc__, run)
