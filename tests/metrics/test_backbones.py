"""Networks for metrics against the packages' own way from an image to features, and clean-fid's whole FID."""

import hashlib
import io
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from dmd.errors import InputError
from dmd.metrics import backbones, inception
from dmd.metrics.backbones import load
from dmd.metrics.frechet import frechet_distance, moments
from dmd.metrics.networks import FeatureNet
from dmd.metrics.sources import read

PUBLISHED = inception.SHA256


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@torch.no_grad()
def seen(extractor, images):
    return extractor.net(torch.from_numpy(np.stack([extractor.prepare(image) for image in images])))


# ----------------------------------------------------------------------------- Inception


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 9, 16)
        self.last = nn.Linear(8 * 19 * 19, 2048)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)).flatten(1))


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = Layers()

    def forward(self, x):
        return self.layers(x)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small program in the place of the published file, whose SHA-256 it takes."""
    file = tmp_path_factory.mktemp("inception") / inception.FILE
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.jit.script(Whole()).save(str(file))
    patch = pytest.MonkeyPatch()
    patch.setattr(inception, "SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    yield file
    patch.undo()


def test_fid_equals_clean_fid_s_from_the_files_on(weights, tmp_path):
    """Two folders of PNG files of several sizes through clean-fid's own reader, resizer, network and distance."""
    fid = pytest.importorskip("cleanfid.fid")
    features = pytest.importorskip("cleanfid.features")
    for name, count, shift in (("a", 12, 0), ("b", 10, 40)):
        for i in range(count):
            size = (32, 32, 3) if i % 2 else (40, 25, 3)
            (tmp_path / name).mkdir(exist_ok=True)
            array = np.clip(pixels(*size, seed=100 * shift + i).astype(int) + shift, 0, 255).astype(np.uint8)
            Image.fromarray(array).save(tmp_path / name / f"{i:02d}.png")
    theirs = features.InceptionV3W(str(weights.parent), download=False)
    expected = [
        fid.get_folder_features(str(tmp_path / name), theirs, 0, device=torch.device("cpu"), verbose=False)
        for name in "ab"
    ]
    extractor = load("inception", weights)
    found = [seen(extractor, [i for batch in read(tmp_path / name).batches(5) for i in batch]) for name in "ab"]
    for ours, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), other, rtol=1e-4, atol=1e-5)
    ours = frechet_distance(*(moments(x[:, :6]) for x in found))  # its root of a singular covariance is not exact
    assert ours == pytest.approx(fid.fid_from_feats(*[e[:, :6].astype(np.float64) for e in expected]), rel=1e-4)
    assert extractor.label == "FID"


def test_another_file_is_refused_before_it_is_opened(weights, tmp_path):
    other = tmp_path / inception.FILE
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    other.write_bytes(bytes(content))
    with pytest.raises(InputError, match="is not inception-2015-12-05.pt: its SHA-256 is") as caught:
        load("inception", other)
    assert "\n" not in str(caught.value)
    other.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="or was cut"):
        load("inception", other)
    with pytest.raises(InputError, match=r"nothing.pt cannot be read"):
        load("inception", tmp_path / "nothing.pt")
    with pytest.raises(InputError, match="give it as --weights, or --download it"):
        load("inception", cache=tmp_path / "empty")


def test_the_published_sum_is_asked_for():
    assert PUBLISHED == "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
    with pytest.raises(InputError):
        inception.check(b"", "x")


