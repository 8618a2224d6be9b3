"""``ArchipelPipeline``: an exported run as a ``DiffusionPipeline`` of diffusers.

The schedulers are diffusers' own and exchangeable; strategies, guidance and routing are ``archipel.ensemble``'s, so that the
same noise gives the same frames as ``Archipelago.generate`` on the run itself.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import torch
from diffusers.pipelines import pipeline_utils
from diffusers.utils.outputs import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from archipel import FORMAT
from archipel import config as configuration
from archipel.contracts import Conditioning
from archipel.ensemble import strategies
from archipel.ensemble.images import check_given, read_frames
from archipel.ensemble.pipeline import Archipelago, Settings
from archipel.ensemble.settings import check_prompts, check_seeds
from archipel.errors import ArchipelError
from archipel.exchange import adapted, opened
from archipel.exchange.loaded import LoadedParts
from archipel.flow import draws

if TYPE_CHECKING:
    from archipel.ensemble.images import Pictures

OPTIONAL = ("text_encoder_2", "tokenizer_2", "router", "transformer", "monolith")
REQUIRED = ("scheduler", "vae", "text_encoder", "tokenizer")
_EXPERT = re.compile(r"expert_[0-9]{1,3}")
_MADE_BY = "an ArchipelPipeline needs archipel={...}, which `archipel export` writes: use from_pretrained"
_OUTPUTS = ("np", "pt", "pil", "latent")
OnStepEnd = Callable[..., dict[str, Any] | None]


@dataclass
class ArchipelPipelineOutput(BaseOutput):
    """``frames``: as ``output_type`` asks, one clip per prompt and ``num_videos_per_prompt``; ``weights``: float32 (B, S, K),
    the share of each expert at each of the S evaluations (None for the monolith); ``warnings``: what was left out."""

    frames: Any
    weights: np.ndarray | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Negative(Conditioning):
    """Captions whose null condition is another caption: what guidance moves away from."""

    away: Conditioning | None = None

    def _of(self, cond: Conditioning, away: Conditioning | None) -> _Negative:
        return _Negative(cond.tokens, cond.mask, cond.pooled, cond.image, away)

    def __getitem__(self, rows: Tensor | slice) -> Conditioning:
        return self._of(super().__getitem__(rows), None if self.away is None else self.away[rows])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        return self._of(super().to(device, dtype), None if self.away is None else self.away.to(device, dtype))

    def given(self, image: Tensor | None) -> Conditioning:
        return self._of(super().given(image), None if self.away is None else self.away.given(image))

    def null(self) -> Conditioning:
        return super().null() if self.away is None else self.away


_Pipeline: Any = pipeline_utils.DiffusionPipeline  # diffusers has no types for these


class ArchipelPipeline(_Pipeline):  # type: ignore[misc]
    """Text to video by K experts and a router; made by ``archipel export RUN FOLDER``.

        pipe = ArchipelPipeline.from_pretrained(FOLDER)
        frames = pipe("a red ball moves left", num_inference_steps=20, generator=torch.manual_seed(0)).frames

    Components: scheduler, vae, text_encoder, tokenizer (and _2), router, expert_0, ..., monolith, each as in any pipeline of
    diffusers. ``archipel`` (in model_index.json) is what diffusers has no word for: the run's configuration, shapes, what a
    prediction means, the router's calibration.
    """

    # Experts are called in turn at every step, so that no sequence fits them: see ``_turn``.
    model_cpu_offload_seq = "text_encoder->text_encoder_2->router->vae"
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]
    _optional_components: ClassVar[list[str]] = list(OPTIONAL)

    def __new__(cls, *args: Any, **parts: Any) -> ArchipelPipeline:
        if args:
            raise ArchipelError(_MADE_BY)
        names = tuple(sorted((name for name in parts if _EXPERT.fullmatch(name)), key=lambda name: int(name[7:])))
        return object.__new__(_class(names) if cls is ArchipelPipeline else cls)

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        facts = parts.pop("archipel", None)
        if not isinstance(facts, Mapping) or not isinstance(facts.get("config"), Mapping):
            raise ArchipelError(_MADE_BY)
        if facts.get("format", FORMAT) > FORMAT:
            raise ArchipelError(
                f"this export has format {facts['format']}, this Archipel reads {FORMAT}: install a newer one"
            )
        self.register_modules(**dict.fromkeys(OPTIONAL) | parts)
        self.register_to_config(archipel=dict(facts))
        self.settings = configuration.build(facts["config"], "the export's configuration")
        self.video_processor = VideoProcessor(do_resize=False, vae_scale_factor=1)
        self._adapters: adapted.Adapters | None = None
        self._num_timesteps, self._guidance_scale, self._interrupt = 0, self.settings.sample.guidance, False

    # --- loading and saving ---------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> ArchipelPipeline:
        """The pipeline in a folder (or hub repository) that ``archipel export`` or ``save_pretrained`` wrote.

        Takes what ``DiffusionPipeline.from_pretrained`` takes (``torch_dtype``, components to replace, ...), except for code
        from elsewhere: only safetensors are read, and only classes of diffusers, transformers and Archipel are made.
        Raises ArchipelError where the folder is no such export.
        """
        folder, names = opened.open_export(pretrained_model_name_or_path, kwargs)
        load: Any = super(ArchipelPipeline, _class(names)).from_pretrained
        made = cast(ArchipelPipeline, load(str(folder), use_safetensors=True, **kwargs))
        facts = made.config["archipel"]
        if adapted.is_adapted(facts):
            made._adapters = adapted.Adapters(made.transformer, facts, folder)
        return made

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """As ``DiffusionPipeline.save_pretrained``; adapters go into folders of their own, beside the base alone."""
        if self._adapters is None:
            super().save_pretrained(save_directory, **kwargs)
            return
        network: Any = self.components["transformer"]
        self.transformer = adapted.without(network)
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.transformer = network
        self._adapters.save(Path(save_directory))

    # --- what diffusers' callers look at --------------------------------------------------------------------------

    @property
    def experts(self) -> dict[str, Any]:
        """{"0": network, ...}: the experts that are here; those that are adapters as what ``backbones.lora`` makes of them."""
        if self._adapters is not None:
            return {name: one for name, one in self._adapters.velocities.items() if name.isdigit()}
        return {name[len("expert_") :]: part for name, part in self.components.items() if _EXPERT.fullmatch(name)}

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def noise(self, seeds: Sequence[int] | int) -> Tensor:
        """The noise that ``archipel generate`` starts a clip of these seeds from, float32 (B, C, T, H, W)."""
        numbers = [seeds] if isinstance(seeds, int) else list(seeds)
        return torch.from_numpy(draws.clip_noise(check_seeds(numbers, len(numbers)), self.parts().latent_shape()))

    # --- generating -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seeds: Sequence[int] | int | None = None,
        latents: Tensor | None = None,
        strategy: str | None = None,
        composition: str | None = None,
        threshold: float | None = None,
        clusters: Sequence[int] | None = None,
        image: Pictures | None = None,
        last_image: Pictures | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ArchipelPipelineOutput | tuple[Any, ...]:
        """Clips for ``prompt``, each ``num_videos_per_prompt`` times. What is not given is as the run has it.

        The noise is ``latents`` (B, C, T, H, W), or that of ``seeds`` (the clips of ``archipel generate --seed``), or drawn
        with ``generator`` (one, or one per clip). ``negative_prompt`` replaces the null text. ``strategy``, ``composition``,
        ``threshold``, ``clusters``, and the pictures ``image`` and ``last_image`` that clips begin and end with: see
        ``Archipelago.generate``.
        output_type: "np" float32 (B, F, H, W, 3) in [0, 1], "pt" (B, F, 3, H, W), "pil" lists of images, or "latent".
        callback_on_step_end(pipe, i, t, {"latents": ...}) may return {"latents": others}.
        Raises ArchipelError naming what cannot be used.
        """
        prompts = [one for one in _texts(prompt) for _ in range(num_videos_per_prompt)]
        check_given(self.settings, image is not None, last_image is not None)
        self._check(prompts, output_type, callback_on_step_end_tensor_inputs, num_videos_per_prompt)
        given = {"strategy": strategy, "guidance": guidance_scale, "steps": num_inference_steps}
        settings = Settings.of(self.settings, **given, composition=composition, threshold=threshold)
        self._guidance_scale, self._interrupt = settings.guidance, False
        parts = self.parts()
        archipelago = Archipelago(parts)
        lineup = archipelago.lineup(settings, clusters, len(prompts))
        device = self._execution_device
        shape = parts.latent_shape()
        latents, numbers = self._start(shape, prompts, generator, seeds, latents, device)
        cond, cut = self._encode(archipelago, prompts, negative_prompt, num_videos_per_prompt)
        pictures = (_each(one, num_videos_per_prompt) for one in (image, last_image))
        frames = [read_frames(one, len(prompts), self.settings.clips, "image") for one in pictures]
        cond = cond.given(archipelago.given(len(prompts), *frames))
        trace = strategies.Trace()
        velocity = archipelago.velocity(settings, lineup, cond.to(device), shape, numbers, clusters, trace)
        latents = self._denoise(
            latents, settings.steps, velocity, cond.to(device), callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        made: Any = latents if output_type == "latent" else self._frames(parts, latents, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (made,)
        weights = None if lineup.kind == "monolith" else torch.stack(trace.weights, 1).numpy()
        return ArchipelPipelineOutput(made, weights, (*lineup.warnings, *cut))

    def _check(self, prompts: list[str], output_type: str, names: Sequence[str], each: int) -> None:
        if each < 1:
            raise ArchipelError(f"num_videos_per_prompt = {each} cannot be used: give 1 or more")
        check_prompts(prompts)
        if output_type not in _OUTPUTS:
            raise ArchipelError(f"output_type = {output_type!r} is not known: {', '.join(_OUTPUTS)}")
        unknown = [name for name in names if name not in self._callback_tensor_inputs]
        if unknown:
            raise ArchipelError(f"callbacks get {', '.join(self._callback_tensor_inputs)}, not {unknown[0]!r}")

    def _encode(
        self, archipelago: Archipelago, prompts: list[str], negative: str | Sequence[str] | None, each: int
    ) -> tuple[Conditioning, list[str]]:
        cond, warnings = archipelago.encode(prompts)
        if negative is None:
            return cond, warnings
        away = _texts(negative)
        away = away * len(prompts) if len(away) == 1 else [one for one in away for _ in range(each)]
        if len(away) != len(prompts):
            raise ArchipelError(
                f"{len(away)} negative prompts were given for {len(prompts)} clips: give one, or one each"
            )
        return _Negative(cond.tokens, cond.mask, cond.pooled, cond.image, archipelago.encode(away)[0]), warnings

    def _start(
        self,
        shape: tuple[int, ...],
        prompts: list[str],
        generator: torch.Generator | list[torch.Generator] | None,
        seeds: Sequence[int] | int | None,
        latents: Tensor | None,
        device: torch.device,
    ) -> tuple[Tensor, list[int]]:
        """Noise float32 (B, C, T, H, W), and a number per clip for what else is drawn of it (``ancestral``, ``random``)."""
        wanted = (len(prompts), *shape)
        if seeds is not None and (generator is not None or latents is not None):
            raise ArchipelError("give seeds, or a generator and latents, not both")
        if latents is not None and tuple(latents.shape) != wanted:
            raise ArchipelError(f"latents have shape {tuple(latents.shape)}, this pipeline makes {wanted}")
        each = generator if isinstance(generator, list) else [generator]
        if any(not isinstance(one, torch.Generator) for one in each if one is not None):
            raise ArchipelError("generator must be a torch.Generator or a list of them: give a number as seeds")
        if isinstance(generator, list) and len(generator) != len(prompts):
            raise ArchipelError(f"{len(generator)} generators were given for {len(prompts)} clips")
        if seeds is not None:
            numbers = check_seeds(seeds, len(prompts))
            return torch.from_numpy(draws.clip_noise(numbers, shape)).to(device), numbers
        if latents is None:
            latents = randn_tensor(wanted, generator=generator, device=device, dtype=torch.float32)
        each = generator if isinstance(generator, list) else [generator] * len(prompts)
        numbers = [int(torch.randint(2**31, (1,), generator=g, device="cpu" if g is None else g.device)) for g in each]
        return latents.to(device, torch.float32), numbers

    def _denoise(
        self,
        latents: Tensor,
        steps: int,
        velocity: Callable[[Tensor, Tensor, Conditioning], Tensor],
        cond: Conditioning,
        callback: OnStepEnd | None,
        names: Sequence[str],
    ) -> Tensor:
        """Follow the velocity with the scheduler's own step; its timesteps are 1000 t."""
        timesteps = self._timesteps(steps, latents.device)
        self._num_timesteps = len(timesteps)
        order = getattr(self.scheduler, "order", 1)
        with self.progress_bar(total=steps) as bar:
            for i, timestep in enumerate(timesteps):
                if self._interrupt:
                    continue
                t = (timestep.to(latents.device, torch.float32) / 1000).expand(len(latents))
                v = velocity(latents, t, cond)
                latents = self.scheduler.step(v, timestep, latents, return_dict=False)[0]
                if callback is not None:
                    said = callback(self, i, timestep, dict.fromkeys(names, latents))
                    latents = (said or {}).get("latents", latents)
                if i == len(timesteps) - 1 or (i + 1) % order == 0:
                    bar.update()
        return latents

    def _timesteps(self, steps: int, device: torch.device) -> Tensor:
        """The scheduler's, evenly spaced from 1 to 1 / steps before its own shift where it takes them (as ``time_grid``)."""
        scheduler: Any = self.scheduler
        if not type(scheduler).__name__.startswith("FlowMatch") and "flow" not in str(
            scheduler.config.get("prediction_type")
        ):
            raise ArchipelError(
                f"{type(scheduler).__name__} does not take velocities of a flow: use one whose name begins with FlowMatch, "
                'or prediction_type="flow_prediction" and use_flow_sigmas=True where it has them'
            )
        more: dict[str, Any] = {}
        takes = inspect.signature(scheduler.set_timesteps).parameters
        if "sigmas" in takes and getattr(scheduler, "order", 1) == 1:
            more["sigmas"] = np.linspace(1.0, 1 / steps, steps)
        else:
            more["num_inference_steps"] = steps
        if scheduler.config.get("use_dynamic_shifting", False):
            more["mu"] = math.log(self.settings.sample.shift)
        scheduler.set_timesteps(device=device, **more)
        return torch.as_tensor(scheduler.timesteps)

    def _frames(self, parts: LoadedParts, latents: Tensor, output_type: str) -> Any:
        if not bool(torch.isfinite(latents).all()):
            raise ArchipelError("sampling gave numbers that are not finite: use more steps or less guidance")
        self._turn("vae")
        return self.video_processor.postprocess_video(parts.codec.decode(latents).float(), output_type=output_type)

    # --- taking turns ---------------------------------------------------------------------------------------------

    def parts(self, where: str = "the exported folder") -> LoadedParts:
        """The components as what ``Archipelago`` mixes, on the device where they are; ``where`` names them in errors."""
        device = str(self._execution_device)
        more = None if self._adapters is None else self._adapters.velocities
        return LoadedParts(self.config["archipel"], self.settings, self.components, self._turn, device, more, where)

    def _turn(self, name: str) -> None:
        """Before ``name`` is called: with ``enable_model_cpu_offload`` the other experts leave the GPU."""
        part = getattr(self, name)
        experts = [] if self._adapters else self.experts.values()
        heavy = [one for one in (*experts, self.monolith, self.transformer) if one is not None]
        if not any(part is one for one in (*heavy, self.vae)):
            return
        for hook in getattr(self, "_all_hooks", []):
            other = hook.model
            if other is not part and any(other is one for one in heavy) and other.device.type != "cpu":
                hook.offload()


