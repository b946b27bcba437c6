"""`evaluate` against its parts computed by hand, and on images that are known to be good or bad."""

import pytest
import torch
from torch import nn

from dmd.data.images import ImageSet, digits
from dmd.metrics import evaluate as module
from dmd.metrics.evaluate import Reference, evaluate, features_of, spread
from dmd.metrics.frechet import frechet_distance, moments
from dmd.metrics.manifold import diversity, precision_recall
from dmd.metrics.networks import FeatureNet, train_classifier


def linear_net(name="FD-Linear", seed=0):
    """Features are a fixed random projection of the pixels, logits one of the features."""
    generator = torch.Generator().manual_seed(seed)
    trunk, head = nn.Linear(64, 6), nn.Linear(6, 10)
    for parameter in (*trunk.parameters(), *head.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return FeatureNet(name, (1, 8, 8), nn.Sequential(nn.Flatten(), trunk), head)


@pytest.fixture(scope="module")
def images():
    return digits()


def everything(image_set):
    return image_set.pixels(torch.arange(len(image_set)))


def test_all_figures_equal_their_definitions(images):
    net = linear_net()
    real, fake = images.select(torch.arange(300)), images.select(torch.arange(300, 500))
    x = everything(fake)
    found = evaluate(x, fake.labels, net, Reference.of(real, net), batch=64)

    def features(pixels):  # FeatureNet's (0.5, 0.5) normalisation is the identity on [-1, 1]
        return pixels.flatten(1) @ net.trunk[1].weight.T + net.trunk[1].bias

    f_real, f_fake = features(everything(real)), features(x)
    parts = precision_recall(f_real, f_fake)
    logits = f_fake @ net.head.weight.T + net.head.bias
    expected = {
        "fd": frechet_distance(moments(f_real), moments(f_fake)),
        "precision": parts.precision,
        "recall": parts.recall,
        "density": parts.density,
        "coverage": parts.coverage,
        "diversity": diversity(f_fake, fake.labels),
        "accuracy": sum(logits[i].argmax() == fake.labels[i] for i in range(200)).item() / 200,
        "brightness": fake.images.double().mean().item() / 127.5 - 1,
        "contrast": sum(i.double().var(correction=0).sqrt().item() for i in fake.images) / 200 / 127.5,
        "count": 200,
    }
    assert found == pytest.approx(expected, rel=1e-4)


def test_without_labels_all_images_are_one_group(images):
    net = linear_net()
    x = everything(images.select(torch.arange(50)))
    found = evaluate(x, None, net, Reference.of(images, net))
    assert found["diversity"] == pytest.approx(diversity(features_of(x, net)[0], torch.zeros(50)))
    assert "accuracy" not in found


def test_labels_without_pairs_have_no_diversity(images):
    net = linear_net()
    x = everything(images.select(torch.arange(10)))
    found = evaluate(x, torch.arange(10), net, Reference.of(images, net))
    assert "diversity" not in found
    assert "accuracy" in found


def test_a_set_against_itself_is_perfect(images):
    net = linear_net()
    found = evaluate(everything(images), images.labels, net, Reference.of(images, net))
    assert found["fd"] < 1e-6
    assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)


def test_images_are_measured_as_their_png_files(images):
    net = linear_net()
    reference = Reference.of(images, net)
    x = everything(images.select(torch.arange(100)))
    nudged = torch.where(x > 0, x + 0.001, x - 0.001)  # below half a level; black and white leave [-1, 1]
    assert evaluate(nudged, None, net, reference) == evaluate(x, None, net, reference)


def test_worse_images_score_worse(images, tmp_path):
    net = train_classifier(images, None, 0, tmp_path, steps=150)
    half = torch.arange(len(images)) % 2 == 0
    real, other = images.select(half), images.select(~half)
    reference, x = Reference.of(real, net), everything(other)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    good = evaluate(x, other.labels, net, reference)
    noisy = evaluate(x + 0.5 * noise, other.labels, net, reference)
    collapsed = evaluate(x[:1] + 0.05 * noise, other.labels[:1].expand(len(x)), net, reference)
    assert good["fd"] < noisy["fd"] < collapsed["fd"]
    assert good["accuracy"] > max(0.9, noisy["accuracy"])
    assert good["precision"] > 0.8 > noisy["precision"]
    assert good["recall"] > 0.8 > 0.1 > collapsed["recall"]
    assert good["diversity"] > 10 * collapsed["diversity"]


def test_figures_do_not_depend_on_the_batch(images):
    net = linear_net()
    x = everything(images.select(torch.arange(90)))
    whole = evaluate(x, images.labels[:90], net, Reference.of(images, net), batch=90)
    parts = evaluate(x, images.labels[:90], net, Reference.of(images, net, batch=7), batch=7)
    assert parts == pytest.approx(whole, rel=1e-5)


def test_features_of_tensors_and_of_batches_agree(images):
    net = linear_net()
    x = everything(images.select(torch.arange(20)))
    whole, batches = features_of(x, net, 6), features_of((part for part in x.split(3)), net)
    for a, b in zip(whole, batches, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="no images to take FD-Linear features of"):
        features_of([], net)


def test_spread_is_even_and_complete():
    assert spread(4, 10).tolist() == [0, 1, 2, 3]
    assert spread(10, 5).tolist() == [0, 2, 4, 6, 8]
    assert spread(7, 3).tolist() == [0, 2, 4]
    assert len(spread(50_000, 5_000).unique()) == 5_000


def test_manifold_samples_are_capped_and_cover_sorted_classes(images, monkeypatch):
    monkeypatch.setattr(module, "MANIFOLD_SAMPLES", 100)
    by_class = images.select(images.labels.argsort(stable=True))
    net = linear_net()
    reference = Reference.of(by_class, net)
    assert (len(reference.features), len(reference.labels), reference.count) == (100, 100, 1797)
    assert reference.moments.count == 1797
    assert reference.labels.bincount().min() >= 9
    features, _ = features_of(everything(by_class), net)
    found = evaluate(everything(by_class), None, net, reference)
    kept = [i * 1797 // 100 for i in range(100)]
    assert found["precision"] == precision_recall(features[kept], features[kept]).precision
    assert found["fd"] < 1e-6


def test_wrong_input_is_named(images):
    net = linear_net()
    reference, x = Reference.of(images, net), everything(images.select(torch.arange(9)))
    broken = x.clone()
    broken[4, 0, 3, 3] = float("nan")
    few = Reference.of(ImageSet(images.images[:3], images.labels[:3], images.classes), net)
    for arguments, sentence in [
        ((x, None, linear_net("FD-Other"), reference), "reference is of FD-Linear, not of FD-Other"),
        ((images.images, None, net, reference), r"must be float \(N, C, H, W\), not torch.uint8"),
        ((x[0], None, net, reference), r"not torch.float32 \(1, 8, 8\)"),
        ((x[:3], None, net, reference), "3 images against 1797: at least 4"),
        ((x, None, net, few), "9 images against 3: at least 4"),
        ((x, torch.zeros(8), net, reference), "9 images but 8 labels"),
        ((broken, None, net, reference), "image 4 is not finite"),
        ((x.repeat(1, 3, 1, 1), None, net, reference), r"FD-Linear takes \(B, 1, 8, 8\)"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            evaluate(*arguments)
