"""What *prepare* does with an autoencoder and with text encoders from outside: into the run, checked, with a card.

``RUN/codec`` gets the autoencoder with what a round trip costs, ``RUN/text`` the text encoders with their tokenizers. What
is there is left alone, and the outside path is not looked at again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from archipel import config as configuration
from archipel import store
from archipel.encoders import outside, resolving
from archipel.errors import ArchipelError
from archipel.progress import StopFlag
from archipel.run import Run

if TYPE_CHECKING:
    from torch import Tensor

    from archipel.encoders.codecs import ClipRows

_CLIPS = 64  # of a split whose round trip is measured: an autoencoder's costs seconds a clip at full size
_AT_ONCE = 8


def take_codec(
    run: Run, rows: ClipRows, splits: Mapping[str, np.ndarray], spec: Mapping[str, Any], stop: StopFlag | None
) -> dict[str, Any]:
    """``codec.path`` into ``run.codec``, and its round trip on the first clips of each of ``splits``; returns the card.

    Raises ArchipelError where it is not the autoencoder that ``run.toml`` was resolved for.
    """
    from archipel.encoders import autoencoders

    config = run.config.codec
    if not config.path:
        raise ArchipelError(
            f"codec.path is empty in {run.root / 'run.toml'}: make a run with `archipel init --codec FOLDER`"
        )
    (run.codec / "card.json").unlink(missing_ok=True)
    files = outside.take(config.path, resolving.VAE, run.codec, "codec.path", sha256=config.sha256)
    codec = autoencoders.load(run.codec, tiling=config.tiling)
    autoencoders.check(codec, config)
    report = {name: _round_trip(codec, rows, chosen[:_CLIPS], stop) for name, chosen in splits.items() if len(chosen)}
    return store.write_card(run.codec, "codec", run.id, files, codec=codec.facts(), spec=dict(spec), round_trip=report)


def _round_trip(codec: Any, rows: ClipRows, chosen: np.ndarray, stop: StopFlag | None) -> dict[str, Any]:
    """``codecs.round_trip`` on some clips, and mean and standard deviation of their latents (about 0 and 1 are expected)."""
    from archipel.encoders import codecs

    device = codecs.device_of(codec)
    seen: list[Tensor] = []

    class Measured:
        """The codec, remembering the sums over the latents that pass."""

        patch, causal = codec.patch, codec.causal

        def encode(self, clips: Tensor) -> Tensor:
            latents: Tensor = codec.encode(clips.to(device))
            seen.append(latents.double().cpu().flatten())
            return latents

        def decode(self, latents: Tensor) -> Tensor:
            return codec.decode(latents).cpu()  # type: ignore[no-any-return]

    def batches() -> Iterator[Tensor]:
        for begin in range(0, len(chosen), _AT_ONCE):
            if stop:
                raise stop.error("prepare")
            yield codecs.from_uint8(rows[chosen[begin : begin + _AT_ONCE]])

    report = codecs.round_trip(Measured(), batches())  # type: ignore[arg-type]
    count = sum(len(part) for part in seen)
    mean = sum(float(part.sum()) for part in seen) / count
    square = sum(float(part.square().sum()) for part in seen) / count
    return {**report, "latent_mean": mean, "latent_std": max(square - mean**2, 0.0) ** 0.5, "clips": len(chosen)}


def take_text(run: Run) -> dict[str, Any]:
    """``text.path`` into ``run.text``; returns the card. Raises ArchipelError where it is not what ``run.toml`` was resolved for."""
    config = run.config.text
    card = store.read_card(run.text, "text")
    if card is not None and run.done(run.text) and not store.check_card(run.text):
        return card
    if not config.path:
        raise ArchipelError(
            f"text.path is empty in {run.root / 'run.toml'}: make a run with `archipel init --text FOLDER`"
        )
    found = resolving.text_values(config.path)
    for key in ("encoder", "width", "pooled_width", *(["sha256"] if config.sha256 else [])):
        if found[key] != getattr(config, key):
            raise ArchipelError(
                f"text.path = {config.path!r} is not what the run was made for: text.{key} is {getattr(config, key)!r} in run.toml, "
                f"and {found[key]!r} there: restore it, or make a new run with it"
            )
    (run.text / "card.json").unlink(missing_ok=True)
    files = outside.take_text(resolving.text_places(config.path, weights=True), run.text, "text.path")
    return store.write_card(run.text, "text", run.id, files, text=configuration.written(config))
