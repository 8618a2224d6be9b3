"""The loop on a toy whose optimum is known, and on a small expert: learning, journal, averages, bad numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from archipel import store
from archipel.errors import ArchipelError, Stopped
from archipel.progress import StopFlag
from archipel.training import checkpoint
from archipel.training.journal import Journal, read_progress
from archipel.training.loop import CHECKPOINTS, Outcome, Settings, Trainer, fit
from archipel.training.stage import plan, train


class Line:
    """Least squares for y = 3 x - 1 by gradient steps; ``poison`` makes the loss of one step NaN."""

    def __init__(self, poison: int | None = None, drift: bool = False) -> None:
        self.model = nn.Linear(1, 1)
        with torch.no_grad():
            self.model.weight.zero_()
            self.model.bias.zero_()
        self.poison, self.drift, self.asked = poison, drift, []
        self.seen: list[float] = []

    def batch(self, step: int) -> tuple[int, torch.Tensor]:
        self.asked.append(step)
        return step, torch.randn(16, 1, generator=torch.Generator().manual_seed(step))

    def loss(self, batch: Any) -> torch.Tensor:
        step, x = batch
        error = (self.model(x) - 3 * x + 1).square().mean(1)
        return error * float("nan") if step == self.poison else error

    def validate(self) -> dict[str, Any]:
        assert not self.model.training and not torch.is_grad_enabled()
        x = torch.linspace(-1, 1, 9)[:, None]
        loss = float((self.model(x) - 3 * x + 1).square().mean())
        self.seen.append(loss)
        # drift: pretend that validation gets worse with every look, as it does where a router memorises
        return {"loss": float(len(self.seen)) if self.drift else loss}


def settings(**over: Any) -> Settings:
    return Settings(**{"steps": 120, "lr": 0.1, "cooldown": 0.3, "validate_every": 40, "checkpoint_every": 50, **over})


def run_fit(toy: Line, folder: Path, stop: StopFlag | None = None, **over: Any) -> Outcome:
    found = checkpoint.latest(folder / CHECKPOINTS, "id")
    return fit(toy, settings(**over), folder, stop, run_id="id", label="toy", start=found)


def test_a_toy_is_learned_and_its_average_is_what_remains(tmp_path: Path) -> None:
    toy = Line()
    outcome = run_fit(toy, tmp_path)
    assert outcome.steps == 120 and outcome.resumed == 0 and outcome.best is None
    assert outcome.validation["ema"]["loss"] < 0.01
    assert toy.model.weight.item() == pytest.approx(3, abs=0.1) and toy.model.bias.item() == pytest.approx(-1, abs=0.1)
    assert not toy.model.training and toy.asked == list(range(120))
    last = checkpoint.latest(tmp_path / CHECKPOINTS, "id")
    assert last is not None and last.step == 120
    assert toy.model.weight.item() == last.arrays["average/weight"].item() != last.arrays["weight/weight"].item()


def test_the_journal_has_every_step_once_and_ends_done(tmp_path: Path) -> None:
    run_fit(Line(), tmp_path)
    lines = store.read_jsonl(tmp_path / "metrics.jsonl")
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)) and steps[-1] == 120 and len(steps) >= 50
    assert lines[-1]["loss"] < lines[0]["loss"] / 100
    assert [line["step"] for line in lines if "validation" in line] == [40, 80, 120]
    assert all(line["seconds"] >= 0 and line["lr"] > 0 and line["grad_norm"] >= 0 for line in lines)
    assert {**(read_progress(tmp_path) or {}), "steps_per_s": 0, "loss": 0} == {
        "step": 120, "steps": 120, "loss": 0, "steps_per_s": 0, "state": "done", "resumed": 0,
    }  # fmt: skip


def test_the_newest_two_checkpoints_are_kept(tmp_path: Path) -> None:
    run_fit(Line(), tmp_path, checkpoint_every=10)
    assert sorted(path.name for path in (tmp_path / CHECKPOINTS).iterdir()) == ["00000110", "00000120"]


def test_validation_looks_at_raw_and_averaged_weights_and_changes_nothing(tmp_path: Path) -> None:
    often, seldom = Line(), Line()
    run_fit(often, tmp_path / "often", validate_every=1)
    run_fit(seldom, tmp_path / "seldom", validate_every=120)
    assert len(often.seen) == 240 and often.seen[20] != often.seen[21]
    assert torch.equal(often.model.weight, seldom.model.weight)


def test_the_best_average_is_kept_where_asked_even_across_a_stop(tmp_path: Path) -> None:
    whole = Line(drift=True)
    outcome = run_fit(whole, tmp_path / "whole", keep="best", validate_every=20)
    assert outcome.best == {"step": 20, "loss": 2.0} and outcome.steps == 120
    broken = Line(drift=True)
    with pytest.raises(Stopped):
        run_fit(broken, tmp_path / "broken", CountingStop(70), keep="best", validate_every=20)
    again = Line(drift=True)
    again.seen = [0.0] * 6
    assert run_fit(again, tmp_path / "broken", keep="best", validate_every=20).best == outcome.best
    assert torch.equal(again.model.weight, whole.model.weight)
    last = run_fit(Line(drift=True), tmp_path / "last", validate_every=20)
    assert last.best is None


class CountingStop(StopFlag):
    """Asks to stop after being looked at ``looks`` times, as --for does after a time."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def __bool__(self) -> bool:
        self.looks -= 1
        return self.looks < 0


