"""Frozen features are the network's own, cached ones are fresh ones, and pictures show what is there."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.decomposition import PCA

from dmd.data.images import ImageSet, to_float
from dmd.errors import InputError
from dmd.metrics.sources import Arrays
from dmd.represent import backbones, features, maps, pictures

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with a small vision transformer, and the network."""
    folder = tmp_path_factory.mktemp("run")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = backbones.build(backbones.describe("vit_mini", 16, 3, patch=4, method="simclr")).eval()
    backbones.save(net, folder / "backbone")
    return folder, net


@pytest.fixture
def source():
    levels = torch.randint(0, 256, (7, 3, 16, 16), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    return Arrays.of("noise", ImageSet(levels, torch.arange(7) % 2, ("a", "b"))), levels


def counted(net):
    """How often a network is called."""
    calls = []
    net.extractor.net.register_forward_hook(lambda *_: calls.append(1))
    return calls


@torch.no_grad()
def test_features_of_a_run_are_its_backbones(run, source, tmp_path):
    folder, backbone = run
    images, levels = source
    for path in (folder, folder / "backbone"):
        net = features.load(str(path))
        found = features.features(images, net, tmp_path, CPU, 3, False)
        assert torch.allclose(found, backbone(to_float(levels)), atol=1e-5)
        tokens = features.grids(net.prepared(list(images.images)), net, CPU, 2)
        assert torch.allclose(tokens.flatten(1, 2), backbone.tokens(to_float(levels)), atol=1e-5)


def test_cached_features_are_fresh_ones(run, source, tmp_path):
    folder, _ = run
    images, levels = source
    net = features.load(str(folder))
    calls = counted(net)
    fresh = features.features(images, net, tmp_path, CPU, 4, False)
    seen = len(calls)
    cached = features.features(images, net, tmp_path, CPU, 4, False)
    assert len(calls) == seen == 2 and torch.equal(fresh, cached)
    changed = levels.clone()
    changed[6, 0, 0, 0] ^= 1
    other = Arrays.of("noise", ImageSet(changed, torch.zeros(7, dtype=torch.int64), ("a",)))
    assert not torch.equal(features.features(other, net, tmp_path, CPU, 4, False), fresh)
    assert len(calls) == 4


def test_the_cache_knows_size_and_weights(run, source, tmp_path):
    folder, backbone = run
    images, _ = source
    first = features.features(images, features.load(str(folder)), tmp_path, CPU, 8, False)
    larger = features.features(images, features.load(str(folder), 24), tmp_path, CPU, 8, False)
    with torch.no_grad():
        moved = backbones.build(backbone.config)
        moved.load_state_dict(backbone.state_dict())
        next(moved.parameters()).add_(0.1)
    third = features.features(images, features.of_backbone(moved, "moved"), tmp_path, CPU, 8, False)
    assert not torch.equal(first, larger) and not torch.equal(first, third)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign"])
def test_a_damaged_cache_is_made_again(run, source, tmp_path, damage):
    net = features.load(str(run[0]))
    fresh = features.features(source[0], net, tmp_path, CPU, 8, False)
    (file,) = tmp_path.iterdir()
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-3])
    elif damage == "flipped":
        content = bytearray(file.read_bytes())
        content[-1] ^= 64
        file.write_bytes(content)
    else:
        save_file({"features": torch.zeros(7, 2)}, file)
    assert torch.equal(features.features(source[0], net, tmp_path, CPU, 8, False), fresh)
    assert torch.equal(load_file(file)["features"], fresh)


def test_a_rectangle_is_seen_by_its_middle_square():
    image = np.arange(7 * 4 * 3, dtype=np.uint8).reshape(7, 4, 3)
    assert (features.middle_square(image) == image[1:5]).all()
    assert (features.middle_square(image.transpose(1, 0, 2)) == image.transpose(1, 0, 2)[:, 1:5]).all()


