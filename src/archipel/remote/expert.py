"""A remote expert as a ``Velocity``: asked over a link, its answers held to what a velocity can be before anything is mixed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from archipel.contracts import Conditioning
from archipel.ensemble.settings import Settings
from archipel.errors import ArchipelError, LostExpertError
from archipel.remote import wire
from archipel.remote.link import Link
from archipel.remote.wire import Shapes

# Root mean squares that are still believed. A velocity is noise minus clip, both of about unit variance: 1.4; where the state has
# run away under guidance it grows with it. Chosen by that reasoning, with room.
MOST_VELOCITY = 8.0  # times (1 + rms(x)) (|a| + |b|), and over max(t, T_FLOOR) for networks that predict x0
MOST_LATENT = 16.0  # of a whole clip
T_FLOOR = 0.05  # v = (x - x0) / t magnifies an error by 1 / t at most so much before a head is not to blame

T = TypeVar("T")


@dataclass(frozen=True)
class Offer:
    """What a remote expert is and takes, as it was admitted: ``version`` is the sha256 of its card; ``rows``: clips in a
    request; ``steps``: of a whole clip; ``prediction``: what its network predicts."""

    name: str
    version: str
    shapes: Shapes
    prediction: str
    rows: int
    steps: int


class Later(Generic[T]):
    """What ``work`` gives, from a thread that holds up neither the caller nor the end of the process."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._found: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="remote expert")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._found = [self._work()]
        except BaseException as error:
            self._error = error

    def there(self, seconds: float) -> bool:
        """Wait at most ``seconds`` for it; whether it came, or failed."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def __call__(self) -> T:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found[0]


class RemoteExpert:
    """``Velocity`` of one remote expert. ``fp16``: bodies of half the size; seconds: for one step, and for a whole clip.

    Once it failed it stays lost: every further question is refused at once. ``on_lost(reason)`` is told the first time.
    """

    ready = True

    def __init__(
        self,
        link: Link,
        offer: Offer,
        *,
        fp16: bool = False,
        seconds: float = 60.0,
        clip_seconds: float = 600.0,
        on_lost: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.link, self.offer, self.fp16 = link, offer, fp16
        self._seconds, self._clip_seconds, self._on_lost = seconds, clip_seconds, on_lost
        self._lost: str | None = None
        self._closed = False

    # --- velocities ----------------------------------------------------------------------------------------------

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        ones = torch.ones(len(x), device=x.device)
        return self.combined(x, t, cond, ones, ones * 0)

    def combined(self, x: Tensor, t: Tensor, cond: Conditioning, a: Tensor, b: Tensor) -> Tensor:
        """a v(c) + b v(null), like x, for a, b (B,): both branches in one request. Raises LostExpertError."""
        return self.ask(x, t, cond, a, b)()

    def ask(self, x: Tensor, t: Tensor, cond: Conditioning, a: Tensor, b: Tensor) -> Later[Tensor]:
        """``combined``, on its way while the caller does something else."""
        return Later(lambda: self._guarded(lambda: self._in_parts(x, t, cond, a, b)))

    def _in_parts(self, x: Tensor, t: Tensor, cond: Conditioning, a: Tensor, b: Tensor) -> Tensor:
        most, parts = self.offer.rows, []
        for begin in range(0, len(x), most):
            part = slice(begin, begin + most)
            parts.append(self._velocity(x[part], t[part], cond[part], a[part], b[part]))
        return torch.cat(parts)

    def _velocity(self, x: Tensor, t: Tensor, cond: Conditioning, a: Tensor, b: Tensor) -> Tensor:
        body = {"x": self._numbers(x, "x"), "t": _float32(t), "a": _float32(a), "b": _float32(b)}
        data = wire.pack({**body, **self._text(cond)})
        found = self._post(wire.VELOCITY, data, 4 * x.numel(), self._seconds)
        v = self._array(found, "v", tuple(x.shape)).to(x.device)
        check_velocity(v, x, t, a, b, self.offer.prediction)
        return v

    # --- whole clips ---------------------------------------------------------------------------------------------

    def takes(self, settings: Settings) -> bool:
        """Whether it makes whole clips with these settings."""
        return settings.steps <= self.offer.steps

    def ask_clips(self, seeds: Sequence[int], cond: Conditioning, settings: Settings) -> Later[Tensor]:
        """Latents float32 (B, C, T, H, W) of whole clips that this expert makes alone, on its way: one request for all, or
        for every ``rows`` of them. Raises LostExpertError when it is asked for."""
        return Later(lambda: self._guarded(lambda: self._clips(seeds, cond, settings)))

    def _clips(self, seeds: Sequence[int], cond: Conditioning, settings: Settings) -> Tensor:
        most, parts = self.offer.rows, []
        how = {"steps": str(settings.steps), "solver": settings.solver, "dtype": "F16" if self.fp16 else "F32"}
        how |= {"shift": repr(float(settings.shift)), "guidance": repr(float(settings.guidance))}
        for begin in range(0, len(seeds), most):
            own = seeds[begin : begin + most]
            body = {"seeds": np.array(own, np.int64), **self._text(cond[begin : begin + most])}
            shape = (len(own), *self.offer.shapes.latent)
            found = self._post(wire.LATENTS, wire.pack(body, how), 4 * int(np.prod(shape)), self._clip_seconds)
            x = self._array(found, "x", shape)
            _check_rms(x, torch.full((len(x),), MOST_LATENT), "clip")
            parts.append(x)
        return torch.cat(parts).to(cond.pooled.device)

    # --- what goes out and what comes back -----------------------------------------------------------------------

    def _numbers(self, tensor: Tensor, name: str) -> np.ndarray:
        array = _float32(tensor)
        return wire.half(array, name) if self.fp16 else array

    def _text(self, cond: Conditioning) -> dict[str, np.ndarray]:
        """The text as far as it is not padding, and given frames where there are some."""
        mask = cond.mask.detach().cpu().numpy()
        used = int(np.flatnonzero(np.any(mask, axis=0)).max(initial=-1)) + 1
        found = {"mask": mask[:, :used], "tokens": self._numbers(cond.tokens[:, :used], "tokens")}
        found["pooled"] = self._numbers(cond.pooled, "pooled")
        if cond.image is not None:
            found["image"] = self._numbers(cond.image, "image")
        return found

    def _post(self, path: str, data: bytes, most: int, seconds: float) -> dict[str, np.ndarray]:
        told = {"Content-Type": wire.MEDIA, wire.VERSION: self.offer.version}
        most += wire.HEADER + 8
        headers, answer = self.link.ask("POST", path, data, seconds=seconds, most=most, headers=told)
        if headers.get(wire.VERSION.lower()) != self.offer.version:
            raise LostExpertError("it is another expert than the one that was admitted: admit it again")
        return wire.unpack(answer)[0]

    def _array(self, found: dict[str, np.ndarray], name: str, shape: tuple[int, ...]) -> Tensor:
        wire.only(found, name)
        return torch.from_numpy(wire.expect(found, name, shape, "F16" if self.fp16 else "F32").astype(np.float32))

    def _guarded(self, work: Callable[[], Tensor]) -> Tensor:
        if self._lost is not None:
            raise LostExpertError(self._lost)
        try:
            return work()
        except ArchipelError as error:  # an address that may not be asked, a body that is not right, no answer
            self._lost = str(error)
            if not self._closed:  # else it was we who went away: no fault of its own
                self._on_lost(self._lost)
            raise LostExpertError(self._lost) from error

    def close(self) -> None:
        """Give up what is on its way; ``on_lost`` is not told. The expert is not asked again."""
        self._closed = True
        self.link.close()


def check_velocity(v: Tensor, x: Tensor, t: Tensor, a: Tensor, b: Tensor, prediction: str) -> None:
    """Hold each row of v (B, ...) = a v(c) + b v(null) at the state x, time t (B,), to the largest that is believed.

    Finite numbers are assumed. Raises LostExpertError.
    """
    bound = MOST_VELOCITY * (1 + _rms(x)) * (a.abs() + b.abs()).float()
    if prediction != "velocity":
        bound = bound / t.float().clamp(min=T_FLOOR)
    _check_rms(v, bound, "velocity")


def _check_rms(values: Tensor, bound: Tensor, what: str) -> None:
    found = _rms(values)
    wrong = (~(found <= bound.to(found.device))).nonzero()[:, 0]
    if len(wrong):
        row = int(wrong[0])
        raise LostExpertError(
            f"it answered with a {what} of root mean square {float(found[row]):.3g}, at most {float(bound[row]):.3g} is believed"
        )


def _rms(values: Tensor) -> Tensor:
    """(B, ...) -> (B,), float32."""
    return values.float().flatten(1).square().mean(1).sqrt()


def _float32(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to("cpu", torch.float32).numpy()
