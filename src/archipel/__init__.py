"""Archipel trains one text-to-video diffusion model on machines that never talk to each other.

Importing this package is cheap: torch, diffusers and the encoders are imported by the modules that use them.
"""

__version__ = "0.1.0"

# Version of every file format in a run folder. A newer one is refused, naming the version of Archipel needed.
FORMAT = 1
