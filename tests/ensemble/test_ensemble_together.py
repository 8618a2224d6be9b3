"""Experts that are adapters on one base: asked in one pass where there are few rows, with the numbers of taking turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import CHANNELS, CLASSES, POOLED, TEXT, tiny_cond, tiny_config

from archipel import store
from archipel.backbones import base, lora, registry
from archipel.backbones.adapters import Adapter
from archipel.contracts import Conditioning, Velocity
from archipel.ensemble import strategies, together
from archipel.ensemble.strategies import Fixed, Mixture, Trace

SHA = "a" * 64
SHAPE = (CHANNELS, 2, 4, 4)


def denoiser(name: str) -> base.Denoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = registry.build_network({"_class_name": CLASSES[name], **tiny_config(name)})
    own = {"flux": {"patch": 2}, "ltx": {"rope_scale": [1.0, 1.0, 1.0]}}.get(name, {})
    text = {"text_shape": [6, TEXT, POOLED], "latent_shape": list(SHAPE)}
    facts: dict[str, Any] = {"role": "expert", "prediction": "velocity", **text, **own}
    return registry.adapter(CLASSES[name])(network, facts).eval()


def bank_of(name: str, folder: Path, count: int = 3) -> tuple[lora.Bank, list[lora.Adapted]]:
    bank, found = lora.Bank(denoiser(name), SHA), []
    for number in range(count):
        one, generator = denoiser(name), torch.Generator().manual_seed(number)
        lora.attach(one, Adapter(4, 4.0, "linear"), SHA, seed=number)
        with torch.no_grad():
            for key, p in one.network.named_parameters():
                if ".lora_B." in key:
                    p.copy_(0.3 * torch.randn(p.shape, generator=generator))
        state = {key: value.detach().numpy() for key, value in lora.parameters(one).items()}
        files = base.save(one, folder / str(number), lora.to_file(one.facts, state))
        store.write_card(folder / str(number), "expert", SHA, files, network=one.facts)
        found.append(bank.load(folder / str(number)))
    return bank, found


class Plain:
    """An expert that cannot be asked together with others."""

    def __init__(self, expert: Velocity) -> None:
        self.expert = expert

    def __call__(self, x: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        return self.expert(x, t, cond)


@pytest.mark.parametrize("name", sorted(CLASSES))
@pytest.mark.parametrize(
    ("scale", "composition"), [(2.0, "mixture-of-guided"), (1.0, "mixture-of-guided"), (3.0, "guided-mixture")]
)
def test_one_pass_gives_what_turns_give(tmp_path: Path, name: str, scale: float, composition: Any) -> None:
    bank, experts = bank_of(name, tmp_path)
    passes = []
    bank.base.network.register_forward_pre_hook(lambda *_: passes.append(1))
    x, t, cond = torch.randn(2, *SHAPE), torch.tensor([0.3, 0.8]), tiny_cond(2)
    weights = Fixed(torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.4, 0.6]]))
    traces = [Trace(), Trace()]
    with torch.no_grad():
        mixed = Mixture(experts, weights, scale, composition, traces[0])(x, t, cond)
        assert len(passes) == 1
        turns = Mixture([Plain(one) for one in experts], weights, scale, composition, traces[1])(x, t, cond)
        assert len(passes) == 4
    assert torch.allclose(mixed, turns, atol=1e-5)
    assert traces[0].rows == traces[1].rows


def test_many_rows_one_expert_and_other_bases_take_turns(tmp_path: Path) -> None:
    bank, experts = bank_of("flux", tmp_path / "one")
    _, others = bank_of("flux", tmp_path / "two")
    passes = []
    bank.base.network.register_forward_pre_hook(lambda *_: passes.append(1))

    def count(given: list[Any], weights: torch.Tensor) -> int:
        passes.clear()
        rows = len(weights)
        with torch.no_grad():
            Mixture(given, Fixed(weights), 2.0)(torch.randn(rows, *SHAPE), torch.full((rows,), 0.5), tiny_cond(rows))
        return len(passes)

    two = torch.tensor([[0.5, 0.5, 0.0]])
    assert count(experts, two) == 1
    assert count(experts, two.repeat(together.MOST_ROWS, 1)) == 2
    assert count(experts, torch.tensor([[1.0, 0.0, 0.0]])) == 1
    assert count([experts[0], *others[1:]], two) == 1, "the other expert passed another base"
    assert count([experts[0], Plain(experts[1]), experts[2]], two) == 2
    assert strategies.in_one_pass is together.in_one_pass
