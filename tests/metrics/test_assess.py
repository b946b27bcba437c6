"""What is seen of sources, the figures of it, and references that are kept."""

import numpy as np
import pytest
import torch
from torch import nn

from dmd.data import shapes
from dmd.errors import InputError
from dmd.metrics import assess
from dmd.metrics.assess import Census, caption_hits, features, figures, look, notes, reference_of
from dmd.metrics.backbones import Extractor, OfClassifier, of_classifier
from dmd.metrics.evaluate import Reference, evaluate
from dmd.metrics.frechet import frechet_distance, moments
from dmd.metrics.kernel import kernel_distance
from dmd.metrics.networks import FeatureNet
from dmd.metrics.protocols import as_it_is, bicubic
from dmd.metrics.sources import Arrays

CPU = torch.device("cpu")


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def network(seed=0, classes=10, dim=6):
    generator = torch.Generator().manual_seed(seed)
    trunk, head = nn.Linear(64, dim), nn.Linear(dim, classes)
    for parameter in (*trunk.parameters(), *head.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return FeatureNet("FD-Linear", (1, 8, 8), nn.Sequential(nn.Flatten(), trunk), head)


NET = network()
REAL = Arrays("real", pixels(300, 8, 8, 1), torch.arange(300) % 10)
FAKE = Arrays("fake", (pixels(200, 8, 8, 1, seed=1) * 0.9).astype(np.uint8), torch.arange(200) % 10)


def seen_of(source, extractor=None, batch=64):
    found, _ = look(
        source, {"features": features(source, extractor or of_classifier(NET), as_it_is, CPU)}, batch, False
    )
    return found


def reference(tmp_path, source=REAL, extractor=None, protocol="network"):
    extractor = extractor or of_classifier(NET)
    cache = tmp_path / "cache"
    return reference_of(source, source.digest(), extractor, as_it_is, protocol, cache, CPU, 64, False)


def test_figures_equal_those_of_a_run_and_their_definitions(tmp_path):
    seen = seen_of(FAKE)
    ref = reference(tmp_path)
    found = figures(FAKE, seen, "FD-Linear", ref, NET.head, 0, 0)
    images = torch.from_numpy(FAKE.images).permute(0, 3, 1, 2) / 127.5 - 1
    theirs = evaluate(images, FAKE.labels, NET, ref)
    same = {"FD-Linear": "fd"} | {n: n for n in ("precision", "recall", "density", "coverage", "diversity", "accuracy")}
    assert {n: found[n].value for n in same} == pytest.approx({n: theirs[m] for n, m in same.items()}, rel=1e-9)
    real = seen_of(REAL)["features"]
    assert found["FD-Linear"].value == frechet_distance(moments(real), moments(seen["features"]))
    assert found["KD-Linear"].value == pytest.approx(kernel_distance(real, seen["features"]), rel=1e-9)
    assert found["FD-Linear"].low is None


def test_batches_do_not_matter():
    torch.testing.assert_close(seen_of(FAKE, batch=7), seen_of(FAKE, batch=200), rtol=1e-5, atol=1e-6)


def test_intervals_shrink_with_samples(tmp_path):
    ref = reference(tmp_path)
    whole = figures(FAKE, seen_of(FAKE), "FD-Linear", ref, NET.head, 0, 40)
    part = FAKE.select(range(50))
    few = figures(part, seen_of(part), "FD-Linear", ref, NET.head, 0, 40)
    for name in ("FD-Linear", "KD-Linear", "accuracy", "precision"):
        assert few[name].high - few[name].low > 1.2 * (whole[name].high - whole[name].low), name


def test_the_interval_of_a_distance_is_its_spread_over_fresh_samples(tmp_path):
    """Against sets that are really drawn anew, which a user does not have."""
    ref = reference(tmp_path)

    def drawn(seed):
        return Arrays("x", (pixels(200, 8, 8, 1, seed=seed) * 0.9).astype(np.uint8))

    values = [frechet_distance(ref.moments, moments(seen_of(drawn(s))["features"])) for s in range(40)]
    found = figures(drawn(0), seen_of(drawn(0)), "FD-Linear", ref, None, 0, 60)["FD-Linear"]
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(np.std(values), rel=0.45)


def test_a_reference_is_kept_by_content(tmp_path, monkeypatch):
    first = reference(tmp_path)
    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == 2
    monkeypatch.setattr(assess, "look", lambda *a: pytest.fail("the reference was measured again"))
    renamed = Arrays("another name", REAL.images.copy(), REAL.labels)
    again = reference(tmp_path, renamed)
    assert torch.equal(again.moments.cov, first.moments.cov) and torch.equal(again.features, first.features)
    assert (again.count, again.labels.tolist()) == (300, REAL.labels.tolist())
    monkeypatch.undo()
    changed = REAL.images.copy()
    changed[7, 3, 3, 0] ^= 1
    for other in (
        {"source": Arrays("real", changed, REAL.labels)},
        {"extractor": of_classifier(network(1))},
        {"protocol": "other"},
    ):
        reference(tmp_path, **other)
    assert len(list((tmp_path / "cache").iterdir())) == 8


def test_a_damaged_reference_is_measured_again(tmp_path):
    first = reference(tmp_path)
    (file,) = (tmp_path / "cache").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1  # a flipped bit is no error to safetensors
    file.write_bytes(bytes(content))
    again = reference(tmp_path)
    assert torch.equal(again.moments.mean, first.moments.mean)
    assert torch.equal(reference(tmp_path).features, first.features)
    file.write_bytes(b"")
    assert torch.equal(reference(tmp_path).features, first.features)


def test_drawings_show_what_they_say():
    index = torch.arange(12)
    scenes = shapes.scenes(0, index)
    drawn = shapes.batch(scenes, 0, index).permute(0, 2, 3, 1).numpy()
    captions = [shapes.caption(s) for s in scenes]
    right = Arrays("right", drawn, None, tuple(captions))
    wrong = Arrays("wrong", drawn, None, tuple(captions[1:] + captions[:1]))
    for source, part in ((right, 1.0), (wrong, 0.0)):
        seen, _ = look(source, {"captions": caption_hits(source)}, 5, False)
        found = figures(source, seen, "", None, None, 0, 20)
        assert found["caption_agreement"].value == part
        assert set(found) == {
            f"caption_{n}" for n in ("agreement", "count", "background", "shape", "colour", "size", "where")
        }


def test_wrong_input_is_named(tmp_path):
    extractor = of_classifier(NET)
    with pytest.raises(InputError, match="fake, image 3: an image has 9x8 pixels, but FD-Linear takes 8x8"):
        odd = Arrays("fake", pixels(5, 9, 8, 1))
        look(odd, {"features": lambda i, first: features(odd, extractor, as_it_is, CPU)(i[3:], first + 3)}, 8, False)
    broken = network()
    broken.trunk[1].bias.data[2] = float("nan")
    with pytest.raises(InputError, match="features of fake, image 0 by Linear are not finite"):
        seen_of(FAKE, of_classifier(broken))
    one = FAKE.select([0])
    with pytest.raises(InputError, match="fake holds 1 image: at least 4 are needed"):
        figures(one, seen_of(one), "FD-Linear", reference(tmp_path), None, 0, 0)
    with pytest.raises(InputError, match="fake holds 2 images: at least 4"):
        reference(tmp_path, FAKE.select([0, 1]))
    with pytest.raises(InputError, match="fake has no captions, which agreement with captions needs"):
        caption_hits(FAKE)
    with pytest.raises(InputError, match="caption of x, image 0 cannot be read: 'cat' is not a word"):
        caption_hits(Arrays("x", FAKE.images[:1], None, ("a cat",)))
    small = Arrays("x", pixels(1, 8, 8, 3), None, (shapes.caption(shapes.scene(0, 0)),))
    with pytest.raises(InputError, match="x, image 0 has 8x8 pixels and 3 channels"):
        look(small, {"captions": caption_hits(small)}, 1, False)


def test_what_limits_figures_is_said(tmp_path):
    census = Census()
    census.add([pixels(8, 8, 1), pixels(9, 8, 3), pixels(8, 8, 3)])
    assert (census.sizes[8, 8], census.grey) == (2, 1)
    extractor = Extractor("Net", "FD-Net", bicubic(8, 8), OfClassifier(NET), "bicubic")
    x = torch.randn(4, 6)
    ref = Reference.of_features(x, torch.zeros(4, dtype=torch.int64), "FD-Net")
    found = "\n".join(notes(FAKE, census, extractor, 6, ref, True))
    assert "3 samples, fewer than 10,000" in found
    assert "fake has 3 images, not more than the features of FD-Net have dimensions, 6" in found
    assert "the reference has 4 images" in found
    assert "images of 2 sizes, from 8x8 to 9x8" in found
    assert "1 of 3 images of fake are grey" in found
    enough = Census()
    enough.sizes[8, 8] = 10_000
    many = Reference(ref.moments, ref.features, ref.labels, 10_000, "FD-Net")
    assert notes(FAKE, enough, extractor, 6, many, True) == []
