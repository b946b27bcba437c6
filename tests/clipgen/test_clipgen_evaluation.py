"""The judges: blur against SciPy's, distances and scores in closed form, and what is said of them."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from dmd.clipgen import evaluation
from dmd.clipgen.report import headline as sentence
from dmd.errors import InputError
from dmd.metrics.backbones import Extractor
from dmd.metrics.protocols import bicubic, exactly


@pytest.mark.parametrize("radius", [0, 1, 2, 3.5])
def test_blur_is_scipys(rng, radius):
    ndimage = pytest.importorskip("scipy.ndimage")
    x = torch.randn(2, 3, 24, 20, generator=rng)
    got = evaluation.blurred(x, radius)
    expected = ndimage.gaussian_filter(x.numpy(), (0, 0, radius, radius), mode="mirror", truncate=3.0)
    torch.testing.assert_close(got, torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


def test_blur_keeps_flat_images_and_small_ones():
    flat = torch.full((1, 3, 6, 6), 0.3)
    torch.testing.assert_close(evaluation.blurred(flat, 8), flat)


@dataclass(frozen=True)
class Means:
    """A CLIP of the images' mean colours."""

    width = 3

    def images(self, x):
        return x.mean((2, 3))


@dataclass(frozen=True)
class Bare:
    clip: Means
    device: torch.device = torch.device("cpu")


def test_distances_are_those_of_the_features(rng):
    """Mean colours of one set are those of the other plus a shift d: the distance is |d|^2, blurred or not."""
    real, see = torch.randn(64, 3, 8, 8, generator=rng), evaluation.of_clip(Bare(Means()))
    shift = torch.tensor([0.3, -0.2, 0.1])
    goal = evaluation.blurred_moments(real, see, (0, 1, 2))
    got = evaluation.distances(real + shift[:, None, None], goal, see)
    assert list(got) == ["fd_0", "fd_1", "fd_2"]
    for value in got.values():
        assert value == pytest.approx(0.14, rel=1e-4)
    assert evaluation.distances(real, goal, see)["fd_2"] == pytest.approx(0.0, abs=1e-9)


class Corners(torch.nn.Module):
    """The first values of an image in 256 levels, as a network that `backbones` might bring."""

    def forward(self, images):
        return images[:, :, 0, :2].flatten(1)


def test_a_network_beside_clip_sees_blurred_images_as_pixels_by_its_own_protocol(rng):
    """Against blurring by hand, rounding to 256 levels, and clean-fid's resize; the distance bears its name."""
    from PIL import Image

    x = torch.rand(70, 3, 8, 8, generator=rng) * 2 - 1
    extractor = Extractor("Corners", "FD-Corners", bicubic(4, 4), Corners(), "bicubic to 4x4")
    found = evaluation.blurred_moments(x, evaluation.of_network(extractor, torch.device("cpu")), (0, 1))
    for radius, got in found.items():
        levels = ((evaluation.blurred(x, radius) + 1) * 127.5).round().clamp(0, 255)
        rows = []
        for image in levels:
            small = [Image.fromarray(c.numpy()).resize((4, 4), Image.Resampling.BICUBIC) for c in image]
            rows.append(torch.tensor([c.getpixel((i, 0)) for c in small for i in range(2)]).clamp(0, 255))
        mean = torch.stack(rows).double().mean(0)
        torch.testing.assert_close(got.mean.double(), mean, rtol=1e-5, atol=1e-3)
    refusing = Extractor("Eight", "FD-Eight", exactly(3, 16, 16, "Eight"), Corners(), "no resizing")
    with pytest.raises(InputError, match="an image has 8x8 pixels, but Eight takes 16x16"):
        evaluation.of_network(refusing, torch.device("cpu"))(x)


def test_scores_are_a_hundred_cosines(rng):
    x = torch.randn(5, 3, 4, 4, generator=rng)
    texts, pictures = torch.randn(2, 5, 3, generator=rng)
    got = evaluation.scores(x, texts, pictures, Bare(Means()))
    e = x.mean((2, 3))
    assert got["clip_score"] == pytest.approx(20 * sum(F.cosine_similarity(e, texts).tolist()), rel=1e-5)
    assert got["clip_score_image"] == pytest.approx(20 * sum(F.cosine_similarity(e, pictures).tolist()), rel=1e-5)


def test_the_headline_is_ratios_of_the_figures():
    figures = {
        "seen/text": {"clip_score": 20.0, "caption_agreement": 0.4},
        "seen/image": {"clip_score": 25.0, "caption_agreement": 0.5},
        "held_out/text": {"clip_score": 1.0, "caption_agreement": 0.3},
        "held_out/image": {"clip_score": 1.0, "caption_agreement": 0.4},
    }
    found = evaluation.headline(figures)
    assert found == pytest.approx({"gap": 5.0, "text_of_image": 0.8, "held_out_of_seen": 0.75})
    nothing = evaluation.headline({"test/text": {"clip_score": 1.0}, "test/image": {"clip_score": 3.0}})
    assert nothing == {"gap": 2.0}
    figures["seen/image"]["caption_agreement"] = 0.0
    assert "text_of_image" not in evaluation.headline(figures)
    assert not any(math.isnan(v) for v in evaluation.headline(figures).values())
    text = sentence({"figures": figures, **found, "codebook_use": 0.95})
    assert "40.0% of images" in text and "80% of what image" in text and "75% of seen" in text and "95% of the" in text
