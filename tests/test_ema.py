"""The average against a scalar recursion."""

import pytest
import torch
from torch import nn

from dmd.ema import Ema


def constant(value, dtype=torch.float32):
    net = nn.Linear(2, 3).to(dtype)
    nn.init.constant_(net.weight, value)
    nn.init.constant_(net.bias, -value)
    return net


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_average_is_the_scalar_recursion(decay):
    """Decay (1 + n) / (10 + n), up to its final value."""
    ema, expected = Ema(constant(1.0), decay), 1.0
    for n, value in enumerate([3.0, -2.0, 0.5, 7.0] * 10):
        ema.update(constant(value), n)
        d = min(decay, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * value
        assert float(ema.shadow.weight[1, 1].detach()) == pytest.approx(expected, rel=1e-5)
        assert float(ema.shadow.bias[2].detach()) == pytest.approx(-expected, rel=1e-5)


def test_another_network_may_be_followed_later():
    """The list of weights that is kept is that of the network that is given."""
    ema = Ema(constant(1.0), 0.0)
    a, b = constant(2.0), constant(3.0)
    for source, value in ((a, 2.0), (b, 3.0), (a, 2.0)):
        ema.update(source, 100)
        assert float(ema.shadow.weight[0, 0].detach()) == value


def test_average_of_a_constant_is_the_constant():
    ema = Ema(constant(0.1), 0.999)
    for n in range(200):
        ema.update(constant(0.1), n)
    assert torch.equal(ema.shadow.weight, constant(0.1).weight)


def test_small_changes_of_bfloat16_weights_are_not_lost():
    """In bfloat16 0.001 * (1.0078 - 1) would round away; the shadow is float32."""
    ema = Ema(constant(1.0, torch.bfloat16), 0.999)
    for n in range(10_000, 10_100):
        ema.update(constant(1.0078125, torch.bfloat16), n)
    assert float(ema.shadow.weight[0, 0].detach()) == pytest.approx(1 + 0.0078125 * (1 - 0.999**100), abs=1e-6)


def test_shadow_is_a_frozen_copy():
    source = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    ema = Ema(source, 0.9)
    before = ema.shadow[0].weight.clone()
    with torch.no_grad():
        source[0].weight += 1
    assert torch.equal(ema.shadow[0].weight, before)
    assert not any(p.requires_grad for p in ema.shadow.parameters())
    assert not ema.shadow.training and source.training


def test_buffers_are_copied_not_averaged():
    source = nn.BatchNorm1d(2)
    ema = Ema(source, 0.9)
    source.running_mean.fill_(5.0)
    source.num_batches_tracked.fill_(17)
    ema.update(source, 0)
    assert ema.shadow.running_mean.tolist() == [5.0, 5.0] and int(ema.shadow.num_batches_tracked) == 17


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, float("nan")])
def test_a_decay_that_would_never_or_wrongly_follow_is_refused(decay):
    with pytest.raises(ValueError, match="EMA decay is"):
        Ema(constant(1.0), decay)
