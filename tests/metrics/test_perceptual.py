"""LPIPS: the values that its authors print, images of any size and depth, gradients, and refusals in one sentence."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dmd.errors import InputError
from dmd.metrics.perceptual import lpips_distance

pytest.importorskip("lpips")
pytestmark = [
    pytest.mark.filterwarnings("ignore:The parameter 'pretrained' is deprecated"),
    pytest.mark.filterwarnings("ignore:Arguments other than a weight enum"),
]

DATA = Path(os.environ.get("DMD_TEST_DATA", "")) / "lpips"
WITH_DATA = pytest.mark.skipif(not DATA.is_dir(), reason="DMD_TEST_DATA does not name a folder of real data")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    """A file with SqueezeNet's tensors, random, by torchvision's names."""
    import torchvision

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("lpips") / "squeeze.pth"
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def distance(trunk):
    return lpips_distance("squeeze", trunk, 64, CPU)


def example(name):
    pixels = np.asarray(Image.open(DATA / "examples" / f"ex_{name}.png").convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 127.5 - 1


@WITH_DATA
@pytest.mark.parametrize(
    ("backbone", "weights", "expected"),
    [
        ("alex", "alexnet_features.safetensors", (0.722, 0.138)),
        ("squeeze", "squeezenet1_1_features.pth", (0.711, 0.148)),
    ],
)
@torch.no_grad()
def test_the_authors_examples(backbone, weights, expected):
    """The first row is printed by richzhang/PerceptualSimilarity for its own images (issue 120); to their digits."""
    distance = lpips_distance(backbone, DATA / weights, 64, CPU)
    reference = example("ref").expand(2, -1, -1, -1)
    found = distance(reference, torch.cat((example("p0"), example("p1"))))
    assert [round(x, 3) for x in found.tolist()] == list(expected)


def test_a_distance_per_sample_with_gradients(distance, rng):
    a, b = (2 * torch.rand(3, 3, 64, 64, generator=rng) - 1 for _ in range(2))
    found = distance(a.requires_grad_(), b)
    assert found.shape == (3,)
    assert (found > 0).all()
    torch.testing.assert_close(found[1:2], distance(a[1:2], b[1:2]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found, distance(b, a))
    assert not distance(b, b).any()
    found.sum().backward()
    assert a.grad.flatten(1).abs().amax(1).min() > 0


def test_small_and_grey_images_are_enlarged_and_coloured(distance, rng):
    a, b = (2 * torch.rand(2, 1, 16, 16, generator=rng) - 1 for _ in range(2))
    large = [torch.nn.functional.interpolate(x, size=(64, 64), mode="bilinear").repeat(1, 3, 1, 1) for x in (a, b)]
    torch.testing.assert_close(distance(a, b), distance(*large))


def test_half_precision_images_are_measured_in_float32(distance, rng):
    a, b = ((2 * torch.rand(1, 3, 64, 64, generator=rng) - 1).bfloat16() for _ in range(2))
    assert distance(a, b).dtype == torch.float32
    assert torch.equal(distance(a, b), distance(a.float(), b.float()))


def test_what_cannot_be_read_is_refused(trunk, tmp_path):
    with pytest.raises(InputError, match=r"absent.pth does not exist: give the backbone's state dict"):
        lpips_distance("squeeze", tmp_path / "absent.pth", 64, CPU)
    (tmp_path / "damaged.pth").write_bytes(b"no weights")
    with pytest.raises(InputError, match=r"damaged.pth is not a readable state dict \(\w+\)"):
        lpips_distance("squeeze", tmp_path / "damaged.pth", 64, CPU)
    with pytest.raises(InputError, match=r"squeeze.pth belongs to another network: it has no fitting 'slice1.2"):
        lpips_distance("vgg", trunk, 64, CPU)


def test_a_pickle_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"features.0.weight": Payload()}, tmp_path / "hostile.pth")
    with pytest.raises(InputError, match=r"hostile.pth is not a readable state dict"):
        lpips_distance("squeeze", tmp_path / "hostile.pth", 64, CPU)
    assert not (tmp_path / "ran").exists()


def test_weights_that_cannot_be_downloaded(monkeypatch, tmp_path):
    import lpips

    def fail(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(lpips, "LPIPS", fail)
    with pytest.raises(InputError, match=r"LPIPS-vgg could not be downloaded \(no route to host\): give a file by"):
        lpips_distance("vgg", None, 64, CPU)
