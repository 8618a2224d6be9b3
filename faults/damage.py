"""Damaged files, in a bucket and in run folders: each is refused by name or healed, and never silently used.

Every case damages one file (or swaps it with another), reads it by the very functions that `join`, `train`, `generate`,
`admit` and `verify` read it by, compares what came of it with what the whole file gave, and puts the file back.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from archipel import pipeline, store
from archipel.backbones import base
from archipel.errors import ArchipelError
from archipel.islands import home, keys
from archipel.islands.admission import admit
from archipel.islands.bucket import Bucket
from archipel.islands.claims import read_state
from archipel.islands.objects import Objects
from archipel.islands.remote import fetch_admitted, read_admitted
from archipel.progress import StopFlag
from archipel.run import Run
from archipel.training import checkpoint
from archipel.training.batches import open_shard
from archipel.training.stage import train
from faults.common import Record, Store
from faults.islands import Zygote, check, weights, zygote_for
from faults.kills import publish
from faults.runs import make_run

KINDS = ("bit flip", "truncation", "missing", "swapped")
SAME, HEALED, REFUSED, SILENT = "read as before", "healed", "refused by name", "silently used"


@dataclass(frozen=True)
class Target:
    """A file that can be damaged. ``use`` gives SAME or HEALED, or raises what refuses it; ``names``: one is in the words."""

    what: str
    path: Path
    peers: tuple[Path, ...]
    use: Callable[[], str]
    names: tuple[str, ...] = ()


class WrongError(Exception):
    """Something else than the whole file's content came out, and nobody said so."""


