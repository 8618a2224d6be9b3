"""Switches that trade time for memory leave what is trained as it is, each within its tolerance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from archipel import cli, config, pipeline, store
from archipel.backbones.flops import latent_shape, text_shape
from archipel.backbones.router import build_router
from archipel.contracts import Conditioning
from archipel.errors import ArchipelError, ConfigError, Stopped
from archipel.islands import site
from archipel.islands.launch.engine import join_arguments
from archipel.progress import StopFlag
from archipel.routing.stage import train_router
from archipel.run import ROUTER, Run
from archipel.training import eight_bit, launch, machine, switches
from archipel.training.ema import Ema, HostEma
from archipel.training.local import Local
from archipel.training.loop import Settings, Trainer
from archipel.training.stage import train

# Of 8-bit moments against those of 32 bits, over 24 steps of a small expert: see the docs for what is measured.
LOSSES_8BIT = 2e-2


class After(StopFlag):
    """Stops a training after so many steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    def __bool__(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.fixture
def runs(tmp_path: Path, make_run: Callable[..., Run]) -> Callable[..., Run]:
    """Small runs by name. Matrices of 64 x 64 are large enough for moments of 8 bits."""

    def make(name: str, **over: Any) -> Run:
        return make_run(tmp_path / name, expert={"width": 64, "rope_axes": [8, 12, 12], "steps": 12, **over})

    return make


def told(run: Run, name: str = "0") -> list[dict[str, Any]]:
    """The lines of the journal, without what a clock decides."""
    found = store.read_jsonl(run.expert(name) / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


def weights(run: Run, name: str = "0") -> dict[str, np.ndarray]:
    return dict(store.map_tensors(run.expert(name) / "model.safetensors"))


def card(run: Run, name: str = "0") -> dict[str, Any]:
    found = store.read_card(run.expert(name))
    assert found is not None and store.check_card(run.expert(name)) == []
    return found


def same(one: Run, other: Run, name: str = "0") -> None:
    """Losses, norms, validation and weights, bit for bit."""
    assert told(one, name) == told(other, name)
    a, b = weights(one, name), weights(other, name)
    assert a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


# --- checkpointing ---------------------------------------------------------------------------------------------------


def test_checkpointing_changes_no_bit(runs: Callable[..., Run]) -> None:
    one, other = runs("one"), runs("other")
    for name, job in (("0", train), (ROUTER, lambda run, _, **more: train_router(run, **more))):
        job(one, name, local=Local(threads=1))
        job(other, name, local=Local(threads=1, checkpointing=True))
        same(one, other, name)
        assert card(other, name)["build"] == card(one, name)["build"] | {"checkpointing": True}


# --- the average on the host -----------------------------------------------------------------------------------------


def test_an_average_on_the_host_changes_no_bit_and_resumes(runs: Callable[..., Run]) -> None:
    one, other = runs("one", keep="best", validate_every=4), runs("other", keep="best", validate_every=4)
    train(one, "0", local=Local(threads=1))
    host = Local(threads=1, ema="host")
    with pytest.raises(Stopped):
        train(other, "0", stop=After(7), local=host)
    train(other, "0", local=host)
    assert card(other)["bitwise"] and card(other)["build"]["ema"] == "host"
    a, b = weights(one), weights(other)
    assert all(np.array_equal(a[key], b[key]) for key in a)
    assert card(one)["validation"] == card(other)["validation"] and card(one)["best"] == card(other)["best"]


def test_an_average_on_the_host_waits_for_its_thread_and_tells_its_errors() -> None:
    model = nn.Linear(4, 3)
    plain, host = Ema(model, 0.9), HostEma(model, 0.9)
    for step in range(1, 5):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(float(step))
        plain.update(step)
        host.update(step)
        with torch.no_grad():  # what is trained moves on while the thread averages
            kept = [p.clone() for p in model.parameters()]
            model.weight.mul_(-1)
            assert torch.equal(host.tensors["weight"], plain.tensors["weight"])
            model.weight.copy_(kept[0])
    with host.applied():
        assert torch.equal(model.weight, plain.tensors["weight"])
    assert torch.equal(model.weight, kept[0])

    def broken(share: float) -> None:
        raise MemoryError("no room")

    host._take = broken  # type: ignore[method-assign]
    host.update(5)
    with pytest.raises(MemoryError, match="no room"):
        _ = host.tensors


# --- moments of 8 bits -----------------------------------------------------------------------------------------------


def bytes_of_moments(trainer: Trainer) -> int:
    states = trainer.optimizer.state.values()
    parts: list[Tensor] = []
    for state in states:
        for moment in (state["exp_avg"], state["exp_avg_sq"]):
            parts += [moment.codes, moment.scale] if hasattr(moment, "codes") else [moment]
    return sum(part.numel() * part.element_size() for part in parts)


class Wide:
    """An objective of one large matrix."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model, self.size = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 64)), 8
        self._to = torch.randn(64, 128) / 8

    def batch(self, step: int, part: slice | None = None) -> Tensor:
        x = torch.randn(8, 128, generator=torch.Generator().manual_seed(step))
        return x if part is None else x[part]

    def loss(self, batch: Tensor) -> Tensor:
        return (self.model(batch) - batch @ self._to.T).square().mean(1)

    def validate(self) -> dict[str, Any]:
        return {}


def test_moments_of_8_bits_take_a_quarter_and_train_alike() -> None:
    found = {}
    for kind in ("adamw", "adamw8bit"):
        trainer = Trainer(Wide(), Settings(60, 3e-3, weight_decay=0.01), Local(optimizer=kind))
        losses = [float(trainer.advance()[0]) for _ in range(60)]
        found[kind] = losses, bytes_of_moments(trainer)
    (plain, full), (coded, small) = found["adamw"], found["adamw8bit"]
    assert small < 0.27 * full
    assert coded[0] == plain[0] and coded[1] == pytest.approx(
        plain[1], rel=1e-4
    )  # the first step's are not rounded yet
    assert plain[-1] < 0.5 * plain[0] and coded[-1] == pytest.approx(plain[-1], rel=LOSSES_8BIT)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_found_again_from_what_they_stand_for(signed: bool) -> None:
    """Moments that a training had come back bit for bit, also where a block's largest magnitude is negative."""
    rng = torch.Generator().manual_seed(3)
    p = nn.Parameter(torch.zeros(512, 256))
    optimizer = eight_bit.adamw8bit([{"params": [p]}], lr=1e-3, betas=(0.9, 0.95), device="cpu")
    scale = 10.0 ** torch.randint(-14, 4, (512, 1), generator=rng).float()
    values = torch.randn(p.shape, generator=rng) * scale
    values[5], values[6, :-1] = 0.0, 0.0
    values = values if signed else values.square()
    coded = eight_bit.plain(eight_bit.kept(optimizer, p, values, signed=signed))
    assert (coded - values).abs().max(1).values.div(values.abs().max(1).values.clip(1e-12)).max() < 0.02
    again = eight_bit.kept(optimizer, p, coded, signed=signed)
    assert again.codes.dtype == torch.uint8 and torch.equal(eight_bit.plain(again), coded)  # type: ignore[attr-defined]


def test_moments_of_8_bits_resume_bit_for_bit(runs: Callable[..., Run]) -> None:
    one, other, third = runs("one"), runs("other"), runs("third")
    local = Local(threads=1, optimizer="adamw8bit")
    train(one, "0", local=local)
    with pytest.raises(Stopped):
        train(other, "0", stop=After(7), local=local)
    train(other, "0", local=local)
    assert card(other)["bitwise"] and card(other)["build"]["optimizer"] == "adamw8bit"
    assert card(one)["sha256"] == card(other)["sha256"]
    train(third, "0", local=Local(threads=1))
    losses = [card(run)["validation"]["ema"]["loss"] for run in (one, third)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=LOSSES_8BIT)


def test_another_island_may_go_on_with_other_moments(runs: Callable[..., Run], capsys: pytest.CaptureFixture) -> None:
    run = runs("run")
    for first, then in (("adamw8bit", "adamw"), ("adamw", "adamw8bit")):
        name = "0" if first == "adamw" else "1"
        with pytest.raises(Stopped):
            train(run, name, stop=After(7), local=Local(threads=1, optimizer=first))
        train(run, name, local=Local(threads=1, optimizer=then))
        assert f"optimizer {first}, now {then}" in capsys.readouterr().err
        assert [build["optimizer"] for build in card(run, name)["builds"]] == [first, then] and not card(run, name)[
            "bitwise"
        ]


def test_without_torchao_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchao.optim", None)
    eight_bit._optimizer_class.cache_clear()
    with pytest.raises(ArchipelError, match=r"archipel\[large\]"):
        eight_bit.adamw8bit([], lr=1e-3, betas=(0.9, 0.95), device="cpu")
    eight_bit._optimizer_class.cache_clear()


# --- compiled blocks -------------------------------------------------------------------------------------------------


class Shaken:
    """An objective of a router whose modulation is not zero, so that its blocks compute something."""

    def __init__(self, blocks: int) -> None:
        sizes = {"width": 16, "heads": 1, "rope_axes": [4, 6, 6], "blocks": blocks}
        settings = config.build({"clips": {"size": 8, "frames": 4}, "codec": {"patch": [2, 4, 4]}, "router": sizes})
        shape, (_, D, P) = latent_shape(settings), text_shape(settings)
        torch.manual_seed(0)
        self.model, self.size = build_router(settings, seed=0), 3
        for p in self.model.parameters():
            nn.init.normal_(p, std=0.1)
        self.x = torch.randn(3, *shape)
        self.cond = Conditioning(torch.zeros(3, 2, D), torch.ones(3, 2, dtype=torch.bool), torch.randn(3, P))

    def batch(self, step: int, part: slice | None = None) -> Tensor:
        return torch.tensor([0.2, 0.5, 0.8])

    def loss(self, batch: Tensor) -> Tensor:
        return self.model(self.x, batch, self.cond).square().mean(1)

    def validate(self) -> dict[str, Any]:
        return {"loss": float(self.loss(self.batch(0)).mean())}


def trained(blocks: int, *, validate: bool = True, **switched: Any) -> list[float]:
    """Losses of a few steps, and of the average."""
    trainer = Trainer(Shaken(blocks), Settings(3, 3e-3), Local(**switched))
    losses = [float(trainer.advance()[0]) for _ in range(3)]
    return losses + ([trainer.validate()["ema"]["loss"]] if validate else [])


@pytest.mark.parametrize("more", [{}, {"precision": "bfloat16", "checkpointing": True}])
def test_one_block_is_compiled_for_all(monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]) -> None:
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph

    monkeypatch.setattr(switches, "BACKEND", backend)
    torch.compiler.reset()
    found = {}
    for blocks in (2, 4):
        graphs.clear()
        found[blocks] = trained(blocks, compile=True, **more), len(graphs)
        # In bfloat16 last bits differ: compiled blocks turn queries and keys by real products, others by complex ones.
        assert found[blocks][0] == pytest.approx(trained(blocks, **more), rel=1e-3 if more else 1e-6)
        torch.compiler.reset()
    assert found[2][1] == found[4][1] > 0


@pytest.mark.slow
def test_the_compiler_itself_leaves_losses_as_they_are() -> None:
    torch.compiler.reset()
    assert trained(1, compile=True, validate=False) == pytest.approx(trained(1, validate=False), rel=1e-5)
    torch.compiler.reset()


def test_without_a_compiler_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    def none() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(ArchipelError, match=r"needs a C\+\+ compiler"):
        switches.check_compiler("cpu")


# --- how they are asked for ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wrong", "word"), [({"optimizer": "sgd"}, "adamw8bit"), ({"ema": "disk"}, "device, host")])
def test_wrong_switches_are_refused(wrong: dict[str, Any], word: str) -> None:
    with pytest.raises(ArchipelError, match=word):
        Local(**wrong)


@pytest.mark.parametrize("switch", [{"checkpointing": True}, {"compile": True}])
def test_what_has_no_blocks_is_refused(switch: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="only a Backbone"):
        Trainer(Wide(), Settings(1, 1e-3), Local(**switch))


def test_the_processes_of_a_job_are_given_the_switches(runs: Callable[..., Run]) -> None:
    local = Local(checkpointing=True, optimizer="adamw8bit", compile=True, ema="host", gpus=2)
    words = launch.command(runs("run"), "1", local)
    for word in ("--checkpointing", "--compile"):
        assert word in words
    assert words[words.index("--optimizer") + 1] == "adamw8bit" and words[words.index("--ema") + 1] == "host"
    plain = launch.command(runs("plain"), "1", Local())
    assert "--no-checkpointing" in plain and "--no-compile" in plain


def test_builds_of_before_there_were_switches_are_not_called_others() -> None:
    now = machine.build("cpu", 1)
    before = {key: value for key, value in now.items() if key not in machine.SWITCHES}
    assert machine.differences({**machine.OLDER, **before}, now) == []
    assert machine.differences(now, machine.build("cpu", 1, Local(ema="host"))) == ["ema device, now host"]


def test_the_site_says_how_its_processes_train_and_options_say_otherwise(
    runs: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, found = runs("run"), []
    assert site.local(run.root, {}) == Local() and "--ema" not in join_arguments("/store", run, "0", 1)
    store.write_text(run.root / site.NAME, '[train]\noptimizer = "adamw8bit"\ncheckpointing = true\nmicro_batch = 2\n')
    ours = Local(optimizer="adamw8bit", checkpointing=True, micro_batch=2)
    assert site.local(run.root, {"gpus": 1, "compile": None}) == ours
    assert join_arguments("/store", run, "0", None)[-len(ours.words()) :] == ours.words()
    more = join_arguments("/store", run, "0", None, ["train.compile=true"])
    assert "--compile" in more and "--checkpointing" in more

    monkeypatch.setattr(pipeline, "train", lambda run, name, **more: found.append(more["local"]))
    invoke = CliRunner().invoke
    for words in ([], ["--no-checkpointing", "--ema", "host", "--micro-batch", "0"], ours.words(), Local().words()):
        assert invoke(cli.app, ["train", str(run.root), "0", "--threads", "1", *words]).exit_code == 0
    one, two, three, four = found
    assert one == three == replace(ours, threads=1) and four == Local(threads=1)
    assert two == replace(ours, threads=1, checkpointing=False, ema="host", micro_batch=0)
    with pytest.raises(ConfigError, match=r"train\.ema"):
        site.local(run.root, {}, ["train.ema=disk"])
