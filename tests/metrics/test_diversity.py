"""Diversity within a caption: naive loops, known ends, and the published LPIPS values."""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("lpips")

from dmd.data.images import to_float
from dmd.metrics.diversity import CaptionDiversity

DATA = Path(os.environ.get("DMD_TEST_DATA", "")) / "lpips"


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    """A random SqueezeNet, the smallest backbone."""
    import lpips

    torch.manual_seed(0)
    net = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False).net
    names = {k.replace(k.split(".")[0], "features", 1): v for k, v in net.state_dict().items()}
    path = tmp_path_factory.mktemp("weights") / "squeeze.pth"
    torch.save(names, path)
    return path


@pytest.fixture(scope="module")
def measure(trunk):
    return CaptionDiversity("squeeze", trunk, torch.device("cpu"))


@pytest.fixture
def images():
    x = torch.rand(2, 3, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return F.avg_pool2d(x.flatten(0, 1), 7, 1, 3).unflatten(0, (2, 3)) * 4


def test_figures_are_those_of_a_loop_over_pairs(measure, images):
    found = measure(images)
    net, cosines, distances = measure._net, [], []
    for group in images.clamp(-1, 1):
        features = [net.net(net.scaling_layer(x[None]))[-1].mean((2, 3))[0] for x in group]
        for i, j in ((0, 1), (0, 2), (1, 2)):
            cosines.append(1 - F.cosine_similarity(features[i], features[j], dim=0).item())
            distances.append(net(group[i : i + 1], group[j : j + 1]).item())
    assert found.feature_cosine == pytest.approx(sum(cosines) / 6, rel=1e-4, abs=1e-6)
    assert found.lpips == pytest.approx(sum(distances) / 6, rel=1e-4)


def test_equal_images_have_none_and_other_captions_do_not_count(measure, images):
    same = images[:, :1].expand(-1, 4, -1, -1, -1)
    found = measure(same)
    assert found.feature_cosine == pytest.approx(0, abs=1e-6) and found.lpips == pytest.approx(0, abs=1e-6)
    assert measure(images).lpips > 0.01


def test_small_and_grey_images_are_measured(measure, images):
    grey = images[:, :, :1, :8, :8]
    assert measure(grey).lpips > 0
    assert measure(grey) == measure(grey.expand(-1, -1, 3, -1, -1))


def test_one_image_of_a_caption_is_refused(measure, images):
    with pytest.raises(ValueError, match="at least 2"):
        measure(images[:, :1])


@pytest.mark.skipif(not DATA.is_dir(), reason="DMD_TEST_DATA does not name a folder of real data")
def test_lpips_is_the_published_one():
    """0.722 and 0.138 of AlexNet for the authors' examples; as pairs of a caption their mean."""
    from safetensors.torch import load_file

    from dmd.data.groups import Place, decode

    assert load_file(DATA / "alexnet_features.safetensors")
    measure = CaptionDiversity("alex", DATA / "alexnet_features.safetensors", torch.device("cpu"))
    ref, p0, p1 = (
        to_float(decode(Place(f, 0, f.stat().st_size)))
        for f in (DATA / "examples" / f"ex_{n}.png" for n in ("ref", "p0", "p1"))
    )
    found = measure(torch.stack([torch.stack([ref, p0]), torch.stack([ref, p1])]))
    assert found.lpips == pytest.approx((0.722 + 0.138) / 2, abs=0.001)