# --- doing damage ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def damaged(target: Target, kind: str, chance: random.Random, aside: Path) -> Iterator[str]:
    """The target damaged for as long as the block runs; gives words that say how."""
    path = target.path
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    touched, words = [path], kind
    if kind == "swapped":
        different = [peer for peer in target.peers if peer.is_dir() or peer.read_bytes() != path.read_bytes()]
        touched.append(chance.choice(different))
    for number, file in enumerate(touched):
        (shutil.copytree if file.is_dir() else shutil.copy2)(file, aside / str(number))
    try:
        if kind == "swapped":
            _remove(path)
            _remove(touched[1])
            _copy(aside / "1", path)
            _copy(aside / "0", touched[1])
            words += f" with {touched[1].parent.name}/{touched[1].name}"
        elif kind == "missing":
            _remove(path)
        else:
            data = bytearray(path.read_bytes())
            if kind == "bit flip":
                bit = chance.randrange(8 * len(data))
                data[bit // 8] ^= 1 << bit % 8
                words += f" at byte {bit // 8}"
            else:
                del data[chance.randrange(len(data)) :]
                words += f" to {len(data)} bytes"
            path.write_bytes(data)
        yield words
    finally:
        for number, file in enumerate(touched):
            _remove(file)
            _copy(aside / str(number), file)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    (shutil.copytree if source.is_dir() else shutil.copy2)(source, target)


# --- using what may be damaged ---------------------------------------------------------------------------------------


def digest(folder: Path) -> str:
    """One hash of a folder's files and their names."""
    found = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        found.update(f"{path.relative_to(folder)} {store.sha256_file(path)}\n".encode())
    return found.hexdigest()


def _checkpoint(found: checkpoint.Checkpoint | None) -> tuple[int, str]:
    """Step and content of a checkpoint that was taken for good."""
    if found is None:
        return 0, ""
    content = hashlib.sha256()
    for name in sorted(found.arrays):
        content.update(name.encode() + found.arrays[name].tobytes())
    content.update(store.sha256_json(found.manifest).encode())
    return found.step, content.hexdigest()


@dataclass
class Bench:
    """Everything that gets damaged: an owner's run, trained; a bucket, committed and admitted; one that is half done."""

    run: Run
    bucket: Path
    half: Path
    work: Path
    known: dict[str, dict[int, str]] = field(default_factory=dict)

    # Each of these reads by our own functions and tells SAME from HEALED, or raises.

    def local_checkpoint(self, name: str) -> str:
        step, content = _checkpoint(checkpoint.latest(self.run.expert(name) / "checkpoints", self.run.id, name))
        return self._judge(f"local {name}", step, content)

    def remote_checkpoint(self, name: str) -> str:
        bucket = Bucket.open(self.half, patience=2)
        run = home.materialise(bucket, self.work / "island")
        shutil.rmtree(run.expert(name), ignore_errors=True)
        run.expert(name).mkdir(parents=True)
        home.fetch_checkpoint(bucket, run, read_state(bucket.objects, name), set())
        step, content = _checkpoint(checkpoint.latest(run.expert(name) / "checkpoints", run.id, name))
        return self._judge(f"remote {name}", step, content)

    def _judge(self, which: str, step: int, content: str) -> str:
        table = self.known.setdefault(which, {})
        if not table:
            table[step] = content  # the first look is at whole files
        newest = max(table)
        if step in table:
            if table[step] != content:
                raise WrongError(f"the checkpoint of step {step} is another")
            return SAME if step == newest else HEALED
        if step > newest:
            raise WrongError(f"a checkpoint of step {step} appeared")
        table[step] = content  # an older one: what it holds is compared from now on
        return HEALED

    def shard(self, name: str) -> str:
        found = open_shard(self.run.shard(name))
        rows = hashlib.sha256()
        for clips in (found.train, found.validation):
            latents, cond, cluster = clips.take(slice(None))  # type: ignore[arg-type]
            for value in (latents, cond.tokens, cond.mask, cond.pooled, cluster):
                rows.update(value.numpy().tobytes())
        card = store.read_card(self.run.shard(name), "shard")
        return self._content(f"shard {name}", rows.hexdigest() + store.sha256_json(card))

    def island_shard(self, name: str) -> str:
        """An island's own copy of a shard: what is not as published is fetched again."""
        bucket, folder = Bucket.open(self.bucket, patience=2), self.work / "home"
        run = home.materialise(bucket, folder)
        before = digest(run.shard(name))
        home.fetch_shard(bucket, run, name, StopFlag())
        outcome = self._content(f"island {name}", digest(run.shard(name)))
        return HEALED if before != digest(run.shard(name)) else outcome

    def expert(self, name: str) -> str:
        """As `generate` reads it, then as `verify` does, which reads metrics as well."""
        facts, config, tensors = base.read_folder(self.run.expert(name), "train")
        content = hashlib.sha256(store.sha256_json([facts, config]).encode())
        for key in sorted(tensors):
            content.update(key.encode() + tensors[key].numpy().tobytes())
        _, problems = pipeline.verify(self.run)
        if problems:
            raise ArchipelError(f"{problems[0].path} {problems[0].reason}")
        return self._content(f"expert {name}", content.hexdigest())

    def published(self) -> str:
        bucket = Bucket.open(self.bucket, patience=2)
        folder = self.work / "published"
        shutil.rmtree(folder, ignore_errors=True)
        for key in bucket.files:
            bucket.fetch(key, folder / key)
        return self._content("published", digest(folder) + bucket.id)

    def result(self, name: str) -> str:
        """As `admit` reads it, on a copy of the bucket that it may write to."""
        copy = self.work / "admission"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.bucket, copy, ignore=shutil.ignore_patterns("checkpoints", "admitted"))
        answer = admit(copy, name)
        if not answer.admitted:
            raise ArchipelError(f"{answer.rule}: {answer.detail}")
        pointer = read_admitted(Objects.open(copy), name)
        return self._content(f"result {name}", digest(copy / keys.ADMITTED / pointer.sha256) if pointer else "")

    def admitted(self, name: str) -> str:
        objects = Objects.open(self.bucket, patience=2)
        pointer = read_admitted(objects, name)
        if pointer is None:
            raise ArchipelError(f"{keys.admitted(name)}: not admitted")
        folder = self.work / "fetched"
        shutil.rmtree(folder, ignore_errors=True)
        fetch_admitted(objects, pointer, self.run.id, folder)
        return self._content(f"admitted {name}", digest(folder))

    def _content(self, which: str, content: str) -> str:
        if self.known.setdefault(which, {0: content})[0] != content:
            raise WrongError(f"{which}: other content than that of the whole file")
        return SAME

    # What there is to damage.

    def targets(self) -> list[Target]:
        found = [*self._checkpoints(), *self._shards()]
        card = "card.json"
        for name, other in (("0", "1"), ("1", "0")):
            folder, peer = self.run.expert(name), self.run.expert(other)
            for file in ("model.safetensors", card, "config.json", "metrics.jsonl"):
                peers = (peer / file, folder / "progress.json" if file != card else folder / "config.json")
                what = {card: "card of a trained expert"}.get(file, "file of a trained expert")
                found.append(self._one(what, folder / file, peers, partial(self.expert, name)))
            result = self.bucket / keys.result(name, 1)
            peer = self.bucket / keys.result(other, 1)
            for file in ("model.safetensors", card, "config.json", "metrics.jsonl"):
                what = "card of a committed result" if file == card else "file of a committed result"
                peers = (peer / file, result / ("metrics.jsonl" if file != "metrics.jsonl" else card))
                found.append(self._one(what, result / file, peers, partial(self.result, name)))
            commits = (self.bucket / keys.committed(other), result / card)
            committed = self.bucket / keys.committed(name)
            found.append(self._one("committed.json", committed, commits, partial(self.result, name)))
            found += self._admitted(name, other)
        files = (self.bucket / keys.RUN, self.bucket / keys.PUBLISHED)
        published = ("run.toml", "there is no run", "published", "shards/", "codec/")
        found.append(Target("run.toml in the bucket", files[0], files[1:], self.published, published))
        found.append(Target("published.json", files[1], files[:1], self.published, published))
        return found

    @staticmethod
    def _one(what: str, path: Path, peers: tuple[Path, ...], use: Callable[[], str]) -> Target:
        names = {part for file in (path, *peers) for part in (file.name, file.parent.name) if not part.isdigit()}
        names |= {file.parent.name for file in (path, *peers) if len(file.parent.name) == 8}  # a step
        names |= {"/".join(file.parent.parts[-2:]) for file in (path, *peers)}
        return Target(what, path, peers, use, tuple(sorted(names)))

    def _checkpoints(self) -> list[Target]:
        found = []
        for name, other in (("0", "1"), ("1", "0")):
            for where, root, use in (
                ("a run folder", self.run.expert(name) / "checkpoints", partial(self.local_checkpoint, name)),
                ("the bucket", self.half / keys.checkpoints(name, 1), partial(self.remote_checkpoint, name)),
            ):
                newest, older = sorted(root.iterdir(), reverse=True)[:2]
                of_other = Path(str(newest).replace(*_other(name, other)))
                for file, what in (("state.safetensors", "checkpoint"), ("manifest.json", "manifest of a checkpoint")):
                    peers = (older / file, of_other / file)
                    found.append(self._one(f"{what} in {where}", newest / file, peers, use))
                found.append(self._one(f"whole checkpoint in {where}", newest, (older, of_other), use))
        return found

    def _shards(self) -> list[Target]:
        found = []
        for name, other in (("0", "1"), ("1", "all"), ("all", "0")):
            job = "monolith" if name == "all" else name
            for where, root, use in (
                ("a run folder", self.run.root, partial(self.shard, job)),
                ("the bucket", self.bucket, self.published),
                ("an island's folder", self.work / "home", partial(self.island_shard, job)),
            ):
                folder = root / "shards" / name
                for file in ("train.safetensors", "validation.safetensors", "card.json"):
                    peers = (
                        root / "shards" / other / file,
                        folder / ("card.json" if file[0] != "c" else "train.safetensors"),
                    )
                    what = f"card of a shard in {where}" if file == "card.json" else f"shard in {where}"
                    found.append(self._one(what, folder / file, peers, use))
        return found

    def _admitted(self, name: str, other: str) -> list[Target]:
        folders = {}
        for job in (name, other):
            pointer = read_admitted(Objects.open(self.bucket), job)
            assert pointer is not None
            folders[job] = self.bucket / keys.ADMITTED / pointer.sha256
        pointers = tuple(self.bucket / keys.admitted(job) for job in (name, other))
        use = partial(self.admitted, name)
        found = [self._one("pointer to an admitted expert", pointers[0], pointers[1:], use)]
        for file in ("model.safetensors", "card.json", "config.json"):
            what = "card of an admitted expert" if file == "card.json" else "file of an admitted expert"
            peers = (
                folders[other] / file,
                folders[name] / ("model.safetensors" if file != "model.safetensors" else "card.json"),
            )
            found.append(self._one(what, folders[name] / file, peers, use))
        return found


