"""``ArchipelPipeline``: the frames of ``Archipelago.generate``, in the manners of a ``DiffusionPipeline``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from archipel import ArchipelPipeline
from archipel.ensemble.pipeline import Archipelago
from archipel.errors import ArchipelError, DamagedError, MissingStageError
from archipel.exchange.folder import export
from archipel.run import Run

PROMPTS = ["a red ball", "two blue squares turn"]


def as_uint8(frames: np.ndarray) -> np.ndarray:
    return np.round(frames * 255).astype(np.uint8)


@pytest.mark.parametrize(
    "strategy", ["top1", "top2", "full", "threshold", "ancestral", "uniform", "random", "expert-1", "monolith"]
)
def test_same_seeds_give_the_frames_of_the_run(whole: Run, pipe: ArchipelPipeline, strategy: str) -> None:
    ours = Archipelago.load(whole.root).generate(PROMPTS, strategy=strategy, steps=3, seeds=5)
    theirs = pipe(PROMPTS, strategy=strategy, num_inference_steps=3, seeds=5)
    assert theirs.frames.dtype == np.float32 and theirs.frames.shape == ours.clips.shape
    assert np.array_equal(as_uint8(theirs.frames), ours.clips)
    assert (theirs.weights is None) == (strategy == "monolith")
    if strategy != "monolith":
        np.testing.assert_allclose(theirs.weights, ours.weights, atol=1e-6)


def test_oracle_takes_clusters(whole: Run, pipe: ArchipelPipeline) -> None:
    ours = Archipelago.load(whole.root).generate(PROMPTS, strategy="oracle", clusters=[2, 0], steps=2)
    theirs = pipe(PROMPTS, strategy="oracle", clusters=[2, 0], num_inference_steps=2, seeds=0)
    assert np.array_equal(as_uint8(theirs.frames), ours.clips)
    assert np.array_equal(theirs.weights.argmax(2), [[2, 2], [0, 0]])


def test_noise_may_be_given_or_drawn(pipe: ArchipelPipeline) -> None:
    by_seed = pipe(PROMPTS, num_inference_steps=2, seeds=[3, 4]).frames
    assert np.array_equal(by_seed, pipe(PROMPTS, num_inference_steps=2, latents=pipe.noise([3, 4])).frames)
    drawn = [pipe(PROMPTS, num_inference_steps=2, generator=torch.manual_seed(seed)).frames for seed in (1, 1, 2)]
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])
    each = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    both = pipe(PROMPTS, num_inference_steps=2, generator=each, strategy="ancestral").frames
    alone = pipe(PROMPTS[1], num_inference_steps=2, generator=torch.manual_seed(2), strategy="ancestral").frames
    np.testing.assert_allclose(both[1:], alone, atol=1e-5)


def test_outputs_in_every_form(pipe: ArchipelPipeline) -> None:
    asked: dict[str, Any] = {"num_inference_steps": 2, "seeds": [0, 1, 2, 3], "num_videos_per_prompt": 2}
    latent = pipe(PROMPTS, output_type="latent", **asked).frames
    assert latent.shape == (4, 192, 1, 2, 2) and latent.dtype == torch.float32
    frames = pipe(PROMPTS, output_type="np", **asked).frames
    assert frames.shape == (4, 4, 8, 8, 3) and 0 <= frames.min() <= frames.max() <= 1
    tensor = pipe(PROMPTS, output_type="pt", **asked).frames
    np.testing.assert_allclose(tensor.permute(0, 1, 3, 4, 2).numpy(), frames, atol=1e-6)
    pictures = pipe(PROMPTS, output_type="pil", **asked).frames
    assert len(pictures) == 4 and len(pictures[0]) == 4
    assert np.array_equal(np.asarray(pictures[1][2]), as_uint8(frames[1, 2]))
    (alone,) = pipe(PROMPTS, return_dict=False, **asked)
    assert np.array_equal(alone, frames)


def test_callbacks_see_and_change_each_step(pipe: ArchipelPipeline) -> None:
    seen: list[tuple[int, float]] = []

    def watch(made: Any, i: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append((i, float(t)))
        return {"latents": given["latents"] * (0 if i == 2 else 1)}

    latent = pipe(PROMPTS, num_inference_steps=3, seeds=0, callback_on_step_end=watch, output_type="latent").frames
    assert [i for i, _ in seen] == [0, 1, 2] and seen[0][1] == 1000
    assert not latent.any()

    def stop(made: Any, i: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        made._interrupt = i == 0
        return {}

    stopped = pipe(PROMPTS, num_inference_steps=3, seeds=0, callback_on_step_end=stop, output_type="latent").frames
    first: list[torch.Tensor] = []
    pipe(
        PROMPTS,
        num_inference_steps=3,
        seeds=0,
        callback_on_step_end=lambda made, i, t, given: first.append(given["latents"]),
    )
    assert torch.equal(stopped, first[0])


def test_schedulers_are_exchangeable(pipe: ArchipelPipeline) -> None:
    """All solve the same equation: with many steps they agree, with few they do not."""

    def sample(steps: int) -> torch.Tensor:
        return pipe(PROMPTS, num_inference_steps=steps, seeds=0, strategy="full", output_type="latent").frames

    euler, few = sample(200), sample(3)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0}
    for scheduler in (FlowMatchHeunDiscreteScheduler(), UniPCMultistepScheduler(**flow)):
        pipe.scheduler = scheduler
        assert (sample(60) - euler).abs().mean() < 0.1 * (few - euler).abs().mean()


def test_shift_of_the_scheduler_is_what_counts(whole: Run, pipe: ArchipelPipeline) -> None:
    ours = Archipelago.load(whole.root).generate(PROMPTS, steps=3, shift=2.5, seeds=0).clips
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.5)
    assert np.array_equal(as_uint8(pipe(PROMPTS, num_inference_steps=3, seeds=0).frames), ours)


def test_a_negative_prompt_takes_the_place_of_the_null_text(pipe: ArchipelPipeline) -> None:
    x = pipe.noise([0])

    def one_step(**more: Any) -> torch.Tensor:
        more |= {"num_inference_steps": 1, "strategy": "expert-0", "output_type": "latent"}
        return x - pipe("a red ball", latents=x, **more).frames  # the velocity

    plain, away = (
        one_step(guidance_scale=1.0),
        x
        - pipe(
            "rain", latents=x, guidance_scale=1.0, num_inference_steps=1, strategy="expert-0", output_type="latent"
        ).frames,
    )
    guided = one_step(guidance_scale=3.0, negative_prompt="rain")
    torch.testing.assert_close(guided, away + 3 * (plain - away), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(guided, one_step(guidance_scale=3.0), atol=1e-3)


def test_saved_by_diffusers_and_loaded_again(pipe: ArchipelPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "again")
    again = ArchipelPipeline.from_pretrained(tmp_path / "again")
    again.set_progress_bar_config(disable=True)
    asked: dict[str, Any] = {"num_inference_steps": 2, "seeds": 1, "strategy": "top2"}
    assert np.array_equal(again(PROMPTS, **asked).frames, pipe(PROMPTS, **asked).frames)
    assert isinstance(again, DiffusionPipeline) and set(again.experts) == {"0", "1", "2"}


def test_components_may_be_replaced(exported: Path, pipe: ArchipelPipeline) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    made = ArchipelPipeline.from_pretrained(exported, scheduler=scheduler, expert_1=pipe.experts["0"])
    assert made.scheduler is scheduler and made.expert_1 is pipe.expert_0


def test_in_half_precision_the_codec_stays_exact(exported: Path, pipe: ArchipelPipeline) -> None:
    half = ArchipelPipeline.from_pretrained(exported, torch_dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert half.expert_0.dtype == torch.bfloat16 and next(half.vae.parameters()).dtype == torch.float32
    near, exact = (one(PROMPTS, num_inference_steps=2, seeds=0).frames for one in (half, pipe))
    assert 0 < np.abs(near - exact).max() < 0.1


def test_offloading_keeps_one_expert_at_a_time(exported: Path, pipe: ArchipelPipeline) -> None:
    pytest.importorskip("accelerate")
    made = ArchipelPipeline.from_pretrained(exported)
    made.set_progress_bar_config(disable=True)
    made.enable_model_cpu_offload(device="cpu")
    hooked = {id(hook.model) for hook in made._all_hooks}
    assert {id(part) for part in (*made.experts.values(), made.router, made.vae, made.text_encoder)} <= hooked
    asked: dict[str, Any] = {"num_inference_steps": 2, "seeds": 0, "strategy": "full"}
    assert np.array_equal(made(PROMPTS, **asked).frames, pipe(PROMPTS, **asked).frames)

    class Hook:
        """An offloaded model that says it is on a GPU until it is sent away."""

        def __init__(self, model: Any) -> None:
            self.model, self.sent = model, 0
            model.device = torch.device("cuda")

        def offload(self) -> None:
            self.sent += 1

    class Model:
        device: torch.device

    made._all_hooks = []
    parts = {name: Model() for name in ("expert_0", "expert_1", "monolith")}
    for name, part in parts.items():
        object.__setattr__(made, name, part)
    hooks = [Hook(part) for part in parts.values()]
    made._all_hooks = hooks
    made._turn("expert_1")
    assert [hook.sent for hook in hooks] == [1, 0, 1]


# --- wrong use -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"prompt": "  "}, "is empty"),
        ({"strategy": "top9"}, "this run has 3"),
        ({"num_inference_steps": 0}, "steps = 0"),
        ({"guidance_scale": float("nan")}, "guidance = nan"),
        ({"output_type": "mp4"}, "np, pt, pil, latent"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt = 0"),
        ({"latents": torch.zeros(1, 2, 3)}, r"this pipeline makes \(1, 192, 1, 2, 2\)"),
        ({"seeds": 1, "generator": torch.manual_seed(0)}, "not both"),
        ({"seeds": [1, 2]}, "2 seeds were given for 1 prompts"),
        ({"generator": [torch.manual_seed(0)] * 2}, "2 generators were given for 1 clips"),
        ({"generator": 3}, "give a number as seeds"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "not 'prompt_embeds'"),
    ],
)
def test_wrong_use_is_named(pipe: ArchipelPipeline, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ArchipelError, match=said):
        pipe(**{"prompt": "a ball", **asked})
    with pytest.raises(ArchipelError, match="use from_pretrained"):
        ArchipelPipeline(3)


def test_missing_experts_are_named_and_left_out(own: Run, tmp_path: Path) -> None:
    shutil.rmtree(own.expert("1"))
    with pytest.raises(MissingStageError, match="1: run `archipel train"):
        export(own.root, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    done = export(own.root, tmp_path / "out", partial=True)
    assert (done.experts, done.missing) == (["0", "2"], ["1"])
    pipe = ArchipelPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    found = pipe(PROMPTS, num_inference_steps=2, seeds=0)
    ours = Archipelago.load(own.root).generate(PROMPTS, steps=2)
    assert np.array_equal(as_uint8(found.frames), ours.clips)
    assert "1 of 3 experts missing" in found.warnings[0] and not found.weights[:, :, 1].any()
    with pytest.raises(MissingStageError, match="exported without 1"):
        pipe("a ball", strategy="expert-1")
    with pytest.raises(MissingStageError, match="exported without monolith"):
        pipe("a ball", strategy="monolith")


def edit(folder: Path, **entries: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_nothing_of_a_folder_is_run(exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "evil"))
    for entries in (
        {"expert_0": ["os", "system"]},
        {"vae": ["diffusers", "DiffusionPipeline"]},
        {"text_encoder": ["transformers", "AutoModel"]},
        {"extra": ["diffusers", "AutoencoderKL"]},
        {"scheduler": ["diffusers"]},
    ):
        before = (folder / "model_index.json").read_text()
        edit(folder, **entries)
        with pytest.raises(DamagedError, match="which no export of Archipel has"):
            ArchipelPipeline.from_pretrained(folder)
        (folder / "model_index.json").write_text(before)
    folder = Path(shutil.copytree(exported, tmp_path / "code"))
    (folder / "vae" / "diffusers.py").write_text("raise SystemExit")
    with pytest.raises(DamagedError, match=r"vae.diffusers\.py is code"):
        ArchipelPipeline.from_pretrained(folder)
    for more in ({"trust_remote_code": True}, {"custom_pipeline": "mine"}):
        with pytest.raises(ArchipelError, match="nothing from a folder is ever run"):
            ArchipelPipeline.from_pretrained(exported, **more)
    with pytest.raises(ArchipelError, match="pickles are never read"):
        ArchipelPipeline.from_pretrained(exported, use_safetensors=False)


def test_other_folders_are_refused(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArchipelError, match="archipel export RUN"):
        ArchipelPipeline.from_pretrained(tmp_path)
    with pytest.raises(ArchipelError, match="no hub id"):
        ArchipelPipeline.from_pretrained(tmp_path / "nothing")
    folder = Path(shutil.copytree(exported, tmp_path / "other"))
    edit(folder, _class_name="WanPipeline")
    with pytest.raises(ArchipelError, match="'WanPipeline', not ArchipelPipeline"):
        ArchipelPipeline.from_pretrained(folder)
    index = json.loads((exported / "model_index.json").read_text())
    edit(folder, _class_name="ArchipelPipeline", archipel={**index["archipel"], "format": 2})
    with pytest.raises(ArchipelError, match="format 2"):
        ArchipelPipeline.from_pretrained(folder)
    edit(folder, archipel=None)
    with pytest.raises(ArchipelError, match="archipel export"):
        ArchipelPipeline.from_pretrained(folder)


def test_a_hub_repository_is_fetched_without_its_code(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def fetch(where: str, **more: Any) -> str:
        asked.append((where, more))
        return str(exported)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert set(ArchipelPipeline.from_pretrained("somebody/model", revision="v1").experts) == {"0", "1", "2"}
    ((where, more),) = asked
    assert (where, more["revision"]) == ("somebody/model", "v1")
    assert "*.safetensors" in more["allow_patterns"] and not any("py" in one for one in more["allow_patterns"])


def test_archipelago_loads_an_export_as_it_loads_a_run(whole: Run, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export(str(whole.root), folder)
    run, out = Archipelago.load(whole.root), Archipelago.load(folder)
    for strategy in ("top1", "full"):
        ours, theirs = (one.generate(PROMPTS, strategy=strategy, steps=2, seed=3) for one in (run, out))
        assert np.array_equal(ours.clips, theirs.clips) and ours.notes == theirs.notes
    assert Archipelago.load(folder, run_id=whole.id[:16]).model == run.model
    with pytest.raises(ArchipelError, match="was exported from the run"):
        Archipelago.load(folder, run_id="0" * 16)
    with pytest.raises(MissingStageError, match=r"not there yet in .*out: monolith: it was exported without monolith"):
        out.generate(PROMPTS, strategy="monolith")


def test_a_scheduler_of_another_process_is_refused(pipe: ArchipelPipeline) -> None:
    from diffusers import DDIMScheduler

    kept = pipe.scheduler
    try:
        pipe.scheduler = DDIMScheduler()
        with pytest.raises(ArchipelError, match="DDIMScheduler does not take velocities"):
            pipe("a red ball", num_inference_steps=2)
    finally:
        pipe.scheduler = kept
