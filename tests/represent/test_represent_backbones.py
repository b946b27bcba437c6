"""Backbones: what is exported is what timm loads, tokens are the network's, and bad input is refused."""

import json

import pytest
import timm
import torch

from dmd.errors import InputError
from dmd.represent import backbones
from dmd.represent.backbones import describe


def made(name="vit_mini", size=32, patch=8, **more):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = backbones.build(describe(name, size, 3, patch, **more))
        for p in net.parameters():  # timm leaves class tokens and biases near 0
            torch.nn.init.normal_(p, std=0.1)
    return net.eval()


IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(
    ("name", "patch", "more"),
    [("vit_mini", 8, {}), ("resnet_mini", None, {}), ("resnet_mini", None, {"small_stem": 1})],
)
def test_a_folder_gives_the_same_features(tmp_path, name, patch, more):
    net = made(name, patch=patch, **more)
    backbones.save(net, tmp_path / "backbone")
    again = backbones.load_backbone(tmp_path / "backbone")
    assert torch.equal(again(IMAGES), net(IMAGES)) and torch.equal(again.tokens(IMAGES), net.tokens(IMAGES))
    assert not again.training and not any(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize(("name", "patch"), [("vit_mini", 8), ("resnet_mini", None)])
def test_timm_loads_the_folder_in_one_line(tmp_path, name, patch):
    """timm's own preparation of an image in [0, 1], and its features: the same as ours of the image in [-1, 1]."""
    net = made(name, patch=patch)
    backbones.save(net, tmp_path / "backbone")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'backbone'}", pretrained=True).eval()
    data = timm.data.resolve_model_data_config(theirs)
    mean, std = (torch.tensor(data[k]).reshape(-1, 1, 1) for k in ("mean", "std"))
    assert data["input_size"] == (3, 32, 32)
    torch.testing.assert_close(theirs((IMAGES / 2 + 0.5 - mean) / std), net(IMAGES), rtol=1e-5, atol=1e-5)


def test_tokens_of_a_transformer_are_its_patches_and_those_of_a_convolution_its_last_map():
    net = made("vit_mini")
    whole = net.net.forward_features(net.standardised(IMAGES))
    assert torch.equal(net.tokens(IMAGES), whole[:, 1:]) and torch.equal(net(IMAGES), whole[:, 0])
    assert net.grid(32, 64) == (4, 8) and net.tokens(IMAGES.repeat(1, 1, 1, 2)).shape[1] == 32
    conv = made("resnet_mini", patch=None)
    tokens = conv.tokens(torch.cat((IMAGES, IMAGES), 3))
    assert conv.grid(32, 64) == (1, 2) and tokens.shape[1] == 2
    torch.testing.assert_close(tokens.mean(1), conv(torch.cat((IMAGES, IMAGES), 3)))


def test_a_small_stem_keeps_the_resolution():
    """Of 8 x 8 pixels a ResNet's own stem leaves 2 x 2 and its stages 1 x 1 from the second on."""
    small, own = made("resnet_mini", 8, None, small_stem=True), made("resnet_mini", 8, None)
    assert small.grid(32, 32) == (4, 4) and own.grid(32, 32) == (1, 1)


def test_bad_input_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="30 x 30 pixels cannot be cut into patches of 8 x 8"):
        backbones.build(describe("vit_mini", 30, 3, 8))
    with pytest.raises(InputError, match="32 x 30 pixels cannot be cut"):
        made()(IMAGES[..., :30])
    with pytest.raises(InputError, match="1 channels, but the backbone takes 3"):
        made()(IMAGES[:, :1])
    with pytest.raises(InputError, match="no backbone 'resnet1x'"):
        backbones.build(describe("resnet1x", 32, 3))
    with pytest.raises(InputError, match="--small-stem is for ResNets"):
        backbones.build(describe("vit_mini", 32, 3, 8, small_stem=True))
    with pytest.raises(InputError, match="is no backbone"):
        backbones.load_backbone(tmp_path)
    backbones.save(made(), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["dmd"]["arguments"]["depth"] = 5
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match="belongs to another architecture"):
        backbones.load_backbone(tmp_path)