def _texts(given: str | Sequence[str]) -> list[str]:
    return [given] if isinstance(given, str) else list(given)


def _each(pictures: Pictures | None, times: int) -> Pictures | None:
    """Several pictures, each as often as its prompt; one serves all clips."""
    if isinstance(pictures, list | tuple):
        return [one for one in pictures for _ in range(times)] if len(pictures) > 1 else pictures
    if isinstance(pictures, np.ndarray) and pictures.ndim == 4 and len(pictures) > 1:
        return np.repeat(pictures, times, axis=0)
    return pictures


@functools.cache
def _class(names: tuple[str, ...]) -> type[ArchipelPipeline]:
    """``ArchipelPipeline`` for these experts: diffusers reads what a pipeline consists of from its constructor."""

    def build(self: ArchipelPipeline, **parts: Any) -> None:
        ArchipelPipeline.__init__(self, **parts)

    kind = inspect.Parameter.KEYWORD_ONLY
    build.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            *(inspect.Parameter(name, kind) for name in (*REQUIRED, *names)),
            *(inspect.Parameter(name, kind, default=None) for name in (*OPTIONAL, "archipel")),
        ]
    )
    about = {"__init__": build, "__module__": ArchipelPipeline.__module__, "__doc__": ArchipelPipeline.__doc__}
    return type("ArchipelPipeline", (ArchipelPipeline,), about)
