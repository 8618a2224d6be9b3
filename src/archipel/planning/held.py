"""Bytes of tensor memory that are alive, now and at most, counted as operations make and drop them.

Works for real tensors and for fake ones (``torch._subclasses.FakeTensorMode``), which have shapes and lifetimes and no
memory: a training step of a network of any size can be played through on any machine. Counted are whole storages, once,
from the operation that first returns them to the moment when the last tensor on them is gone. What a kernel allocates
for itself and frees before it returns is not seen.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """``now`` and ``peak``: bytes held by tensors that were made inside the block; ``peak_beside``: at most, beside those that
    were settled (gradients that stay until the step's end)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.peak_beside = self._settled = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, Tensor):
                self._add(value)
        return made

    def reset_peak(self) -> None:
        """Begin a new peak from what is held now, with nothing settled."""
        self.peak = self.peak_beside = self.now
        self._settled = 0

    def settle_gradient(self, parameter: Tensor) -> None:
        """From now on this parameter's gradient does not count in ``peak_beside``."""
        assert parameter.grad is not None
        self._settled += parameter.grad.untyped_storage().nbytes()

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known[key] = weakref.ref(storage, functools.partial(self._gone, key, size))
        self.now += size
        self.peak = max(self.peak, self.now)
        self.peak_beside = max(self.peak_beside, self.now - self._settled)

    def _gone(self, key: int, size: int, _: Any) -> None:
        self.now -= size
        self._known.pop(key, None)


@contextlib.contextmanager
def fake() -> Iterator[None]:
    """Tensors made inside the block have no memory. Tables that backbones remember between calls are forgotten before and
    after, since a real computation must not meet a fake one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    _forget()
    try:
        with FakeTensorMode():
            yield
    finally:
        _forget()


def _forget() -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("archipel.backbones"):
            for value in vars(module).values():
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()


@contextlib.contextmanager
def weightless() -> Iterator[None]:
    """Modules made inside the block have shapes and no memory, and torch's random state is left as it was."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        yield