@pytest.mark.parametrize("kind", ["vit", "clip", "convnext"])
def test_networks_of_transformers_have_tokens_too(tmp_path, kind):
    """Those after the class token, or the last map."""
    import transformers

    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    common |= {"image_size": 24, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "vit":
            net = transformers.ViTModel(transformers.ViTConfig(**common))
        elif kind == "clip":
            sides = {"text_config": {**common, "vocab_size": 20}, "vision_config": common}
            net = transformers.CLIPModel(transformers.CLIPConfig(**sides, projection_dim=12))
        else:
            net = transformers.ConvNextModel(transformers.ConvNextConfig(hidden_sizes=[8, 8, 8, 16], depths=[1] * 4))
    net.eval().save_pretrained(tmp_path)
    facts = {"image_processor_type": "ViTImageProcessor", "size": {"height": 24, "width": 24}}
    facts |= {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(facts))
    frozen = features.load(f"transformers:{tmp_path}", 96 if kind == "convnext" else None)
    side = 96 if kind == "convnext" else 24
    image = torch.rand(2, 3, side, side) * 255
    shown = (image / 255 - torch.tensor(facts["image_mean"])[:, None, None]) / torch.tensor([0.2, 0.3, 0.4])[
        :, None, None
    ]
    with torch.no_grad():
        tokens = features.grids(image, frozen, CPU, 2)
        whole = (net.vision_model if kind == "clip" else net)(pixel_values=shown).last_hidden_state
    expected = whole.permute(0, 2, 3, 1) if kind == "convnext" else whole[:, 1:].unflatten(1, (3, 3))
    assert tokens.shape == (2, 3, 3, 16) and torch.allclose(tokens, expected, atol=1e-5)


def test_networks_of_timm_have_tokens_too(tmp_path):
    import timm

    net = timm.create_model("vit_tiny_patch16_224")
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    frozen = features.load("timm:vit_tiny_patch16_224", 32, tmp_path / "w.safetensors")
    image = torch.rand(1, 3, 32, 32) * 255
    with torch.no_grad():
        tokens = features.grids(image, frozen, CPU, 1)
        trunk = frozen.extractor.net.trunk
        whole = trunk.forward_features((image / 255 - 0.5) / 0.5)  # as this network was trained
        assert tokens.shape == (1, 2, 2, 192) and torch.allclose(tokens.flatten(1, 2), whole[:, 1:], atol=1e-5)
        assert torch.allclose(frozen.extractor.net(image), whole[:, 0], atol=1e-4)
    with pytest.raises(InputError, match="patches of 16 px, which do not divide 40 px"):
        features.load("timm:vit_tiny_patch16_224", 40, tmp_path / "w.safetensors")


def test_what_cannot_be_probed_says_why(run, tmp_path):
    folder, _ = run
    with pytest.raises(InputError, match="18 x 18 pixels cannot be cut into patches of 4 x 4"):
        features.load(str(folder), 18)
    with pytest.raises(InputError, match="whose folder holds its weights"):
        features.load(str(folder), None, tmp_path / "w.pth")
    with pytest.raises(InputError, match="there is no network 'nothing'"):
        features.load("nothing")
    grey = backbones.build(backbones.describe("resnet_mini", 16, 1, small_stem=True))
    net = features.of_backbone(grey, "grey")
    colour = Arrays("colour", np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8))
    with pytest.raises(InputError, match="image 0: an image is in colour, but grey takes grey ones"):
        features.features(colour, net, tmp_path, CPU, 2, False)


def test_features_that_are_not_finite_are_not_cached(source, tmp_path):
    net = backbones.build(backbones.describe("vit_mini", 16, 3, patch=4))
    with torch.no_grad():
        net.net.norm.weight[0] = float("nan")
    with pytest.raises(InputError, match="the features of noise, image 0 by broken are not finite"):
        features.features(source[0], features.of_backbone(net, "broken"), tmp_path, CPU, 2, False)
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------- pictures


def test_components_are_scikit_learns():
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 3, 2, 1, 0.5, 0.1])
    ours, theirs = pictures.components(x, 3), PCA(3).fit(x.double().numpy()).components_
    assert np.abs(np.abs((ours.numpy() * theirs).sum(1)) - 1).max() < 1e-9
    assert (ours.gather(1, ours.abs().argmax(1, keepdim=True)) > 0).all()
    line = pictures.components(x[:, :1] * torch.ones(1, 6), 3)
    assert line[0].norm() == pytest.approx(1) and not line[1:].any()


