"""The network whose features measure images of the world of shapes, taught on its drawings; it ships with the package.

`python -m dmd.metrics.shapes_net FOLDER` makes it.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import dmd
from dmd.checkpoint import describe, load_weights, save_weights, write_json
from dmd.data import shapes
from dmd.data.images import to_float
from dmd.errors import InputError
from dmd.metrics.networks import CONFIG, WEIGHTS, FeatureNet

NAME = "FD-ShapesNet"
WIDTHS = (3, 32, 64, 96, 128)
FEATURES = 96
THUMBNAIL = 8  # the size at which the features have to redraw an image
PEAK_LR, WEIGHT_DECAY, BATCH = 4e-3, 0.05, 128
FIRST = 1 << 42
"""Drawings from this index on are for this network: no other part of the project uses them."""


class ShapesNet(nn.Module):
    """Four convolutions that halve, and a linear layer: (B, 3, 64, 64) to (B, 96).

    No mean over places: where things are is part of what an image shows.
    """

    def __init__(self) -> None:
        super().__init__()
        pairs = list(zip(WIDTHS, WIDTHS[1:], strict=False))
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False) for a, b in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for _, b in pairs)
        side = shapes.SIZE >> len(pairs)
        self.out = nn.Linear(WIDTHS[-1] * side**2, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return F.relu(self.out(x.flatten(1)))


def load(folder: str | Path) -> FeatureNet:
    """The network that `teach` left in a folder; its logits are the answers of `shapes.answers`, side by side.

    Raises:
        InputError: the file is missing or broken.
    """
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise InputError(f"{path} does not exist: make it with python -m dmd.metrics.shapes_net {folder}")
    net = _net()
    load_weights(net, path)
    return net


def _net() -> FeatureNet:
    return FeatureNet(NAME, (3, shapes.SIZE, shapes.SIZE), ShapesNet(), nn.Linear(FEATURES, sum(shapes.ANSWERS)))


def drawings(seed: int, index: Tensor) -> tuple[Tensor, Tensor]:
    """Drawings (B, 3, 64, 64) in [-1, 1] and the right answers about them (B, Q); "any size" has no right one: -1."""
    scenes = shapes.scenes(seed, index)
    right = torch.tensor([shapes.answers(s) for s in scenes])
    right[:, 3::3][right[:, 3::3] == len(shapes.SIZES) + 1] = -1
    return to_float(shapes.batch(scenes, seed, index)), right


def correct(logits: Tensor, right: Tensor) -> Tensor:
    """Whether all answers about each image are right: bool (B,)."""
    found = torch.stack([part.argmax(1) for part in logits.split(shapes.ANSWERS, dim=1)], 1)
    return ((found == right) | (right < 0)).all(1)


@torch.enable_grad()
def teach(steps: int, seed: int) -> FeatureNet:
    """Features that answer what is where by one linear layer, and redraw the image at 8 x 8 by another.

    The answers alone would make images of one caption alike; the thumbnail keeps position, size and colour in them,
    without which no distance and no diversity would see them.

    Args:
        steps: of 128 drawings each, none of them seen twice.
        seed: of drawings and weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _net()
        redraw = nn.Linear(FEATURES, 3 * THUMBNAIL**2)
    trained = nn.ModuleList([net.trunk, net.head, redraw]).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps + 1)
    for step in tqdm(range(steps), desc=NAME, unit="step"):
        x, right = drawings(seed, FIRST + step * BATCH + torch.arange(BATCH))
        features = net.trunk(x)
        logits = net.head(features).split(shapes.ANSWERS, dim=1)
        answers = sum(F.cross_entropy(s, w, ignore_index=-1) for s, w in zip(logits, right.T, strict=True))
        small = F.adaptive_avg_pool2d(x, THUMBNAIL).flatten(1)
        loss = answers / len(logits) + F.mse_loss(redraw(features), small)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.requires_grad_(False)
    nn.ModuleList([net.trunk, net.head]).eval()
    return net


@torch.no_grad()
def accuracy(net: FeatureNet, seed: int, count: int) -> float:
    """Part of unseen drawings about which all answers are right."""
    right = 0
    for index in torch.arange(2 * FIRST, 2 * FIRST + count).split(250):
        x, wanted = drawings(seed, index)
        right += int(correct(net(x)[1], wanted).sum())
    return right / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.monotonic()
    net = teach(options.steps, options.seed)
    save_weights(net.half(), options.folder / WEIGHTS)
    card: dict[str, Any] = {
        "name": NAME,
        "command": f"python -m dmd.metrics.shapes_net {options.folder} --steps {options.steps} --seed {options.seed}",
        "dmd": dmd.__version__,
        "torch": torch.__version__,
        "seconds": time.monotonic() - started,
        "unseen drawings about which all answers are right": accuracy(load(options.folder), options.seed, 5000),
        WEIGHTS: describe(options.folder / WEIGHTS),
    }
    write_json(options.folder / CONFIG, card)
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()
