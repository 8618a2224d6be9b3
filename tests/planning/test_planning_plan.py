"""What a plan says: counts the literature gives, sums that add up, refusals, and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from archipel import cli, pipeline, presets
from archipel.errors import ConfigError
from archipel.planning import hardware, parts, settle, sizes, tables
from archipel.planning.memory import Steps
from archipel.planning.plan import as_json, counts, make
from archipel.planning.switches import Switches

# FLUX.1-dev holds 11 901 408 320 parameters, 10 229 760 of them in the embedder of its guidance scale, which is left out.
FLUX_DEV, GUIDANCE = 11_901_408_320, 256 * 3072 + 3072 + 3072 * 3072 + 3072


def test_three_experts_of_eleven_billion_have_the_literatures_parameters() -> None:
    config = pipeline.resolve(preset="paris2")
    number = counts(config)
    assert number.expert == number.trained == FLUX_DEV - GUIDANCE
    assert number.total == 3 * number.expert + number.router
    assert number.router < 0.02 * number.expert
    assert 35e9 < number.total < 37e9


def test_paris2s_frozen_parts_have_the_literatures_parameters() -> None:
    config = pipeline.resolve(preset="paris2")
    assert [part.parameters for part in parts.text(config)] == [4_762_310_656, 123_060_480]
    codec = parts.codec(config)
    assert 0.24e9 < codec.parameters < 0.25e9
    assert codec.working is not None
    assert codec.working > 4 * 3 * 29 * 256 * 256


def test_a_plan_adds_up() -> None:
    config = pipeline.resolve(preset="tiny")
    plan = make(config, Switches("float32"), hardware.find(["h100", "a100"]), clips=96)
    found = as_json(plan)
    assert json.loads(json.dumps(found)) == found
    assert found["params_total"] == 2 * found["params_per_expert"] + found["params_router"]
    assert found["flops_total"] == config.compute.archipelago_flops
    assert found["flops_per_expert"] == found["flops_per_step"] * config.expert.steps
    assert found["train_bytes_per_gpu_checkpointed"] <= found["train_bytes_per_gpu"]
    assert found["sample_bytes_per_gpu"] > 4 * found["params_total"]
    assert found["bucket_bytes"] == sum(found["bucket"][key] for key in ("published", "results", "checkpoints"))
    assert set(found["hours"]) == {"h100", "a100"}
    # A fifth of the peak takes twice as long as two fifths.
    slow = make(config, Switches("float32", mfu=0.2), hardware.find(["h100"]), clips=96)
    assert slow.hours(slow.gpus[0])["expert"] == pytest.approx(2 * found["hours"]["h100"]["expert"])


def test_adapters_train_little_and_keep_the_base_once() -> None:
    over = {"expert": {"lora_rank": 4, "warm_start": "trunk", "trunk_steps": 10}}
    config = pipeline.resolve(preset="tiny", over=over)
    whole, adapted = counts(pipeline.resolve(preset="tiny")), counts(config)
    assert adapted.expert == whole.expert + adapted.trained
    assert adapted.total == whole.expert + 2 * adapted.trained + adapted.router
    step = Steps(config).of(Switches("float32"))
    assert step.gradients == 4 * adapted.trained
    assert step.optimizer == 8 * adapted.trained
    assert step.weights == 4 * adapted.expert


def test_what_does_not_fit_is_told_with_what_makes_it_fit() -> None:
    config = pipeline.resolve(preset="tiny")
    steps = Steps(config)
    plain = steps.of(Switches("float32")).needed
    small = steps.of(Switches("float32", checkpointing=True, micro_batch=1)).needed
    assert small < plain
    usable = (plain + small) // 2
    gpu = hardware.Gpu("toy", "a toy", int(usable / hardware.USABLE), 1e12, 1e12)
    plan = make(config, Switches("float32"), [gpu], clips=96)
    (fit,) = plan.fits
    assert not fit.fits
    assert fit.advice is not None
    assert steps.of(fit.advice).needed <= gpu.usable
    (line, *_) = tables.advice(plan)
    assert "a toy" in line
    assert "it fits with" in line
    assert "--checkpointing" in line
    none = hardware.Gpu("none", "nothing", 1000, 1e12, 1e12)
    assert "nothing that we have makes it fit" in next(tables.advice(make(config, Switches("float32"), [none])))


def test_the_cache_and_shards_are_as_large_as_told(tmp_path: Path) -> None:
    run = pipeline.init(tmp_path / "run", preset="tiny", sets=["clips.count=40"])
    pipeline.prepare(run)
    pipeline.partition(run)

    def weigh(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))

    told = sizes.disk(run.config, 40, [], 0, 0)
    assert told.cache == pytest.approx(weigh(run.cache), rel=0.02)
    assert told.published == pytest.approx(weigh(run.root / "shards"), rel=0.1)  # whole groups go to a split
    asked = settle.of_run(run.root, [])
    assert (asked.clips, asked.root) == (40, run.root)


def test_eight_bit_moments_are_as_large_as_torchaos() -> None:
    pytest.importorskip("torchao")
    from archipel.training.eight_bit import adamw8bit

    shapes = [(64, 64), (128, 96), (100,), (4097,), (8192,)]
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = adamw8bit([{"params": parameters}], lr=1e-3, betas=(0.9, 0.95), device="cpu")
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    held = 0
    for state in optimizer.state.values():
        for moment in (state["exp_avg"], state["exp_avg_sq"]):
            inner = [moment.codes, moment.scale, moment.qmap] if hasattr(moment, "codes") else [moment]
            held += sum(part.numel() * part.element_size() for part in inner)
    assert Switches(optimizer="adamw8bit").optimizer_bytes(p.numel() for p in parameters) == held


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--preset", "pariss2"], "did you mean paris2"),
        (["--preset", "paris2", "--set", "clips.frames=30"], "29"),
        (["--preset", "paris2", "--set", "codec.channels=12"], "AutoencoderKLHunyuanVideo"),
        (["--preset", "tiny", "--gpu", "h10"], "did you mean h100"),
        (["--preset", "tiny", "--mfu", "4"], "--mfu"),
        (["--preset", "tiny", "--precision", "float16"], "--precision"),
        ([], "give a run or a preset"),
        (["nowhere"], "no run at"),
        (["nowhere", "--preset", "tiny"], "leave out"),
    ],
)
def test_bad_input_is_refused(words: list[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", *words])
    assert ended.value.code == 2
    assert said in capfd.readouterr().err


def test_a_text_encoder_of_no_known_width_is_refused() -> None:
    values: dict[str, Any] = {"text": {"encoder": "t5", "width": 777, "pooled_width": 777}}
    config = pipeline.resolve(preset="tiny", over=values)
    with pytest.raises(ConfigError, match="777 wide"):
        parts.text(config)


@pytest.mark.parametrize("json_", [True, False])
def test_the_command_line(json_: bool, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "--preset", "tiny", "--precision", "float32", *(["--json"] if json_ else [])])
    out = capfd.readouterr().out
    assert ended.value.code == 0
    if json_:
        found = json.loads(out)
        assert {"params_per_expert", "params_total", "flops_per_step", "train_bytes_per_gpu"} <= set(found)
        assert found["preset"] == "tiny"
    else:
        assert "Training, each GPU" in out
        assert "H100" in out


def test_every_preset_can_be_planned() -> None:
    for name in presets.PRESETS:
        config = pipeline.resolve(preset=name)
        assert counts(config).expert > 0