def _other(name: str, other: str) -> tuple[str, str]:
    """What turns a path of one job into that of another, in a run folder and in a bucket alike."""
    return f"/{name}/", f"/{other}/"


# --- the run ---------------------------------------------------------------------------------------------------------


def prepare(work: Path, zygote: Zygote) -> Bench:
    run = make_run(work / "run", steps=60, every=10, lease=6.0)
    bucket, half = work / "bucket", work / "half"
    where = Store("file", f"file://{bucket}", folder=bucket)
    publish(run, zygote, where)
    code, said = zygote.run("join", where.url, "--threads", 1, "--work", work / "first")
    if code != 0:
        raise RuntimeError(f"join ends with {code}: {said}")
    for name in run.expert_names:
        train(run, name, threads=1)
    shutil.copytree(bucket, half)
    for name in run.expert_names:
        (half / keys.committed(name)).unlink()
        answer = admit(bucket, name)
        if not answer.admitted:
            raise RuntimeError(f"expert {name} is not admitted: {answer.rule}: {answer.detail}")
    bench = Bench(run, bucket, half, work)
    opened = Bucket.open(bucket)
    own = home.materialise(opened, work / "home")
    for name in ("0", "1", "monolith"):
        home.fetch_shard(opened, own, name, StopFlag())
    return bench