def test_a_download_is_checked_and_kept(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(inception, "URL", weights.as_uri())
    file = inception.download(tmp_path / "cache")
    assert file.read_bytes() == weights.read_bytes()
    monkeypatch.setattr(inception, "URL", "file:///nowhere")
    assert inception.download(tmp_path / "cache") == file
    assert load("inception", cache=tmp_path / "cache").network == "Inception-v3"
    with pytest.raises(InputError, match="could not be downloaded"):
        inception.download(tmp_path / "other")
    bad = tmp_path / "bad.pt"
    bad.write_bytes(b"an error page")
    monkeypatch.setattr(inception, "URL", bad.as_uri())
    with pytest.raises(InputError, match="or was cut"):
        inception.download(tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []


# ----------------------------------------------------------------------------- other packages


def test_timm_s_features_are_its_own(tmp_path):
    timm = pytest.importorskip("timm")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = timm.create_model("test_resnet").eval()
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    extractor = load("timm:test_resnet", tmp_path / "w.safetensors")
    side = net.pretrained_cfg["input_size"][1]
    image = pixels(side, side, 3)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(net.pretrained_cfg) | {"crop_pct": 1.0})
    with torch.no_grad():
        expected = net.forward_head(net.forward_features(transform(Image.fromarray(image))[None]), pre_logits=True)
    torch.testing.assert_close(seen(extractor, [image]), expected, rtol=1e-4, atol=1e-4)
    assert extractor.label == "FD-test_resnet"


def test_a_timm_transformer_can_have_another_input_size(tmp_path):
    timm = pytest.importorskip("timm")
    net = timm.create_model("test_vit").eval()
    torch.save(net.state_dict(), tmp_path / "w.pth")
    extractor = load("timm:test_vit", tmp_path / "w.pth", size=96)
    assert extractor.prepare(pixels(50, 50, 3)).shape == (3, 96, 96)
    assert seen(extractor, [pixels(50, 50, 3)]).shape == (1, net.num_features)
    unchanged = load("timm:test_vit", tmp_path / "w.pth")
    side = net.pretrained_cfg["input_size"][1]
    x = torch.from_numpy(unchanged.prepare(pixels(side, side, 3)))[None] / 255
    mean, std = (torch.tensor(net.pretrained_cfg[k]).reshape(-1, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        expected = net.forward_head(net.forward_features((x - mean) / std), pre_logits=True)
    torch.testing.assert_close(seen(unchanged, [pixels(side, side, 3)]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_torchvision_s_features_are_what_its_last_layer_sees(tmp_path, name):
    models = pytest.importorskip("torchvision.models")
    with torch.random.fork_rng():
        torch.manual_seed(2)
        net = models.get_model(name, weights=None).eval()
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    extractor = load(f"torchvision:{name}", tmp_path / "w.safetensors")
    image = pixels(224, 224, 3)
    mean, std = (torch.tensor(v).reshape(-1, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = (torch.from_numpy(image).permute(2, 0, 1)[None] / 255 - mean) / std
    last = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
    inputs = []
    last.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    with torch.no_grad():
        net(x)
    torch.testing.assert_close(seen(extractor, [image]), inputs[0], rtol=1e-4, atol=1e-4)


def save_vit(folder):
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=24, patch_size=8
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = ViTModel(config).eval()
    net.save_pretrained(folder)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 24, "width": 24}, "resample": 3}
    settings |= {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "do_normalize": True, "do_resize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return net


def test_transformers_features_are_its_own(tmp_path):
    pytest.importorskip("transformers")
    from transformers import AutoImageProcessor

    net = save_vit(tmp_path / "vit")
    image = pixels(24, 24, 3)
    inputs = AutoImageProcessor.from_pretrained(tmp_path / "vit")(images=[image], return_tensors="pt")
    with torch.no_grad():
        expected = net(**inputs).pooler_output
    extractor = load(f"transformers:{tmp_path / 'vit'}")
    torch.testing.assert_close(seen(extractor, [image]), expected, rtol=1e-4, atol=1e-4)
    assert extractor.label == "FD-vit"
    resized = load(f"transformers:{tmp_path / 'vit'}").prepare(pixels(50, 30, 3))
    assert resized.shape == (3, 24, 24)


def test_our_own_classifiers_are_measured_as_in_a_run():
    from dmd.data.images import to_float

    trunk, head = nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), nn.Linear(5, 10)
    net = FeatureNet("FD-Linear", (1, 8, 8), trunk, head)
    images = pixels(6, 8, 8, 1)
    extractor = backbones.of_classifier(net)
    expected, _ = net(to_float(torch.from_numpy(images).permute(0, 3, 1, 2)))
    assert torch.equal(seen(extractor, list(images)), expected)
    assert (extractor.label, extractor.network, extractor.head) == ("FD-Linear", "Linear", head)


def test_a_resnet_of_cifar_is_found_by_its_file():
    folder = os.environ.get("DMD_TEST_DATA")
    if folder is None:
        pytest.skip("needs pretrained networks: set DMD_TEST_DATA to their folder")
    extractor = load(f"{folder}/resnet-cifar10/resnet20-12fca82f.th")
    assert extractor.label == "FD-ResNet20"
    assert seen(extractor, [pixels(32, 32, 3)]).shape == (1, 64)


# ----------------------------------------------------------------------------- wrong input


def test_weights_of_another_network_are_refused(tmp_path):
    timm = pytest.importorskip("timm")
    state = timm.create_model("test_resnet").state_dict()
    state.pop("conv1.weight" if "conv1.weight" in state else next(iter(state)))
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="belongs to another architecture: tensor .* is absent there"):
        load("timm:test_resnet", tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(InputError, match="not a readable state dict"):
        load("timm:test_resnet", tmp_path / "w.safetensors")


class Payload:
    def __reduce__(self):
        return (open, ("/nowhere/at/all", "w"))


def test_a_pickle_is_not_executed(tmp_path):
    pytest.importorskip("timm")
    torch.save({"weight": Payload()}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="not a readable state dict"):
        load("timm:test_resnet", tmp_path / "w.pth")
    buffer = io.BytesIO()
    torch.save([torch.zeros(2)], buffer)
    (tmp_path / "w.pth").write_bytes(buffer.getvalue())
    with pytest.raises(InputError, match="is not a state dict"):
        load("timm:test_resnet", tmp_path / "w.pth")


def test_nothing_is_fetched_unless_asked_for(tmp_path, monkeypatch):
    pytest.importorskip("timm")
    import socket

    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("the network was used"))
    for name in ("timm:test_resnet", "torchvision:resnet18", "transformers:owner/nothing", "inception"):
        with pytest.raises(InputError, match="--download"):
            load(name, cache=tmp_path)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("timm:resnet_nothing", "timm has no network 'resnet_nothing'"),
        ("torchvision:resnet_nothing", "torchvision has no classifier 'resnet_nothing': it has"),
        ("nothing", "there is no network 'nothing': give inception, timm:NAME"),
        ("resnet20.th", "resnet20.th does not exist"),
    ],
)
def test_unknown_networks_are_named(name, sentence):
    pytest.importorskip("timm")
    with pytest.raises(InputError, match=sentence):
        load(name)


def test_weights_beside_a_file_are_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be used with resnet20.th"):
        load("resnet20.th", tmp_path / "w.safetensors")
