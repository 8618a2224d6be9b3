"""RMS norms in fewer passes against torch's and diffusers' own: the same bits in training, rounding apart elsewhere."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from torch import nn

from archipel.backbones import norms


def pair(kind: str) -> tuple[nn.Module, nn.Module]:
    made: list[nn.Module] = []
    for _ in range(2):
        if kind == "diffusers":
            made.append(RMSNorm(24, eps=1e-5, elementwise_affine=False))
        else:
            made.append(nn.RMSNorm(24, eps=None if kind == "no eps" else 1e-6, elementwise_affine=kind != "bare"))
            with torch.no_grad():
                for p in made[-1].parameters():
                    p.copy_(torch.linspace(-1, 2, 24))
    box = nn.Sequential(made[0])
    norms.quicken(box)
    return box[0], made[1]


@pytest.mark.parametrize("kind", ["affine", "bare", "no eps", "diffusers"])
def test_the_same_numbers_and_the_input_is_left_alone(kind: str) -> None:
    ours, theirs = pair(kind)
    assert type(ours) is not type(theirs) and ours.state_dict().keys() == theirs.state_dict().keys()
    x = (
        torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1e-6, 1.0, 1e4])[:, None, None]
    )
    kept = x.clone()
    with torch.no_grad():
        for given in (x, x.transpose(0, 1), x[:, :0], torch.zeros_like(x)):
            torch.testing.assert_close(ours(given), theirs(given), rtol=2e-6, atol=0)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("kind", ["affine", "bare", "no eps", "diffusers"])
def test_with_gradients_in_half_precision_and_under_autocast_it_is_theirs(kind: str) -> None:
    ours, theirs = pair(kind)
    x = torch.randn(3, 24, requires_grad=True)
    assert torch.equal(ours(x), theirs(x))
    grads = [torch.autograd.grad(one(x).square().sum(), x)[0] for one in (ours, theirs)]
    assert torch.equal(*grads)
    with torch.no_grad():
        assert torch.equal(ours(x.bfloat16()), theirs(x.bfloat16()))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ours(x), theirs(x))