@pytest.fixture
def scene():
    """Tokens of 4 images: a thing of four kinds of patches in the middle, on a background."""
    generator = torch.Generator().manual_seed(3)
    kinds = F.one_hot(torch.arange(4), 8).float() * 2 + F.one_hot(torch.tensor(7), 8) * 10
    front = torch.zeros(4, 8, 8, dtype=torch.bool)
    front[:, 2:6, 3:7] = True
    kind = torch.randint(0, 4, (4, 8, 8), generator=generator)
    tokens = torch.where(front[..., None], kinds[kind], torch.zeros(8))
    return tokens + 0.05 * torch.randn(tokens.shape, generator=generator), front, kind


@pytest.mark.parametrize("sign", [1, -1])
def test_the_foreground_is_what_is_not_at_the_border(scene, sign):
    tokens, front, _ = scene
    assert torch.equal(pictures.foreground(sign * tokens), front)


def test_like_patches_have_like_colours_and_unlike_ones_do_not(scene):
    tokens, front, kind = scene
    shown = pictures.colours(tokens).permute(0, 2, 3, 1)
    assert (shown[~front] == pictures.BACKGROUND).all()
    means = []
    for k in range(4):
        these = shown[front & (kind == k)].float()
        assert these.std(0).max() < 25
        means.append(these.mean(0))
    apart = torch.cdist(torch.stack(means), torch.stack(means))
    assert apart[~torch.eye(4, dtype=torch.bool)].min() > 60


def test_a_page_has_each_image_above_its_picture():
    images = torch.arange(4, dtype=torch.uint8).reshape(4, 1, 1, 1).expand(4, 1, 5, 5) * 50
    shown = torch.full((4, 3, 2, 2), 7, dtype=torch.uint8)
    page = pictures.page(images, shown, 2, 10)
    assert page.shape == (3, 4 * 12, 2 * 12)
    corners = page[0, ::12, ::12]
    assert corners.tolist() == [[0, 50], [7, 7], [100, 150], [7, 7]]


def test_pictures_of_nothing_are_refused(scene):
    with pytest.raises(InputError, match="2 x 8 tokens of an image, too few"):
        pictures.colours(scene[0][:, :2])
    broken = scene[0].clone()
    broken[0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        pictures.colours(broken)


# ----------------------------------------------------------------------------- maps


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_a_map_keeps_neighbours_together(method):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat_interleave(20)
    x = 4 * F.one_hot(labels, 16) + 0.3 * torch.randn(80, 16, generator=generator)
    at = maps.places(x, method, 0)
    assert at.min() >= 0 and at.max() == pytest.approx(1)
    distance = torch.cdist(at, at).fill_diagonal_(9)
    assert (labels[distance.argmin(1)] == labels).double().mean() > 0.97
    assert torch.equal(at, maps.places(x, method, 0))
    if method == "pca":
        z = F.normalize(x.double(), dim=1).numpy()
        theirs = torch.from_numpy(PCA(2).fit_transform(z))
        ratio = torch.cdist(theirs, theirs) / torch.cdist(at, at)
        assert ratio[~torch.eye(80, dtype=torch.bool)].std() < 1e-6


def test_dots_have_the_colour_of_their_class():
    at = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.5, 0.5]], dtype=torch.float64)
    page = maps.draw(at, torch.tensor([0, 1, 0]), ("a", "b"), "title", 200)
    first, second = maps.palette(2)
    near = lambda x, y, colour: (page[:, y, x].float() - torch.tensor(colour)).abs().max() < 12  # noqa: E731
    assert near(40, 160, first) and near(160, 40, second) and near(100, 100, first)
    assert near(207, 47, first) and near(207, 71, second)  # the legend
    assert Image.fromarray(page.permute(1, 2, 0).numpy()).size == (430, 200)
    assert len(set(maps.palette(24))) == 24
