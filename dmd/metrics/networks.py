"""Classifiers that lend metrics their features: pretrained CIFAR-10 ResNets, and one trained in seconds.

The public part is `FeatureNet`, and two ways to get one: `load_cifar_resnet` and `train_classifier`.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from dmd.checkpoint import load_weights, save_weights, write_json
from dmd.data.images import ImageSet
from dmd.errors import InputError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CONFIG, WEIGHTS = "config.json", "model.safetensors"
BATCH = 128
MIN_STEPS, MIN_EPOCHS = 800, 5
PEAK_LR, WEIGHT_DECAY = 4e-3, 0.05


class FeatureNet(nn.Module):
    """A frozen classifier, always in evaluation mode: images to features and logits.

    Args:
        name: what distances on its features are called, e.g. "FD-ResNet56".
        shape: (C, H, W) of the images that it was trained on.
        trunk: normalised images (B, C, H, W) to features (B, D).
        head: features to logits (B, K).
        mean, std: per channel, of images in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        shape: tuple[int, int, int],
        trunk: nn.Module,
        head: nn.Module,
        mean: tuple[float, ...] = (0.5,),
        std: tuple[float, ...] = (0.5,),
    ) -> None:
        super().__init__()
        self.name, self.shape, self.trunk, self.head = name, shape, trunk, head
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "FeatureNet":
        """Stay in evaluation mode: a measure must not depend on its batch."""
        return super().train(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Float images in [-1, 1], (B, C, H, W), to features (B, D) and logits (B, K).

        Raises:
            ValueError: the images are not of the shape that the network knows.
        """
        if tuple(images.shape[1:]) != self.shape:
            wanted = "(B, {}, {}, {})".format(*self.shape)
            raise ValueError(f"images have shape {tuple(images.shape)}, but {self.name} takes {wanted}")
        features = self.trunk(((images + 1.0) / 2.0 - self.mean) / self.std)
        return features, self.head(features)


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut that strides and pads new channels with zeros (option A)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.extra = stride, (width - width_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra, self.extra))
        return F.relu(self.bn2(self.conv2(h)) + shortcut)


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2 for 32x32 images without its last layer: (B, 3, 32, 32) to (B, 64).

    He et al. 2015, section 4.2 (arXiv 1512.03385); modules are named as in akamaster/pytorch_resnet_cifar10.
    """

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, 1, blocks)
        self.layer2 = _stage(16, 32, 2, blocks)
        self.layer3 = _stage(32, 64, 2, blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x))).mean((2, 3))


