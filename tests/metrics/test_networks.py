"""ResNets against an independent forward and published accuracies; the trained classifier's promises."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dmd.data.images import ImageSet, digits, load
from dmd.errors import InputError
from dmd.metrics import networks
from dmd.metrics.networks import CifarResNet, accuracy, load_cifar_resnet, load_classifier, train_classifier

PUBLISHED = {20: 0.9173, 32: 0.9263, 44: 0.9310, 56: 0.9339}  # README of pytorch_resnet_cifar10
PARAMETERS = {
    20: 269_722,
    32: 464_154,
    44: 658_586,
    56: 853_018,
}  # He et al. 2015, table 6, to the last digit


def random_weights(depth, seed=0):
    """A state dict with the names and shapes of the published files, written from the paper alone."""
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def conv(name, width_in, width):
        state[f"{name}.weight"] = torch.randn(width, width_in, 3, 3, generator=generator) / (3 * width_in**0.5)

    def norm(name, width):
        for part in ("weight", "bias", "running_mean", "running_var"):
            state[f"{name}.{part}"] = torch.rand(width, generator=generator) + 0.5 * (part == "running_var")
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    conv("conv1", 3, 16)
    norm("bn1", 16)
    for layer, width_in, width in ((1, 16, 16), (2, 16, 32), (3, 32, 64)):
        for block in range((depth - 2) // 6):
            name = f"layer{layer}.{block}"
            conv(f"{name}.conv1", width if block else width_in, width)
            norm(f"{name}.bn1", width)
            conv(f"{name}.conv2", width, width)
            norm(f"{name}.bn2", width)
    state["linear.weight"] = torch.randn(10, 64, generator=generator)
    state["linear.bias"] = torch.randn(10, generator=generator)
    return state


def save(state, path):
    torch.save({"best_prec1": 12.3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    return path


def plain_forward(state, images, depth):
    """The network in functions of numbers: float64, images in [-1, 1] to (features, logits)."""
    state = {key: value.double() for key, value in state.items()}
    mean, std = torch.tensor([0.485, 0.456, 0.406]).double(), torch.tensor([0.229, 0.224, 0.225]).double()

    def conv_norm(x, conv, norm, stride):
        x = F.conv2d(x, state[f"{conv}.weight"], stride=stride, padding=1)
        scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + 1e-5).sqrt()
        shift = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
        return x * scale[:, None, None] + shift[:, None, None]

    x = (images.double() / 2 + 0.5 - mean[:, None, None]) / std[:, None, None]
    x = conv_norm(x, "conv1", "bn1", 1).relu()
    for layer in (1, 2, 3):
        for block in range((depth - 2) // 6):
            name, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            h = conv_norm(x, f"{name}.conv1", f"{name}.bn1", stride).relu()
            h = conv_norm(h, f"{name}.conv2", f"{name}.bn2", 1)
            if stride == 2:
                zeros = x.new_zeros(len(x), x.shape[1] // 2, *h.shape[2:])
                x = torch.cat((zeros, x[:, :, ::2, ::2], zeros), dim=1)
            x = (h + x).relu()
    features = x.mean((2, 3))
    return features, features @ state["linear.weight"].T + state["linear.bias"]


@pytest.mark.parametrize("depth", PARAMETERS)
def test_resnets_have_the_published_sizes_and_names(tmp_path, depth):
    net = load_cifar_resnet(save(random_weights(depth), tmp_path / "a.th"))
    assert net.name == f"FD-ResNet{depth}"
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[depth]
    assert not any(p.requires_grad for p in net.parameters())


def test_resnet_equals_an_independent_forward(tmp_path):
    state = random_weights(20)
    images = 2 * torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) - 1
    net = load_cifar_resnet(save(state, tmp_path / "a.th"))
    for found, expected in zip(net(images), plain_forward(state, images, 20), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_a_feature_net_stays_in_evaluation_mode(tmp_path):
    net = load_cifar_resnet(save(random_weights(20), tmp_path / "a.th"))
    torch.nn.Sequential(net).train()
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(net(images)[0][:2], net(images[:2])[0], rtol=1e-4, atol=1e-3)


def test_images_of_another_shape_are_refused(tmp_path):
    net = load_cifar_resnet(save(random_weights(20), tmp_path / "a.th"))
    with pytest.raises(ValueError, match=r"shape \(2, 3, 28, 28\), but FD-ResNet20 takes \(B, 3, 32, 32\)"):
        net(torch.zeros(2, 3, 28, 28))


def write_other_network(path):
    torch.save({"state_dict": torch.nn.Linear(3, 3).state_dict()}, path)


def write_without_a_layer(path):
    state = random_weights(20)
    del state["layer3.1.bn2.weight"]
    save(state, path)


def write_uneven_depth(path):
    save(random_weights(20) | {"layer1.3.conv1.weight": torch.zeros(16, 16, 3, 3)}, path)


@pytest.mark.parametrize(
    ("write", "why"),
    [
        (lambda path: path.write_bytes(b"hello"), "it is broken, or holds more than tensors"),
        (lambda path: path.write_bytes(b""), "it is broken"),
        (lambda path: torch.save({"state_dict": CifarResNet(1)}, path), "holds more than tensors"),
        (lambda path: torch.save(torch.zeros(3), path), "holds no 'state_dict' of tensors"),
        (lambda path: torch.save({"state_dict": {"a": 1}}, path), "holds no 'state_dict' of tensors"),
        (write_other_network, "its weights are those of another network"),
        (write_without_a_layer, "its weights are those of another network"),
        (write_uneven_depth, "its weights are those of another network"),
    ],
)
def test_wrong_checkpoints_are_named(tmp_path, write, why):
    path = tmp_path / "a.th"
    write(path)
    with pytest.raises(InputError, match=f"a.th is not a checkpoint of pytorch_resnet_cifar10: .*{why}"):
        load_cifar_resnet(path)


def test_a_cut_checkpoint_is_named(tmp_path):
    path = save(random_weights(20), tmp_path / "a.th")
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(InputError, match="it is broken"):
        load_cifar_resnet(path)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(InputError, match=r"b.th does not exist: give a resnetNN"):
        load_cifar_resnet(tmp_path / "b.th")


@pytest.fixture(scope="module")
def cifar_test(tmp_path_factory):
    if "DMD_TEST_DATA" not in os.environ:
        pytest.skip("DMD_TEST_DATA does not name a folder of real data")
    out = tmp_path_factory.mktemp("cifar10")
    script = Path(os.environ["DMD_TEST_DATA"]) / "unpack.py"
    command = [sys.executable, script, "cifar10", out, "--limit", "1000"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return load(out, "test", 32, 3)


@pytest.mark.parametrize("depth", PUBLISHED)
def test_resnets_reach_their_published_accuracy(cifar_test, depth):
    found = sorted((Path(os.environ["DMD_TEST_DATA"]) / "resnet-cifar10").glob(f"resnet{depth}-*.th"))
    if not found:
        pytest.skip(f"DMD_TEST_DATA has no resnet{depth}-*.th")
    # On all 10,000 images ResNet-20 and -56 give 0.9173 and 0.9339 to the digit. These are the first 1,000, so
    # three standard deviations of a sample of that size are allowed.
    expected = PUBLISHED[depth]
    tolerance = 3 * (expected * (1 - expected) / len(cifar_test)) ** 0.5
    assert accuracy(load_cifar_resnet(found[0]), cifar_test) == pytest.approx(expected, abs=tolerance)


# ----------------------------------------------------------------------------- the trained classifier


@pytest.fixture(scope="module")
def split_digits():
    images = digits()
    held_out = torch.arange(len(images)) % 5 == 0
    return images.select(~held_out), images.select(held_out)


def weights(net):
    return torch.cat([value.double().flatten() for value in net.state_dict().values()])


def test_digits_are_learned(split_digits, tmp_path):
    train, test = split_digits
    net = train_classifier(train, test, seed=0, cache=tmp_path, name="FD-DigitsNet")
    assert net.name == "FD-DigitsNet"
    assert accuracy(net, test) >= 0.985
    config = json.loads(next(tmp_path.glob("*/config.json")).read_text())
    assert config["test_accuracy"] == accuracy(net, test)
    assert config["data"] == train.digest()


def test_training_is_a_function_of_its_arguments(split_digits, tmp_path):
    train, _ = split_digits
    torch.manual_seed(1)
    first = train_classifier(train, None, 3, tmp_path / "a", steps=4)
    torch.manual_seed(2)
    second = train_classifier(train, None, 3, tmp_path / "b", steps=4)
    assert torch.equal(weights(first), weights(second))
    for other in (
        train_classifier(train, None, 4, tmp_path / "a", steps=4),
        train_classifier(train, None, 3, tmp_path / "a", steps=5),
        train_classifier(train.select(torch.arange(1000)), None, 3, tmp_path / "a", steps=4),
    ):
        assert not torch.equal(weights(first), weights(other))
    assert len(list((tmp_path / "a").iterdir())) == 4


def test_global_random_state_is_untouched(split_digits, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train_classifier(split_digits[0], None, 0, tmp_path, steps=2)
    assert torch.equal(torch.get_rng_state(), before)
    load_classifier(next(tmp_path.iterdir()))
    assert torch.equal(torch.get_rng_state(), before)


def test_training_works_where_gradients_are_off(split_digits, tmp_path):
    first = train_classifier(split_digits[0], None, 0, tmp_path / "a", steps=2)
    with torch.no_grad():
        second = train_classifier(split_digits[0], None, 0, tmp_path / "b", steps=2)
    assert torch.equal(weights(first), weights(second))


def test_the_cache_is_used(split_digits, tmp_path, monkeypatch):
    train, test = split_digits
    first = train_classifier(train, test, 0, tmp_path, steps=3)
    monkeypatch.setattr(networks, "_fit", None)  # training again would fail
    second = train_classifier(train, None, 0, tmp_path, steps=3)
    index = torch.arange(20)
    assert torch.equal(first(test.pixels(index))[0], second(test.pixels(index))[0])
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_an_interrupted_save_is_trained_again(split_digits, tmp_path):
    train, _ = split_digits
    first = train_classifier(train, None, 0, tmp_path, steps=3)
    (folder,) = tmp_path.iterdir()
    (folder / "config.json").unlink()  # it is written last
    (folder / "model.safetensors").write_bytes(b"half")
    assert torch.equal(weights(train_classifier(train, None, 0, tmp_path, steps=3)), weights(first))


def test_a_broken_cache_is_named(split_digits, tmp_path):
    train_classifier(split_digits[0], None, 0, tmp_path, steps=2)
    (folder,) = tmp_path.iterdir()
    (folder / "model.safetensors").write_bytes(b"half")
    with pytest.raises(InputError, match=r"model.safetensors"):
        load_classifier(folder)
    (folder / "config.json").write_text('{"name": "x"}')
    with pytest.raises(InputError, match=r"config.json does not describe a trained classifier"):
        load_classifier(folder)
    with pytest.raises(InputError, match=r"config.json does not describe a trained classifier"):
        load_classifier(tmp_path / "nowhere")


@pytest.mark.parametrize(("seed", "size", "sentence"), [(-1, 8, "seed -1"), (2**32, 8, "seed"), (0, 3, "4x4")])
def test_wrong_arguments_of_training_are_named(tmp_path, seed, size, sentence):
    images = ImageSet(torch.zeros(4, 1, size, size).byte(), torch.zeros(4).long(), ("a",))
    with pytest.raises(ValueError, match=sentence):
        train_classifier(images, None, seed, tmp_path)
    assert not list(tmp_path.iterdir())


def test_shifts_move_images_whole():
    images = torch.zeros(200, 1, 5, 5)
    images[:, 0, 2, 2] = 1.0
    moved = networks._shifted(images, 1, torch.Generator().manual_seed(0))
    where = (moved == 1).nonzero()
    assert len(where) == 200
    assert {(int(y), int(x)) for _, _, y, x in where} == {(y, x) for y in (1, 2, 3) for x in (1, 2, 3)}
    black = (moved == -1).sum((1, 2, 3))
    offsets = (where[:, 2:] - 2).abs()
    assert torch.equal(black, 25 - (5 - offsets[:, 0]) * (5 - offsets[:, 1]))


def test_batches_visit_every_image_once_per_pass():
    batches = networks._batches(300, torch.Generator().manual_seed(0))
    drawn = torch.cat([next(batches) for _ in range(75)])  # 75 * 128 = 32 * 300
    for part in drawn.split(300):
        assert torch.equal(part.sort().values, torch.arange(300))
