"""Archipel trains one text-to-video diffusion model on machines that never talk to each other.

Importing this package is cheap: torch, diffusers and the encoders are imported by the modules that use them.
"""

import logging

__version__ = "0.1.0"

# Version of every file format in a run folder. A newer one is refused, naming the version of Archipel needed.
FORMAT = 1

# diffusers imports torchao wherever that is installed; what it then says of kernels that do not load concerns no user here.
for _loud in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao"):
    logging.getLogger(_loud).setLevel(logging.ERROR)


_LAZY = {"Archipelago": "archipel.ensemble.pipeline", "ArchipelPipeline": "archipel.exchange.pipeline"}


def __getattr__(name: str) -> object:
    """``archipel.Archipelago`` and ``archipel.ArchipelPipeline``, imported when they are first asked for."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'archipel' has no attribute {name!r}")