def _stage(width_in: int, width: int, stride: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(_Block(width_in, width, stride), *(_Block(width, width, 1) for _ in range(1, blocks)))


def load_cifar_resnet(path: str | Path) -> FeatureNet:
    """A pretrained ResNet-20, -32, -44, -56, ... of akamaster/pytorch_resnet_cifar10 (its `.th` files).

    The depth is read from the file. Published test accuracies: 91.73, 92.63, 93.10 and 93.39 %.

    Raises:
        InputError: there is no such file, or it is not such a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist: give a resnetNN-*.th file of pytorch_resnet_cifar10")
    weights = _cifar_weights(path)
    blocks = len({key.split(".")[1] for key in weights if key.startswith("layer1.")})
    trunk = CifarResNet(max(1, blocks))
    try:
        head = nn.Linear(64, len(weights["linear.bias"]))
        nn.ModuleDict({"trunk": trunk, "linear": head}).load_state_dict(
            {key if key.startswith("linear.") else f"trunk.{key}": value for key, value in weights.items()}
        )
    except (KeyError, TypeError, RuntimeError) as error:
        raise InputError(_not_a_resnet(path, "its weights are those of another network")) from error
    return FeatureNet(f"FD-ResNet{6 * blocks + 2}", (3, 32, 32), trunk, head, IMAGENET_MEAN, IMAGENET_STD)


def _cifar_weights(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a cut or foreign file can fail anywhere in the reader
        raise InputError(_not_a_resnet(path, "it is broken, or holds more than tensors")) from error
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(_not_a_resnet(path, "it holds no 'state_dict' of tensors"))
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def _not_a_resnet(path: Path, why: str) -> str:
    return f"{path} is not a checkpoint of pytorch_resnet_cifar10: {why}"


class SmallConvNet(nn.Module):
    """Three 3x3 convolutions, halving between them, and a mean: (B, C, H, W) to (B, 64), H and W >= 4."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = (channels, 32, 64, 64)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in itertools.pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in widths[1:])

    def forward(self, x: Tensor) -> Tensor:
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.relu(norm(conv(x if i == 0 else F.max_pool2d(x, 2))))
        return x.mean((2, 3))


def train_classifier(
    train: ImageSet,
    test: ImageSet | None,
    seed: int,
    cache: Path,
    name: str = "FD-SmallConvNet",
    steps: int | None = None,
) -> FeatureNet:
    """A `SmallConvNet` trained on `train`, or the same one from `cache` if it was trained there before.

    It is trained on the CPU. The result is a function of the arguments, bit for bit on one machine with one
    number of threads, and global random state is neither read nor changed. It is kept as `model.safetensors`
    and `config.json` in a folder of `cache` named after a hash of all that it depends on.

    Args:
        train: images of at least 4x4 pixels.
        test: held-out images; their accuracy goes into `config.json`. Not part of the hash.
        seed: 0 to 2^32 - 1.
        cache: folder, made where it is missing.
        name: of distances measured with the network.
        steps: of 128 images each; None is 800, or 5 epochs where that is more.

    Raises:
        ValueError: the seed or the steps are out of range, or the images are too small.
        InputError: the cached network is broken.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed} is out of range: it must be at least 0 and below 2**32")
    if steps is not None and steps < 1:
        raise ValueError(f"steps {steps} are too few: at least 1 is needed")
    if min(train.shape[1:]) < 4:
        raise ValueError(f"images have shape {train.shape}: at least 4x4 pixels are needed")
    steps = max(MIN_STEPS, MIN_EPOCHS * len(train) // BATCH) if steps is None else steps
    config = _config(train, seed, name, steps)
    folder = Path(cache) / hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
    if not (folder / CONFIG).exists():  # written last, so the rest is there too
        trunk, head = _fit(train, seed, steps)
        net = FeatureNet(name, train.shape, trunk, head)
        result = {"test_accuracy": None if test is None else accuracy(net, test), "torch": torch.__version__}
        save_weights(net, folder / WEIGHTS)
        write_json(folder / CONFIG, config | result)
    return load_classifier(folder)


def load_classifier(folder: str | Path) -> FeatureNet:
    """The network that `train_classifier` left in `folder`.

    Raises:
        InputError: `config.json` or `model.safetensors` is missing or broken.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        name, shape, classes = config["name"], tuple(config["shape"]), config["classes"]
        trunk, head = _untrained(shape[0], classes, seed=0)
    except (OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
        raise InputError(f"{folder / CONFIG} does not describe a trained classifier: train it again") from error
    net = FeatureNet(name, shape, trunk, head)
    load_weights(net, folder / WEIGHTS)
    return net


def accuracy(net: FeatureNet, images: ImageSet, batch: int = 256) -> float:
    """Part of the images, in [0, 1], whose largest logit is that of their label."""
    right = 0
    with torch.no_grad():
        for index in torch.arange(len(images)).split(batch):
            _, logits = net(images.pixels(index).to(net.mean.device))
            right += int((logits.argmax(1).cpu() == images.labels[index]).sum())
    return right / len(images)


def _config(train: ImageSet, seed: int, name: str, steps: int) -> dict[str, Any]:
    return {
        "name": name,
        "architecture": "SmallConvNet-32-64-64",
        "recipe": f"AdamW {PEAK_LR} {WEIGHT_DECAY}, one cycle, batch {BATCH}, shifts",
        "shape": list(train.shape),
        "classes": len(train.classes),
        "data": train.digest(),
        "seed": seed,
        "steps": steps,
    }


def _untrained(channels: int, classes: int, seed: int) -> tuple[nn.Module, nn.Module]:
    with torch.random.fork_rng(devices=[]):  # torch.manual_seed would reach the CUDA generators as well
        torch.random.default_generator.manual_seed(seed)
        return SmallConvNet(channels), nn.Linear(64, classes)


@torch.enable_grad()
def _fit(train: ImageSet, seed: int, steps: int) -> tuple[nn.Module, nn.Module]:
    trunk, head = _untrained(train.shape[0], len(train.classes), seed)
    net = nn.Sequential(trunk, head).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps + 1)
    generator = torch.Generator().manual_seed(seed)
    batches = _batches(len(train), generator)
    reach = max(1, min(train.shape[1:]) // 10)
    for _ in tqdm(range(steps), desc="training the metric's classifier", unit="step", leave=False):
        index = next(batches)
        loss = F.cross_entropy(net(_shifted(train.pixels(index), reach, generator)), train.labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return trunk, head


def _batches(count: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless shuffled passes, cut into (BATCH,) indices across their borders."""
    pool = torch.empty(0, dtype=torch.int64)
    while True:
        while len(pool) < BATCH:
            pool = torch.cat((pool, torch.randperm(count, generator=generator)))
        yield pool[:BATCH]
        pool = pool[BATCH:]


def _shifted(images: Tensor, reach: int, generator: torch.Generator) -> Tensor:
    """Each image moved by up to `reach` pixels along both axes; what comes in is black."""
    count, _, height, width = images.shape
    windows = F.pad(images, (reach,) * 4, value=-1.0).unfold(2, height, 1).unfold(3, width, 1)
    rows, columns = torch.randint(0, 2 * reach + 1, (2, count), generator=generator)
    return windows[torch.arange(count), :, rows, columns]