def judge(target: Target) -> tuple[str, str]:
    """What came of using a target as it is now: outcome and words."""
    words = io.StringIO()
    handler = logging.StreamHandler(words)
    logging.getLogger("archipel").addHandler(handler)
    try:
        with contextlib.redirect_stderr(words):
            outcome = target.use()
    except ArchipelError as error:
        named = any(name in str(error) for name in target.names)
        return (REFUSED if named else "refused, unnamed"), str(error)
    except WrongError as error:
        return SILENT, str(error)
    except Exception as error:
        return "internal error", f"{type(error).__name__}: {error}"
    finally:
        logging.getLogger("archipel").removeHandler(handler)
    return outcome, words.getvalue().strip()[:300]


def run(count: int, seed: int, work: Path) -> dict[str, Any]:
    """``count`` damaged files, every kind of file and of damage alike; a sample of them under a whole `join`."""
    chance, work = random.Random(seed), work / "damage"
    table: dict[str, Counter[str]] = {}
    with Record("damage", "damaged files: bit flips, truncations, missing, swapped", count, seed) as record:
        with zygote_for(work) as zygote:
            bench = prepare(work, zygote)
            targets = bench.targets()
            for target in targets:
                first, said = judge(target)
                if first != SAME:
                    raise RuntimeError(f"{target.what} {target.path} whole: {first}: {said}")
            sample = max(4, count // 25)
            cases = [(target, kind) for target in targets for kind in KINDS]
            cases = [case for case in cases if case[0].path.is_file() or case[1] in ("missing", "swapped")]
            chance.shuffle(cases)
            for number in range(count - sample):
                target, kind = cases[number % len(cases)]
                with damaged(target, kind, chance, work / "aside") as how:
                    outcome, said = judge(target)
                _note(record, table, target, kind, outcome, how, said)
            _joins(record, table, bench, zygote, chance, sample)
        outcomes = sorted({outcome for counts in table.values() for outcome in counts})
        for what in sorted(table):
            record.rows.append({"file": what, **{outcome: table[what][outcome] for outcome in outcomes}})
        total: Counter[str] = sum(table.values(), Counter())
        record.facts = {outcome: total[outcome] for outcome in outcomes} | {
            "files that are damaged in turn": len(targets)
        }
    return record.value


def _words(target: Target, said: str) -> str:
    """The line that says it, without this machine's folders."""
    lines = [line for line in said.splitlines() if not line.startswith("fetch shard")]
    if target.what.startswith("join"):
        lines = [line for line in lines if "passed over" in line or "error:" in line] or ["the job goes on"]
    said = re.sub(
        r"(/[\w.-]+)+/(run|bucket|half|admission|home|island|join-\d+|joined-\d+)\b", r"\2", lines[0] if lines else ""
    )
    return said[-240:] or ("the one before it is used" if "checkpoint" in target.what else "fetched again")


def _note(
    record: Record, table: dict[str, Counter[str]], target: Target, kind: str, outcome: str, how: str, said: str
) -> None:
    record.made += 1
    table.setdefault(target.what, Counter())[outcome] += 1
    if outcome not in (SAME, HEALED, REFUSED):
        record.problem(f"{target.path}: {how}: {outcome}: {said}")
    elif outcome == SAME and kind != "bit flip":
        record.problem(f"{target.path}: {how} was not noticed")
    elif outcome != SAME:
        record.refusals.setdefault(f"{target.what}, {kind}", _words(target, said))


def _joins(
    record: Record, table: dict[str, Counter[str]], bench: Bench, zygote: Zygote, chance: random.Random, sample: int
) -> None:
    """The whole command on damaged files: it goes on to the same weights, or ends with 2 and goes on when mended."""
    wanted = weights(Store("file", f"file://{bench.bucket}"))
    for number in range(sample):
        copy, name = bench.work / f"join-{number}", chance.choice(("0", "1"))
        shutil.copytree(bench.half, copy)
        where = Store("file", f"file://{copy}", folder=copy)
        steps = sorted((copy / keys.checkpoints(name, 1)).iterdir(), reverse=True)
        paths = [
            steps[0] / "state.safetensors", steps[0] / "manifest.json", copy / keys.claim(name, 1),
            copy / keys.heartbeat(name, 1), copy / keys.shard(name) / "train.safetensors", copy / keys.PUBLISHED,
        ]  # fmt: skip
        path = paths[number % len(paths)]
        peers = (steps[1] / path.name,) if path.parent == steps[0] else (copy / "codec" / "card.json",)
        kind = KINDS[number // len(paths) % len(KINDS)]
        what = f"join: {path.name if 'claims' not in path.parts else 'claim'}"
        target = Target(what, path, peers, lambda: SAME)
        words = ("join", where.url, "--threads", 1, "--work", bench.work / f"joined-{number}")
        with damaged(target, kind, chance, bench.work / "aside") as how:
            code, said = zygote.run(*words)
        outcome = {0: HEALED, 2: REFUSED}.get(code, f"ended with {code}")
        if code == 0 and path.name == keys.PUBLISHED:
            outcome = SAME  # an entry was hit that this island does not use
        if code == 2:
            named = [line for line in said.splitlines() if "error:" in line]
            said = named[-1] if named else said[-300:]
            if not any(part in said for part in (path.name, path.stem, "shards/", "published", "run.toml")):
                outcome = "refused, unnamed"
            again, more = zygote.run(*words)
            if again != 0:
                record.problem(f"{what}: {how}: mended, it ends with {again}: {more[-300:]}")
        _note(record, table, target, kind, outcome, how, said)
        check(record, zygote, where, wanted, f"{what}, {how}")
        shutil.rmtree(copy)
        shutil.rmtree(bench.work / f"joined-{number}", ignore_errors=True)