@pytest.mark.parametrize("at", [1, 49, 50, 51, 119])
def test_stopping_anywhere_and_continuing_changes_no_bit(tmp_path: Path, at: int) -> None:
    whole = Line()
    run_fit(whole, tmp_path / "whole")
    with pytest.raises(Stopped) as caught:
        run_fit(Line(), tmp_path / "parts", CountingStop(at))
    assert not caught.value.interrupted
    assert (read_progress(tmp_path / "parts") or {})["state"] == "stopped"
    again = Line()
    outcome = run_fit(again, tmp_path / "parts")
    assert outcome.resumed == 1 and again.asked[0] == at
    assert torch.equal(again.model.weight, whole.model.weight) and torch.equal(again.model.bias, whole.model.bias)
    steps = [line["step"] for line in store.read_jsonl(tmp_path / "parts" / "metrics.jsonl")]
    assert steps == sorted(set(steps))
    one, two = (checkpoint.latest(tmp_path / name / CHECKPOINTS, "id") for name in ("whole", "parts"))
    assert one is not None and two is not None and one.arrays.keys() == two.arrays.keys()
    assert all((one.arrays[name] == two.arrays[name]).all() for name in one.arrays)


def test_a_stop_before_the_first_step_leaves_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run_fit(Line(), tmp_path, CountingStop(0))
    assert not (tmp_path / CHECKPOINTS).exists()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ArchipelError, match=r"not finite at step 78 .*lower lr"):
        run_fit(Line(poison=77), tmp_path, checkpoint_every=25)
    last = checkpoint.latest(tmp_path / CHECKPOINTS, "id")
    assert last is not None and last.step == 75
    assert all(torch.from_numpy(array.copy()).isfinite().all() for array in last.arrays.values())
    assert (read_progress(tmp_path) or {})["state"] == "failed"


@pytest.mark.parametrize("poison", [119, 49])
def test_a_bad_step_is_found_before_it_is_saved(tmp_path: Path, poison: int) -> None:
    with pytest.raises(ArchipelError, match=f"at step {poison + 1}"):
        run_fit(Line(poison=poison), tmp_path, checkpoint_every=10)
    last = checkpoint.latest(tmp_path / CHECKPOINTS, "id")
    assert last is not None and last.step <= poison


def test_biases_are_not_decayed(tmp_path: Path) -> None:
    groups = Trainer(Line(), settings(weight_decay=0.3)).optimizer.param_groups
    assert [(len(g["params"]), g["params"][0].ndim, g["weight_decay"]) for g in groups] == [(1, 2, 0.3), (1, 1, 0.0)]


def test_lines_after_the_checkpoint_are_told_again_not_twice(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": 1}\n{"step": 20, "loss": 1}\n{"step": 3')
    Journal(tmp_path, "toy", steps=100, rate=lambda _: 0.1, start=10)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [10]


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    run_fit(Line(), tmp_path)
    other = Line()
    other.model = nn.Linear(2, 1)
    with pytest.raises(ArchipelError, match="weight"):
        run_fit(other, tmp_path)


def test_a_small_expert_learns_its_cluster(small_run) -> None:
    train(small_run, "0", threads=1)
    lines = [line for line in store.read_jsonl(small_run.expert("0") / "metrics.jsonl") if "loss" in line]
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    detail = lines[-1]["validation_detail"]["ema"]
    assert len(detail["bins"]) == len(detail["times"]) == 5
    assert detail["loss"] == pytest.approx(sum(detail["bins"]) / 5) == lines[-1]["validation_ema"]


def test_the_monolith_uses_its_own_steps_batch_and_rate(tmp_path: Path, make_run) -> None:
    run = make_run(tmp_path / "run", monolith={"lr": 1e-4, "batch": 6})
    job = plan(run, "monolith")
    assert (job.settings.lr, job.batch, job.settings.steps) == (1e-4, 6, run.config.monolith.steps)
    assert plan(run, "1").batch == run.config.expert.batch and plan(run, "1").fields == {"cluster": 1}


def test_an_x0_expert_trains_on_its_velocity_error(tmp_path: Path, make_run) -> None:
    run = make_run(tmp_path / "run", expert={"prediction": "x0", "steps": 6})
    train(run, "0", threads=1)
    card = store.read_card(run.expert("0"))
    assert card is not None and card["network"]["prediction"] == "x0"
