"""Networks in a bounded memory: what was used longest ago makes room, and comes back from the host or from disk.

The bound is on the bytes of the weights that are held on the device (on the CPU: in its memory): experts, monolith, router, and
the base where experts are adapters. Codec, text encoders and activations are not counted. It holds while a network is fetched,
too: room is made before, and what is read is taken over, not copied.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from torch import nn

from archipel.errors import ArchipelError

logger = logging.getLogger("archipel")


def bytes_of(network: nn.Module) -> int:
    """Bytes of the storages of a network's parameters and buffers, shared ones counted once."""
    storages = {
        one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()
        for one in (*network.parameters(), *network.buffers())
    }
    return sum(storages.values())


@dataclass
class _Held:
    value: Any
    size: int
    pinned: bool = False


class Shelf:
    """Least recently used out. ``bound``, ``host``: bytes on the device, and bytes that what leaves it may take on the host
    (None: no bound; 0: nothing, it is read from disk again). ``host`` is of use where the device is not the CPU.

    Not for several threads at once: the caller holds a lock, for as long as it uses what it was given where there is a bound.
    """

    def __init__(self, bound: int | None = None, host: int | None = 0, device: str = "cpu") -> None:
        self.bound, self.host, self.device = bound, host if device != "cpu" else 0, device
        self.fetched: dict[Hashable, int] = {}  # how often each was read from disk
        self._near: OrderedDict[Hashable, _Held] = OrderedDict()
        self._far: OrderedDict[Hashable, _Held] = OrderedDict()

    @property
    def used(self) -> int:
        """Bytes on the device."""
        return sum(one.size for one in self._near.values())

    @property
    def used_on_host(self) -> int:
        return sum(one.size for one in self._far.values())

    def __contains__(self, key: object) -> bool:
        return key in self._near

    def held(self) -> list[Any]:
        return [*self._near, *self._far]

    def get(
        self,
        key: Hashable,
        load: Callable[[], Any],
        size: Callable[[], int],
        *,
        pinned: bool = False,
        passing: int = 0,
        measure: bool = True,
    ) -> Any:
        """What ``key`` stands for, on the device; ``load()`` reads it and puts it there, ``size()`` says how large it will be.

        pinned: it never makes room for others. passing: bytes that loading takes beside it. measure: its size is counted
        once it is there, else believed. Raises ArchipelError where it does not fit beside what is pinned.
        """
        if key in self._near:
            self._near.move_to_end(key)
            return self._near[key].value
        back = self._far.pop(key, None)
        wanted = back.size if back is not None else size()
        self._make_room(key, wanted + (0 if back else passing))
        if back is not None:
            back.value.to(self.device)
            self._near[key] = back
            return back.value
        value = load()
        self.fetched[key] = self.fetched.get(key, 0) + 1
        found = bytes_of(value) if measure and isinstance(value, nn.Module) else wanted
        if found > wanted:  # tables that the file does not hold
            self._make_room(key, found)
        self._near[key] = _Held(value, found, pinned)
        return value

    def drop(self, key: Hashable) -> None:
        self._near.pop(key, None)
        self._far.pop(key, None)

    def _make_room(self, key: Hashable, size: int) -> None:
        if self.bound is None:
            return
        pinned = sum(one.size for one in self._near.values() if one.pinned)
        if pinned + size > self.bound:
            beside = f" beside the {pinned} that always stay (router, base)" if pinned else ""
            raise ArchipelError(
                f"memory = {self.bound} bytes is too little: {_title(key)} needs {size}{beside}; "
                f"give at least {pinned + size} (--memory {-(-(pinned + size) // 10**6)}MB)"
            )
        while self.used + size > self.bound:
            oldest = next(one for one, held in self._near.items() if not held.pinned)
            self._leave(oldest, self._near.pop(oldest))

    def _leave(self, key: Hashable, held: _Held) -> None:
        logger.debug("%s makes room", _title(key))
        if self.host != 0 and isinstance(held.value, nn.Module):
            while self._far and self.host is not None and self.used_on_host + held.size > self.host:
                self._far.popitem(last=False)
            if self.host is None or held.size <= self.host:
                held.value.to("cpu")
                self._far[key] = held
                return
        _let_go(held)


def _let_go(held: _Held) -> None:
    """Free it now, also where it refers to itself in a circle, which the collector would find only later."""
    try:
        watch = weakref.ref(held.value)
    except TypeError:
        return
    held.value = None
    if watch() is not None:
        gc.collect()


def _title(key: Hashable) -> str:
    name = str(key[0]) if isinstance(key, tuple) else str(key)
    return f"expert {name}" if name.isdigit() else f"the {name}"
