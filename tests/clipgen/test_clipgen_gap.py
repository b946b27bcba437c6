"""The modality gap: LAFITE's formula, and centring on two cones."""

import math

import pytest
import torch
import torch.nn.functional as F

from dmd.clipgen.gap import Gap, noised


def test_noise_is_lafites_formula(rng):
    e, n = F.normalize(torch.randn(4, 8, generator=rng), dim=-1), torch.randn(4, 8, generator=rng)
    got = noised(e, n, 0.75)
    for i in range(4):
        mixed = 0.25 * e[i] + 0.75 * n[i] / math.sqrt(sum(v * v for v in n[i].tolist()))
        torch.testing.assert_close(got[i], mixed / mixed.square().sum().sqrt())
    torch.testing.assert_close(noised(e, n, 0.0), e)


def test_noise_of_a_share_leaves_a_known_cosine(rng):
    """In many dimensions noise is orthogonal: cos = (1 - a) / sqrt((1 - a)^2 + a^2)."""
    e = F.normalize(torch.randn(500, 512, generator=rng), dim=-1)
    got = (noised(e, torch.randn(500, 512, generator=rng), 0.4) * e).sum(-1).mean().item()
    assert got == pytest.approx(0.6 / math.hypot(0.6, 0.4), abs=0.01)


def test_centring_joins_two_cones(rng):
    """What images and texts share is found again, though either modality lies in a cone of its own."""
    shared = torch.randn(400, 16, generator=rng)
    a, b = 4 * torch.randn(2, 16, generator=rng)
    images, texts = F.normalize(shared + a, dim=-1), F.normalize(shared + b, dim=-1)
    apart = Gap(torch.zeros(16), torch.zeros(16))
    centred = Gap(images.mean(0), texts.mean(0))
    torch.testing.assert_close(apart.image(images), images)
    torch.testing.assert_close(apart.text(texts), texts)

    def nearest(gap):
        found = (gap.text(texts) @ gap.image(images).T).argmax(1)
        return (found == torch.arange(400)).float().mean().item()

    assert nearest(centred) > 0.8 and nearest(centred) > 2 * nearest(apart)
    assert centred.image(images).norm(dim=1).tolist() == pytest.approx([1.0] * 400, abs=1e-5)
